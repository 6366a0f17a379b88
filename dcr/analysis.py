"""Why aligned models over-refuse, measured on one experiment: representations, kernel, rejection over alignment.

Every function returns a tidy table, computed once and kept in the run directory.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from dcr.experiment import Experiment

log = logging.getLogger("dcr")
CLASSES = ("toxic", "seemingly_toxic", "general")
MAX_PROMPTS = 150  # a class, in representation analyses


def probe_sets(experiment: Experiment) -> dict[str, pd.DataFrame]:
    """Named pairings to separate: the profile's own contrastive sets, matched pairs, and XSTest where it is at hand."""
    from dcr.data import sets
    from dcr.data.forms import swap_table

    seed = experiment.config.seed
    pairs = pd.concat([sets.table(n) for n in ("pairs-safe", "pairs-toxic", "validation-safe", "validation-toxic")],
                      ignore_index=True)
    found = {"matched pairs": pairs, "matched pairs, forms swapped": swap_table(pairs)}
    if experiment.config.data.toxic != "bundled":
        toxic, harmless = experiment.sets.toxic, experiment.sets.seemingly_toxic
        found["sources (paper)"] = pd.concat([_some(toxic, seed), _some(harmless, seed)], ignore_index=True)
    else:  # the paper's confound in small: harmless questions against toxic imperatives
        kept = pairs[(pairs["label"] == "toxic") == (pairs["form"] == "imperative")]
        found["sources (paper)"] = kept.reset_index(drop=True)
    found["sources, forms swapped"] = swap_table(found["sources (paper)"])
    if "xstest-unsafe" in experiment.config.data.benchmarks:
        xstest = pd.concat([_some(sets.table(n), seed) for n in ("xstest-safe", "xstest-unsafe")], ignore_index=True)
        kind = xstest["category"].str.replace("contrast_", "", regex=False)
        found["XSTest contrasts"] = xstest.assign(pair_id=kind)  # folds grouped by kind
    return found


def _some(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    from dcr.data.loaders import stratified_subset

    return stratified_subset(rows, min(MAX_PROMPTS, len(rows)), seed)


def _states(experiment: Experiment, method: str, name: str, rows: pd.DataFrame, step: int = -1):
    """Hidden states of one set under one method's model, kept on disk."""
    from dcr.data.sets import table_hash
    from dcr.hidden_states import HiddenStates, hidden_states

    key = {"weights": experiment.weights_key(method, step), "prompts": table_hash(rows)}

    def build(folder) -> None:
        model, tokenizer = experiment.model(method, step)
        hidden_states(model, tokenizer, rows["text"].tolist(), out=folder)

    artifact = experiment.store.get("states", f"{method}-{name.replace(' ', '-')}".replace(",", ""), key, build)
    return HiddenStates(np.load(artifact.path / "values.npy", mmap_mode="r"), "last")


def question_shares(experiment: Experiment) -> pd.DataFrame:
    """Share of questions in every benchmark and training set: the shortcut, counted."""
    tables = {n: t for n, t in experiment.sets.benchmarks.items() if "/swapped" not in n}
    tables |= {"stage 1, seemingly toxic": experiment.sets.seemingly_toxic, "stage 1, toxic": experiment.sets.toxic,
               "stage 2, safe": experiment.sets.mix.query("role == 'safe'"),
               "stage 2, general": experiment.sets.mix.query("role == 'general'")}
    rows = [{"set": n, "label": t["label"].iloc[0], "question_share": float((t["form"] == "question").mean()), "n": len(t)}
            for n, t in tables.items()]
    table = pd.DataFrame(rows)
    experiment.write_table("question_shares", table)
    return table


def separability(experiment: Experiment, method: str = "base", layers: int = 8) -> dict[str, pd.DataFrame]:
    """Tables `probe` (by layer and pairing), `transfer` (to swapped forms), `surface`, `cosine`, `clusters`."""
    from dcr import separability as s

    seed, named = experiment.config.seed, probe_sets(experiment)
    parts: dict[str, list[pd.DataFrame]] = {"probe": [], "transfer": [], "surface": [], "cosine": [], "clusters": []}
    states = {name: _states(experiment, method, name, rows) for name, rows in named.items()}
    for name, rows in named.items():
        chosen = sorted({*np.linspace(1, states[name].n_layers, layers).astype(int).tolist()})
        if "swapped" not in name:
            parts["probe"].append(s.probe_by_layer(states[name], rows, chosen, seed).assign(pairing=name))
            parts["surface"].append(s.surface_baselines(rows, seed).assign(pairing=name))
            parts["cosine"].append(s.cosine_structure(states[name], rows, chosen).assign(pairing=name))
            parts["clusters"].append(s.cluster_by_layer(states[name], rows, chosen, seed).assign(pairing=name))
    for train in ("sources (paper)", "matched pairs"):
        for test in ("sources, forms swapped", "matched pairs", "matched pairs, forms swapped"):
            if train != test:
                table = s.transfer_auroc(states[train], named[train], states[test], named[test], chosen, seed)
                parts["transfer"].append(table.assign(pairing=train, tested_on=test))
    tables = {k: pd.concat(v, ignore_index=True).assign(method=method) for k, v in parts.items()}
    for name, table in tables.items():
        experiment.write_table(f"separability_{name}_{method}", table)
    return tables


def map_points(experiment: Experiment, layer: int, name: str = "matched pairs", method: str = "base",
               step: int = -1) -> pd.DataFrame:
    """x, y of a set's prompts at one layer (principal components) with text, label, form, source: a map to explore."""
    from dcr.separability import map_2d

    rows = probe_sets(experiment)[name]
    points = map_2d(_states(experiment, method, name, rows, step), layer)
    return rows[["id", "text", "label", "form", "source", "category"]].assign(x=points[:, 0], y=points[:, 1], layer=layer)


def class_prompts(experiment: Experiment, per_class: int) -> pd.DataFrame:
    """A few held-out prompts of each class, forms mixed: what kernel and rejection probability are followed on."""
    from dcr.data import sets
    from dcr.data.loaders import stratified_subset

    names = {"toxic": "pairs-toxic", "seemingly_toxic": "pairs-safe", "general": "general-test"}
    return pd.concat([stratified_subset(sets.table(n), per_class, experiment.config.seed) for n in names.values()],
                     ignore_index=True)


def kernel_table(experiment: Experiment, method: str, step: int = -1, *, tokens: str = "top-k",
                 parameters: str = "blocks") -> pd.DataFrame:
    """Rows class_a, class_b, normalised, symmetric with 95 % bootstrap intervals over prompts, for one model."""
    from dcr.data.sets import table_hash
    from dcr.kernel import entk

    prompts = class_prompts(experiment, experiment.config.evaluation.kernel_prompts)
    key = {"weights": experiment.weights_key(method, step), "prompts": table_hash(prompts), "tokens": tokens,
           "parameters": parameters, "version": 1}

    def build(folder) -> None:
        model, tokenizer = experiment.model(method, step)
        texts = prompts["text"].tolist()
        result = entk(model, tokenizer, texts, texts[:1], tokens=tokens, parameters=parameters, seed=experiment.config.seed)
        np.save(folder / "norms.npy", result.within_a)
        np.save(folder / "own.npy", result.self_a)

    artifact = experiment.store.get("kernel", f"{method}@{step}", key, build)
    norms, own = np.load(artifact.path / "norms.npy"), np.load(artifact.path / "own.npy")
    rows = []
    for a in CLASSES:
        for b in CLASSES:
            i, j = (np.flatnonzero((prompts["label"] == c).to_numpy()) for c in (a, b))
            block = norms[np.ix_(i, j)]
            ratio, symmetric = block / own[i][:, None], block / np.sqrt(own[i][:, None] * own[j][None])
            if a == b:
                off = ~np.eye(len(i), dtype=bool)
                ratio, symmetric = np.where(off, ratio, np.nan), np.where(off, symmetric, np.nan)
            rows.append({"class_a": a, "class_b": b, **_interval(ratio, "normalised", experiment.config.seed),
                         **_interval(symmetric, "symmetric", experiment.config.seed), "n": int(np.isfinite(ratio).sum())})
    return pd.DataFrame(rows).assign(method=method, step=step, tokens=tokens, parameters=parameters)


def _interval(block: np.ndarray, name: str, seed: int, n_boot: int = 500) -> dict[str, float]:
    """Mean of a block with an interval that draws prompts (rows and columns), not cells."""
    rng = np.random.default_rng([seed, 0x4B])
    draws = [np.nanmean(block[np.ix_(rng.integers(len(block), size=len(block)),
                                     rng.integers(block.shape[1], size=block.shape[1]))]) for _ in range(n_boot)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {name: float(np.nanmean(block)), f"{name}_low": float(low), f"{name}_high": float(high)}


def rejection_table(experiment: Experiment, method: str, step: int = -1) -> pd.DataFrame:
    """Refusal probability of each followed prompt (id, label, form, probability) for one model."""
    from dcr.data.sets import table_hash
    from dcr.rejection import PHRASES_VERSION, refusal_probability

    prompts = class_prompts(experiment, experiment.config.evaluation.trajectory_prompts)
    key = {"weights": experiment.weights_key(method, step), "prompts": table_hash(prompts), "phrases": PHRASES_VERSION}

    def build(folder) -> None:
        model, tokenizer = experiment.model(method, step)
        np.save(folder / "probability.npy", refusal_probability(model, tokenizer, prompts["text"].tolist()))

    artifact = experiment.store.get("rejection", f"{method}@{step}", key, build)
    return prompts[["id", "label", "form"]].assign(probability=np.load(artifact.path / "probability.npy"), method=method,
                                                   step=step)


def trajectories(experiment: Experiment, methods: tuple[str, ...] = ()) -> dict[str, pd.DataFrame]:
    """Tables `rejection` and `kernel` over the recorded alignment steps of each method (paper figures 1, 3, 6)."""
    methods = methods or tuple(m for m in experiment.methods if "align" in experiment.stages(m))
    rejection, kernel = [], []
    for method in methods:
        steps = experiment.steps(method)
        for step in steps:
            rejection.append(rejection_table(experiment, method, step))
        for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
            kernel.append(kernel_table(experiment, method, step))
    tables = {"rejection": pd.concat(rejection, ignore_index=True), "kernel": pd.concat(kernel, ignore_index=True)}
    for name, table in tables.items():
        experiment.write_table(f"trajectory_{name}", table)
    return tables


def before_after(experiment: Experiment, method: str = "DCR") -> pd.DataFrame:
    """Held-out similarity and probe over stage 1 (rows step, cross_similarity, within_similarity, probe_auroc)."""
    table = experiment.history(method, "evaluations")
    experiment.write_table(f"refinement_{method}", table)
    return table
