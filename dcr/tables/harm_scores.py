"""Scores of harm without a threshold: the refusal probability of each model, and what a linear probe reads at ℓ before alignment.

A score orders prompts, and its AUROC over forms says how well. With a threshold that moves it is a curve in the
compliance-safety plane as well: what a model could reach that refused by that score alone. One table a seed, without text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from dcr.analysis.refusal import auroc_by_form, auroc_draws
from dcr.config import load_config
from dcr.errors import DCRError
from dcr.evaluate.intervals import draw_seeds, percentiles, unit_of
from dcr.evaluate.matched import FACTS, Curve, draw_prompts
from dcr.run.experiment import RULES, Experiment
from dcr.tables.comparisons import left_out

HARM_ROWS = 200  # prompts a class that the probe is fitted on
THRESHOLDS = 33  # points of a score's curve: its DSR moves in steps of 1/32


def harm_prompts(profile: str, seed: int) -> pd.DataFrame:
    """Labelled prompts with clean labels, both forms in both classes: bundled pairs and, where the profile has real sets, XSTest's."""
    from dcr.data.sets import contrastive_sets

    config = load_config(profile, seed=seed)
    if config.data.seemingly_toxic != "bundled":
        config = config.override(
            {
                "data.toxic": "bundled+xstest-unsafe",
                "data.seemingly_toxic": "bundled+xstest-safe",
                "data.form_mix": 0.5,
            }
        )
    classes = contrastive_sets(config.override({"data.n_toxic": 0, "data.n_seemingly_toxic": 0}))
    return pd.concat(
        [rows.sample(min(HARM_ROWS, len(rows)), random_state=seed) for rows in classes],
        ignore_index=True,
    )


def probe_scores(
    model,
    tokenizer,
    prompts: pd.DataFrame,
    harm: pd.DataFrame,
    layer: int,
    *,
    pooling: str = "last",
    max_length: int = 256,
    layers_path: str = "",
) -> dict[str, np.ndarray]:
    """Scores [n] of prompts by `harm_prompts` at hidden state `layer`: of a linear probe, and along the difference of their class means."""
    from dcr.train.contrast import PromptRows, StageOneModel, pooled_states
    from dcr.train.sampling import TOXIC
    from dcr.train.watch import fit_probe

    reader = StageOneModel(model, layer, pooling, layers_path)
    data, read = PromptRows(harm, tokenizer, max_length), PromptRows(prompts, tokenizer, max_length)
    clean, held = (pooled_states(reader, rows, range(len(rows))) for rows in (data, read))
    toxic = np.array(data.labels) == TOXIC
    return {
        "probe": fit_probe(clean, toxic).decision_function(held),
        "means": (held @ (clean[toxic].mean(0) - clean[~toxic].mean(0))).double().numpy(),
    }


def scores_table(experiment: Experiment) -> pd.DataFrame:
    """A row per curve prompt of a source that no method and no probe is fitted on, a column READER@METHOD of scores.

    Higher is more harmful. refusal@: refusal probability after alignment. probe@, means@: read at ℓ before alignment, in the
    base model and after each method's stage 1; fitted on `harm_prompts`. Steered methods have no weights of their own.
    Written to scores.csv.
    """
    from dcr.tables.trajectories import refusal_probabilities

    prompts = experiment.curve_prompts
    contrast, fitted = prompts["label"].isin(["toxic", "seemingly_toxic"]), left_out([experiment])
    both = fitted | set(harm_prompts(experiment.config.profile, experiment.config.seed)["source"])
    if (
        prompts.loc[contrast & ~prompts["source"].isin(both), "label"].nunique() == 2
    ):  # else bundled data alone: topics held out
        fitted = both
    counted = (contrast & ~prompts["source"].isin(fitted)).to_numpy()
    methods = [
        m for m in experiment.methods if m not in RULES and "steer" not in experiment.stages(m)
    ]
    columns = {
        f"refusal@{m}": refusal_probabilities(experiment, m, experiment.steps(m)[-1], prompts)[
            counted
        ]
        for m in methods
    }
    for method in ("base", *(m for m in methods if "refine" in experiment.stages(m))):
        columns |= {
            f"{reader}@{method}": values[counted]
            for reader, values in _probe(experiment, method, prompts).items()
        }
    table = prompts.loc[counted, list(FACTS)].assign(
        profile=experiment.config.profile, seed=experiment.config.seed
    )
    table = pd.concat([table, pd.DataFrame(columns, index=table.index)], axis=1).reset_index(
        drop=True
    )
    experiment.write_table("scores", table)
    return table


def _probe(experiment: Experiment, method: str, prompts: pd.DataFrame) -> Mapping[str, np.ndarray]:
    """`probe_scores` of a method's model before alignment; kept in the run directory."""
    from dcr.data.sets import table_hash
    from dcr.tables.trajectories import refinement_layer

    harm, options = (
        harm_prompts(experiment.config.profile, experiment.config.seed),
        experiment.recipe(method).refine,
    )
    layer = (
        experiment.refined(method).manifest["layer"]
        if "refine" in experiment.stages(method)
        else refinement_layer(experiment, method)
    )
    key = {
        "weights": experiment.weights_key(method, 0),
        "prompts": table_hash(prompts),
        "harm": table_hash(harm),
        "layer": layer,
        "pooling": options.pooling,
    }

    def build(folder: Path) -> dict:
        model, tokenizer = experiment.model(method, 0)
        scores = probe_scores(
            model,
            tokenizer,
            prompts,
            harm,
            layer,
            pooling=options.pooling,
            max_length=options.max_length,
            layers_path=experiment.config.model.layers_path,
        )
        np.savez(folder / "scores.npz", **scores)
        return {"layer": layer, "harm_prompts": len(harm)}

    artifact = experiment.store.get("probe", method, key, build)
    with np.load(artifact.path / "scores.npz") as stored:
        return dict(stored)


def score_curves(scores: pd.DataFrame) -> list[Curve]:
    """Curves of every score and seed: a prompt counts as refused where its score is above a threshold: quantiles of the toxic scores."""
    curves = []
    for seed, rows in scores.groupby("seed", sort=True):
        prompts = rows[list(FACTS)].reset_index(drop=True)
        toxic = (prompts["label"] == "toxic").to_numpy()
        for column in _columns(rows):
            values = rows[column].to_numpy(dtype=float)
            levels = np.r_[np.quantile(values[toxic], np.linspace(0, 1, THRESHOLDS)), -np.inf]
            refused = values[:, None] > np.unique(levels)[::-1]
            curves.append(
                Curve(
                    column,
                    int(seed),
                    prompts,
                    (refused == toxic[:, None]).astype(float),
                    tuple(range(refused.shape[1])),
                )
            )
    return curves


def _columns(scores: pd.DataFrame) -> list[str]:
    missing = [c for c in (*FACTS, "seed") if c not in scores]
    columns = [c for c in scores if "@" in c and scores[c].notna().any()]
    if missing or not columns:
        raise DCRError(
            f"scores: column {missing[0] if missing else 'READER@METHOD'!r} is missing; write them with `dcr run`."
        )
    return columns


def score_auroc(scores: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """AUROC of every score, toxic against seemingly toxic, over seeds, per pair of forms and "balanced", their mean.

    Columns: reader, method, toxic_form, harmless_form, auroc, low, high, seeds. Intervals draw prompts, with their swapped
    twins, and seeds. Raises DCRError for seeds with prompts of different forms.
    """
    tables = []
    for column, (table, draws) in _over_seeds(scores, n_boot, seed).items():
        reader, method = column.split("@", 1)
        bounds = [percentiles(d) for d in draws.T]
        tables.append(
            table.assign(
                reader=reader,
                method=method,
                low=[b[0] for b in bounds],
                high=[b[1] for b in bounds],
            )
        )
    whole = pd.concat(tables, ignore_index=True)
    return whole[
        ["reader", "method", "toxic_form", "harmless_form", "auroc", "low", "high", "seeds"]
    ]


def score_differences(
    scores: pd.DataFrame, against: str, *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Balanced AUROC of every score minus that of the refusals of `against`, both on the same draws of prompts and seeds.

    Columns: reader, method, against, difference, low, high, seeds. Raises DCRError when `against` has no refusal probability.
    """
    over, reference = _over_seeds(scores, n_boot, seed), f"refusal@{against}"
    if reference not in over:
        known = [c.removeprefix("refusal@") for c in over if c.startswith("refusal@")]
        raise DCRError(
            f"score differences: no refusal probability of {against!r}; methods: {', '.join(known)}."
        )
    rows, (other, drawn) = [], over.pop(reference)
    for column, (table, draws) in over.items():
        reader, method = column.split("@", 1)
        low, high = percentiles(draws[:, -1] - drawn[:, -1])
        difference = table["auroc"].iloc[-1] - other["auroc"].iloc[-1]
        rows.append(
            {
                "reader": reader,
                "method": method,
                "against": against,
                "difference": difference,
                "low": low,
                "high": high,
                "seeds": table["seeds"].iloc[-1],
            }
        )
    return pd.DataFrame(rows)


def _over_seeds(
    scores: pd.DataFrame, n_boot: int, seed: int
) -> dict[str, tuple[pd.DataFrame, np.ndarray]]:
    """{column: (AUROC of each pair of forms, balanced last; its draws [n_boot, pairs])}; draws are alike for all columns."""
    rng = np.random.default_rng([seed, 0xA0C])
    counts = draw_prompts(scores[list(FACTS)], n_boot, rng)
    chosen: dict[int, np.ndarray] = {}  # number of seeds → which are drawn
    result = {}
    for column in _columns(scores):
        points, draws = [], []
        for _, rows in scores[scores[column].notna()].groupby("seed", sort=True):
            rows, drawn = rows.reset_index(drop=True), counts[rows["id"].map(unit_of)].to_numpy()
            values = rows[column].to_numpy(dtype=float)
            points.append(auroc_by_form(rows, values))
            draws.append(auroc_draws(rows, values, drawn, points[-1]))
        if len({len(p) for p in points}) > 1:
            raise DCRError(
                f"scores of {column}: the seeds have prompts of different forms; compare seeds of one profile."
            )
        picked = chosen.setdefault(len(points), draw_seeds(len(points), n_boot, rng))
        table = points[0][["toxic_form", "harmless_form"]].assign(
            auroc=np.mean([p["auroc"] for p in points], axis=0), seeds=len(points)
        )
        result[column] = table, np.stack(draws)[picked, :, np.arange(n_boot)[:, None]].mean(1)
    return result
