"""Why aligned models over-refuse, measured on one experiment: which prompts lie apart, and by what.

Every function returns a tidy table; hidden states are computed once and kept in the run directory. Kernel, refusal
probability and their course over alignment are in `dcr.tables.trajectories` and offered here too.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from dcr.run.experiment import Experiment
from dcr.tables.trajectories import (
    class_prompts,
    kernel_table,
    proposition,
    refinement_layer,
    refusal_rates,
    rejection_reliability,
    rejection_table,
    stored_states,
    trajectories,
)

__all__ = [
    "before_after",
    "class_prompts",
    "closing_note",
    "kernel_table",
    "map_points",
    "probe_cells",
    "probe_sets",
    "proposition",
    "question_shares",
    "refinement_layer",
    "refusal_rates",
    "rejection_reliability",
    "rejection_table",
    "separability",
    "separability_summary",
    "trajectories",
]

log = logging.getLogger("dcr")
PAIRINGS = {
    "sources (paper)": "sources, forms swapped",
    "matched pairs": "matched pairs, forms swapped",
    "XSTest contrasts": "XSTest contrasts, forms swapped",
}
MAX_PROMPTS = 150  # a class, in representation analyses


def probe_sets(experiment: Experiment, method: str = "base") -> dict[str, pd.DataFrame]:
    """Named pairings to separate: the profile's own contrastive sets, matched pairs, and XSTest where it is at hand.

    For the untouched model matched pairs are those of all splits (unless the profile limits its sets): nothing was
    trained on them. For any other method only held-out ones.
    """
    from dcr.data import loaders, sets
    from dcr.data.forms import swap_table

    seed = experiment.config.seed
    pairs = pd.concat(
        [
            sets.table(n)
            for n in ("pairs-safe", "pairs-toxic", "validation-safe", "validation-toxic")
        ],
        ignore_index=True,
    )
    if method == "base" and not experiment.config.data.limit:
        pairs = loaders.load_bundled("pairs")
    chosen = (
        pairs["pair_id"].drop_duplicates().sample(frac=1, random_state=seed)
    )  # both members of a pair, or neither
    pairs = pairs[
        pairs["pair_id"].isin(chosen[: experiment.config.evaluation.probe_pairs])
    ].reset_index(drop=True)
    found = {"matched pairs": pairs, "matched pairs, forms swapped": swap_table(pairs)}
    if experiment.config.data.toxic != "bundled":
        toxic, harmless = experiment.sets.toxic, experiment.sets.seemingly_toxic
        found["sources (paper)"] = pd.concat(
            [_some(toxic, seed), _some(harmless, seed)], ignore_index=True
        )
    else:  # the paper's confound in small: harmless questions against toxic imperatives
        kept = pairs[(pairs["label"] == "toxic") == (pairs["form"] == "imperative")]
        found["sources (paper)"] = kept.reset_index(drop=True)
    found["sources, forms swapped"] = swap_table(found["sources (paper)"])
    if "xstest-unsafe" in experiment.config.data.benchmarks:
        xstest = pd.concat(
            [_some(sets.table(n), seed) for n in ("xstest-safe", "xstest-unsafe")],
            ignore_index=True,
        )
        kind = xstest["category"].str.replace("contrast_", "", regex=False)
        found["XSTest contrasts"] = xstest.assign(pair_id=kind)  # folds grouped by kind
        found["XSTest contrasts, forms swapped"] = swap_table(found["XSTest contrasts"])
    if {"or-bench", "advbench"} <= set(
        experiment.config.data.benchmarks
    ):  # sources that no probe is trained on
        others = pd.concat(
            [_some(sets.table(n), seed) for n in ("or-bench", "advbench")], ignore_index=True
        )
        found["other sources"], found["other sources, forms swapped"] = others, swap_table(others)
    return found


def _some(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    from dcr.data.loaders import stratified_subset

    return stratified_subset(rows, min(MAX_PROMPTS, len(rows)), seed)


def question_shares(experiment: Experiment) -> pd.DataFrame:
    """Share of questions in every benchmark and training set: the shortcut, counted."""
    tables = {n: t for n, t in experiment.sets.benchmarks.items() if "/swapped" not in n}
    tables |= {
        "stage 1, seemingly toxic": experiment.sets.seemingly_toxic,
        "stage 1, toxic": experiment.sets.toxic,
        "stage 2, safe": experiment.sets.mix.query("role == 'safe'"),
        "stage 2, general": experiment.sets.mix.query("role == 'general'"),
    }
    rows = [
        {
            "set": n,
            "label": t["label"].iloc[0],
            "question_share": float((t["form"] == "question").mean()),
            "n": len(t),
        }
        for n, t in tables.items()
    ]
    table = pd.DataFrame(rows)
    experiment.write_table("question_shares", table)
    return table


def separability(
    experiment: Experiment, method: str = "base", layers: int = 8
) -> dict[str, pd.DataFrame]:
    """Tables `probe` (by layer and pairing), `transfer` (to swapped forms), `surface`, `cosine`, `clusters`."""
    from dcr.analysis import probes as s

    seed, named = experiment.config.seed, probe_sets(experiment, method)
    parts: dict[str, list[pd.DataFrame]] = {
        "probe": [],
        "transfer": [],
        "surface": [],
        "cosine": [],
        "clusters": [],
    }
    states = {name: stored_states(experiment, method, name, rows) for name, rows in named.items()}
    for name, rows in named.items():
        chosen = sorted({*np.linspace(1, states[name].n_layers, layers).astype(int).tolist()})
        if name in PAIRINGS:
            parts["probe"].append(
                s.probe_by_layer(states[name], rows, chosen, seed).assign(pairing=name)
            )
            parts["surface"].append(s.surface_baselines(rows, seed).assign(pairing=name))
            parts["cosine"].append(
                s.cosine_structure(states[name], rows, chosen).assign(pairing=name)
            )
            parts["clusters"].append(
                s.cluster_by_layer(states[name], rows, chosen, seed).assign(pairing=name)
            )
    for train in ("sources (paper)", "matched pairs"):
        for test in named:
            if train != test:
                table = s.transfer_auroc(
                    states[train], named[train], states[test], named[test], chosen, seed
                )
                parts["transfer"].append(table.assign(pairing=train, tested_on=test))
    tables = {k: pd.concat(v, ignore_index=True).assign(method=method) for k, v in parts.items()}
    for name, table in tables.items():
        experiment.write_table(f"separability_{name}_{method}", table)
    return tables


def probe_cells(experiment: Experiment, method: str = "base", layer: int = 0) -> pd.DataFrame:
    """AUROC of each pairing's probe at one layer (default ℓ) by form of the toxic and of the harmless prompt.

    Rows pairing, toxic_form, harmless_form, auroc, n, layer; held-out prompts are scored as they are and form-swapped.
    """
    from dcr.analysis.probes import probe_by_form

    named, layer, parts = probe_sets(experiment, method), layer or refinement_layer(experiment), []
    for name, swapped in PAIRINGS.items():
        if name in named:
            states = [stored_states(experiment, method, n, named[n]) for n in (name, swapped)]
            parts.append(
                probe_by_form(
                    states[0], named[name], states[1], named[swapped], layer, experiment.config.seed
                ).assign(pairing=name)
            )
    table = pd.concat(parts, ignore_index=True)
    experiment.write_table(f"separability_cells_{method}", table)
    return table


def separability_summary(tables: dict[str, pd.DataFrame], layer: int) -> pd.DataFrame:
    """A row a pairing at the probed layer nearest to `layer`: the probe's AUROC and interval, accuracy, every surface
    baseline, and the same probe on the form-swapped prompts (held out)."""
    probe, transfer = tables["probe"], tables["transfer"]
    nearest = min(probe["layer"].unique(), key=lambda at: abs(at - layer))
    rows = []
    for _, row in probe[probe["layer"] == nearest].iterrows():
        surface = tables["surface"][tables["surface"]["pairing"] == row["pairing"]].set_index(
            "baseline"
        )["auroc"]
        swapped = transfer[
            (transfer["pairing"] == row["pairing"])
            & (transfer["layer"] == nearest)
            & (transfer["tested_on"] == PAIRINGS[row["pairing"]])
        ]["auroc"]
        rows.append(
            {
                **row[["pairing", "layer", "auroc", "low", "high", "accuracy", "n"]].to_dict(),
                **surface.to_dict(),
                "forms swapped": float(swapped.iloc[0]) if len(swapped) else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def closing_note(
    summary: pd.DataFrame, cells: pd.DataFrame, kernel: pd.DataFrame, bound: pd.DataFrame
) -> str:
    """The notebook's measured answers in words: probe against surface, probe by form, kernel, Proposition 1."""
    lines = []
    for _, row in summary.iterrows():
        base = max(("question-mark", "length", "tf-idf"), key=lambda n: row[n])
        said = (
            f", on swapped forms {row['forms swapped']:.2f}"
            if row["forms swapped"] == row["forms swapped"]
            else ""
        )
        lines.append(
            f"{row['pairing']}: probe AUROC {row['auroc']:.2f} [{row['low']:.2f}, {row['high']:.2f}] (accuracy "
            f"{row['accuracy']:.2f}) at layer {row['layer']}{said}; best surface baseline {base} {row[base]:.2f}, source "
            f"{row['source']:.2f}"
        )
    for name, rows in cells.groupby("pairing", sort=False):
        shown = ", ".join(
            f"{r.toxic_form}/{r.harmless_form} {r.auroc:.2f}" for r in rows.itertuples()
        )
        lines.append(f"{name}, probe by form (toxic/harmless): {shown}")
    for (method, _), rows in kernel.groupby(["method", "step"], sort=False):
        cross = rows[(rows["class_a"] == "toxic") & (rows["class_b"] == "seemingly_toxic")].iloc[0]
        lines.append(
            f"kernel toxic against seemingly toxic, {'base' if method == 'base' else f'{method} after stage 1'}: "
            f"{cross['normalised']:.2f} [{cross['normalised_low']:.2f}, {cross['normalised_high']:.2f}]"
        )
    for row in bound.itertuples():
        lines.append(
            f"Proposition 1, {row.model}: Spearman {row.spearman:.2f} [{row.low:.2f}, {row.high:.2f}] over {row.pairs} "
            f"pairs; {row.reading}"
        )
    return "\n".join(lines)


def map_points(
    experiment: Experiment,
    layer: int,
    name: str = "matched pairs",
    method: str = "base",
    step: int = -1,
) -> pd.DataFrame:
    """x, y of a set's prompts at one layer (principal components) with text, label, form, source: a map to explore."""
    from dcr.analysis.probes import map_2d

    rows = probe_sets(experiment, method)[name]
    points = map_2d(stored_states(experiment, method, name, rows, step), layer)
    return rows[["id", "text", "label", "form", "source", "category"]].assign(
        x=points[:, 0], y=points[:, 1], layer=layer
    )


def before_after(experiment: Experiment, method: str = "DCR") -> pd.DataFrame:
    """Held-out similarity and probe over stage 1 (rows step, cross_similarity, within_similarity, probe_auroc)."""
    table = experiment.history(method, "evaluations")
    experiment.write_table(f"refinement_{method}", table)
    return table
