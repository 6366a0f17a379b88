"""Notebook 01: what hidden states of the base model tell apart, harm, form or source.

The first seed is read: seeds choose only the training sample here. Requests that a probe was
fitted on are scored by the fold that held them out.
"""

import numpy as np
import pandas as pd

from dcr.analysis import probes
from dcr.data.forms import swap_table
from dcr.errors import DCRError
from dcr.evaluate.auroc import auroc
from dcr.evaluate.intervals import mean_interval
from dcr.evaluate.kernels import bound_check, bound_pairs, class_matrix
from dcr.run.readings import Run
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.gather import auroc_rows, first_of_each, followed_prompts, methods_of

NOTEBOOK = "01_representations"
SHOWN = ["pairing", "source", "toxic_form", "harmless_form", "auroc", "low", "high", "met", "n"]


def pairings(run: Run) -> dict[str, pd.DataFrame]:
    """Named training pairings of both classes: the paper's, minimal pairs, XSTest's contrasts."""
    named = {}
    for name, method in (("sources (paper)", "DCR"), ("matched pairs", "DCR-matched")):
        sets = run.sets(method)
        named[name] = pd.concat([sets.toxic, sets.seemingly_toxic], ignore_index=True)
    if run.config.data.toxic == "bundled":  # the paper's confound in small: questions, imperatives
        rows = named["matched pairs"]
        kept = (rows["label"] == "toxic") == (rows["form"] == "imperative")
        named["sources (paper)"] = rows[kept]
    xstest = run.prompts["benchmark"].str.startswith("xstest")
    contrasts = run.prompts[xstest & (run.prompts["version"] == "published")]
    if contrasts["label"].nunique() == 2:
        named["XSTest contrasts"] = contrasts
    n = run.config.evaluation.probe_pairs
    return {name: first_of_each(rows, n) for name, rows in named.items()}


def unseen(run: Run, per_set: int) -> pd.DataFrame:
    """Test prompts of both classes, all versions of `per_set` requests a set; no training set.

    Raises DCRError where there is none.
    """
    rows = run.prompts[(run.prompts["role"] == "test") & (run.prompts["label"] != "general")]
    if rows.empty:
        raise DCRError(
            "no test set is unseen: those of data.benchmarks are trained on (XSTest) or general. "
            "Name another one, such as oktest or advbench."
        )
    return first_of_each(rows, per_set, ("label", "benchmark"))


def spread(run: Run, n: int = 8) -> list[int]:
    """`n` layers spread over the depth, with ℓ and the last one."""
    return sorted({*np.linspace(1, run.depth, n).round().astype(int).tolist(), run.layer("DCR")})


@table("question_shares", notebook=NOTEBOOK)
def question_shares(experiment: Experiment) -> pd.DataFrame:
    """The shortcut, counted: share of questions in every published test set and training set."""
    published = experiment.prompts[experiment.prompts["version"] == "published"]
    sets = experiment.runs[0].sets("DCR")
    parts = [published.assign(set=published["benchmark"], use="test")]
    first = pd.concat([sets.toxic, sets.seemingly_toxic])
    for use, rows in {"stage 1": first, "stage 2": sets.mix}.items():
        parts.append(rows.assign(set=use + ", " + rows["label"].str.replace("_", " "), use=use))
    rows = pd.concat(parts).assign(asks=lambda t: t["form"] == "question")
    grouped = rows.groupby(["set", "use", "label"], sort=False)["asks"]
    return grouped.agg(question_share="mean", n="size").reset_index()


@table("separability", notebook=NOTEBOOK)
def separability(experiment: Experiment) -> pd.DataFrame:
    """AUROC of a cross-validated probe by layer, and of surface readers (layer -1), by pairing."""
    run, parts = experiment.runs[0], []
    for name, rows in pairings(run).items():
        by_layer = probes.layer_scores(run.states("base", rows), rows, spread(run))
        probed = auroc_rows(rows, by_layer, "layer").assign(reader="probe")
        surface = auroc_rows(rows, probes.surface_scores(rows), "reader").assign(layer=-1)
        parts.append(pd.concat([probed, surface]).assign(pairing=name))
    return pd.concat(parts, ignore_index=True)


@table("transfer", notebook=NOTEBOOK)
def transfer(experiment: Experiment) -> pd.DataFrame:
    """Each pairing's probe by layer on the others, on its own swapped, and on unseen sets."""
    run, parts = experiment.runs[0], []
    named = pairings(run)
    tests = named | {f"{n}, forms swapped": swap_table(rows) for n, rows in named.items()}
    tests["unseen sets"] = unseen(run, run.config.evaluation.probe_pairs // 4)
    for name, rows in named.items():
        states = run.states("base", rows)
        for other, held in ((n, t) for n, t in tests.items() if n != name):
            read = run.states("base", held)
            by_layer = probes.layer_scores(states, rows, spread(run), (read, held))
            found = auroc_rows(held, by_layer, "layer")
            parts.append(found.assign(pairing=name, tested_on=other))
    return pd.concat(parts, ignore_index=True)


@table("probe_cells", notebook=NOTEBOOK)
def probe_cells(experiment: Experiment) -> pd.DataFrame:
    """Each pairing's probe at ℓ by form of toxic and harmless prompts; same requests in a cell."""
    run, parts = experiment.runs[0], []
    for name, rows in pairings(run).items():
        both = pd.concat([rows, swap_table(rows)]).drop_duplicates("id").reset_index(drop=True)
        parts.append(_at_layer(run, {name: rows}, both, by="form"))
    return pd.concat(parts, ignore_index=True).drop(columns=["source", "met"])


@table("source_shortcut", notebook=NOTEBOOK)
def source_shortcut(experiment: Experiment) -> pd.DataFrame:
    """Training pairing × unseen harmless source, forms equal: is harm read at ℓ, or the source?

    Beside the pairings, every harmless test source is itself set against the refusal file: its
    own row says how well a source is told apart, its other rows whether that was harm. A pairing's
    mean leaves out its own sources and what some method met. Nothing is trained with these probes.
    """
    run = experiment.runs[0]
    held = unseen(run, run.config.evaluation.probe_pairs)
    refusals, named = run.sets("DCR").toxic, pairings(run)
    refusals = pd.concat([refusals, swap_table(refusals)], ignore_index=True)
    for source, rows in held[held["label"] == "seemingly_toxic"].groupby("source", sort=False):
        both = pd.concat([rows, refusals], ignore_index=True)
        named[f"{source} against refusals"] = both.drop_duplicates("id", ignore_index=True)
    return _at_layer(run, named, held, by="source")


def _at_layer(run: Run, named: dict, held: pd.DataFrame, by: str) -> pd.DataFrame:
    """AUROC of each named pairing's probe at ℓ on `held`, by form (and harmless source)."""
    layer, read, parts = run.layer("DCR"), run.states("base", held), []
    for name, rows in named.items():
        found = probes.layer_scores(run.states("base", rows), rows, [layer], (read, held))[layer]
        told = pd.DataFrame({"prompt_id": held["id"], "score": found, "method": name, "seed": 0})
        met = held["source"].isin(rows["source"]) | held.get("met", False)
        parts.append(auroc(held.assign(met=met), told, by=by))
    rows = pd.concat(parts, ignore_index=True).rename(columns={"method": "pairing"})
    return rows[SHOWN].assign(layer=layer)


@table("structure", notebook=NOTEBOOK)
def structure(experiment: Experiment) -> pd.DataFrame:
    """Without labels: cosines within and across classes, and k-means against them, by layer."""
    run, parts = experiment.runs[0], []
    for name, rows in pairings(run).items():
        states, layers = run.states("base", rows), spread(run)
        cosines = probes.cosine_structure(states, rows, layers)
        clusters = probes.cluster_by_layer(states, rows, layers)
        parts.append(cosines.merge(clusters, on="layer").assign(pairing=name))
    return pd.concat(parts, ignore_index=True)


@table("map", notebook=NOTEBOOK)
def map_points(experiment: Experiment) -> pd.DataFrame:
    """Two principal components of each pairing's prompts at a few layers; ids, no text."""
    run, parts = experiment.runs[0], []
    for name, rows in pairings(run).items():
        states = run.states("base", rows)
        facts = rows[["id", "label", "form", "source", "category"]]
        for layer in spread(run, 3):
            x, y = probes.map_2d(states, layer).T
            parts.append(facts.assign(pairing=name, layer=layer, x=x, y=y))
    return pd.concat(parts, ignore_index=True)


@table("kernel", notebook=NOTEBOOK)
def kernel(experiment: Experiment) -> pd.DataFrame:
    """Kernel between classes (paper figure 3's quantity), in the base and after each stage 1."""
    prompts = followed_prompts(experiment, experiment.config.evaluation.kernel_prompts)
    named = {"base": ("base", experiment.runs[:1])}
    refined = methods_of(experiment, "refine")
    named |= {m: ("refined", experiment.runs_of(m)) for m in refined}
    parts = []
    for method, (stage, runs) in named.items():
        norms = [run.kernel(method, prompts, 0) for run in runs]
        found = class_matrix(norms, prompts["label"], prompts["request"])
        parts.append(found.assign(method=method, stage=stage, seeds=len(norms)))
    return pd.concat(parts, ignore_index=True)


@table("proposition", notebook=NOTEBOOK)
def proposition(experiment: Experiment) -> pd.DataFrame:
    """Proposition 1, a row a pair of prompts: |h'ᵀh| at ℓ and ‖K‖, beside how the bound holds."""
    run, parts = experiment.runs[0], []
    prompts = followed_prompts(experiment, run.config.evaluation.kernel_prompts)
    named = prompts["label"], prompts["request"]
    for method in ("base", *methods_of(experiment, "refine")[:1]):
        stage, layer = ("base", "DCR") if method == "base" else ("refined", method)
        states = run.states(method, prompts, 0)[run.layer(layer)]
        pairs = bound_pairs(states, run.kernel(method, prompts, 0), *named)
        pairs = pairs.assign(method=method, stage=stage, layer=run.layer(layer))
        check = pd.DataFrame([bound_check(pairs, prompts["request"])])
        parts.append(pairs.merge(check, how="cross"))
    return pd.concat(parts, ignore_index=True).drop(columns=["a", "b"])


@table("rejection", notebook=NOTEBOOK)
def rejection(experiment: Experiment) -> pd.DataFrame:
    """Mean refusal probability of the base model by class and form."""
    run, rows = experiment.runs[0], []
    prompts = followed_prompts(experiment, run.config.evaluation.trajectory_prompts)
    prompts = prompts.assign(value=run.refusal_probability("base", prompts, 0))
    for (label, form), part in prompts.groupby(["label", "form"], sort=False):
        value, low, high = mean_interval(part["value"], part["request"])
        named = {"method": "base", "label": label, "form": form, "probability": value}
        rows.append({**named, "low": low, "high": high, "n": len(part)})
    return pd.DataFrame(rows)
