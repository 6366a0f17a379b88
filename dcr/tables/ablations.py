"""Notebook 06: grids of recipes (validation prompts only), and where each method stands."""

import pandas as pd

from dcr.errors import DCRError
from dcr.study import grid
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.checks import STAGES

ANSWERS = {  # what is generated at the nominal operating point
    "toxic dsr": "nominal: DSR ↑",
    "seemingly_toxic compliance": "nominal: compliance ↑",
    "seemingly_toxic degenerate_share": "nominal: degenerate answers to harmless prompts ↓",
}


@table("ablations", notebook="06_ablations")
def ablations(experiment: Experiment) -> pd.DataFrame:
    """The profile's own grid of recipes, run where it has not run; else `ablations`, if it ran.

    Raises DCRError naming the command where a profile without a grid of its own has run none.
    """
    profile = experiment.config.profile
    wanted = grid.grid_for(experiment.config)
    if (grid.GRIDS / f"{profile}.yaml").exists() and not experiment.store.complete:
        return grid.run_grid(wanted, experiment.root)
    rows = grid.collect(wanted, experiment.root)
    if (rows["status"] == "missing").all():
        changed = ",".join(f"{k}={v}" for k, v in grid.changes(experiment.config).items())
        raise DCRError(
            f"no grid of recipes has run in {experiment.root}: dcr grid ablations "
            f"--profile {profile} --run-dir {experiment.root}"
            + (f' --overrides "{changed}"' if changed else "")
            + " runs it (hours)."
        )
    return rows


@table("search", notebook="06_ablations")
def search(experiment: Experiment) -> pd.DataFrame:
    """The search for a recipe, as far as it has run in this directory (`dcr grid search`)."""
    return grid.collect(grid.load_grid("search"), experiment.root)


@table("standing", notebook="06_ablations")
def standing(experiment: Experiment) -> pd.DataFrame:
    """What the protocol asks of each method, a column a measure; each number from its own table.

    General ability is the paired change from STL; robustness the change of toxic prompts refused
    under the rewording that costs most; seconds are those of what a method trains or fits itself,
    a seed (not of what it steers), answering relative to base's.
    """
    at = experiment.table("frontier").rename(columns={"compliance": "value"})
    parts = [at.assign(column=at["target"].map("compliance at DSR {:.2f} ↑".format))]
    given = at.assign(column=at["target"].map("DSR on test prompts, set to {:.2f} ↑".format))
    parts.append(_as_value(given, "dsr"))
    if "general" in at:
        through = at.assign(column=at["target"].map("general let through at DSR {:.2f} ↑".format))
        parts.append(_as_value(through, "general"))
    mean = experiment.table("auroc_by_source").query("source == 'mean'")
    forms = mean["toxic_form"] + " / " + mean["harmless_form"]
    mean = mean.assign(column=("AUROC, toxic / harmless: " + forms + " ↑"), value=mean["auroc"])
    parts.append(mean.replace({"column": {"balanced / balanced": "forms equal"}}, regex=True))
    rows = experiment.table("rates").query("benchmark == 'mean' and version == 'both'")
    rows = rows[rows["form"] == "balanced"]
    named = (rows["label"] + " " + rows["metric"]).map(ANSWERS)
    parts.append(rows.assign(column=named).dropna(subset="column"))
    rows = experiment.table("table1").query("metric == 'general'")
    parts.append(rows.assign(column="general answered ↑"))
    rows = experiment.table("ability").query("against == 'STL' and metric == 'acc'")
    parts.append(_as_value(rows, "change").assign(column=rows["task"] + ", less STL's ↑"))
    rows = experiment.table("robustness").query("label == 'toxic' and wrapper != 'plain'")
    rows = rows.loc[rows.groupby("method", sort=False)["change"].idxmin()]
    parts.append(_as_value(rows, "change").assign(column="toxic refused, worst rewording ↑"))
    cost = experiment.table("cost").pivot_table("seconds", "method", "kind")  # mean of seeds
    cost = cost.reindex(columns=STAGES)
    made = cost[["refine", "align", "fit"]].sum(axis=1, min_count=1)
    said = cost["generate"]
    for name, seconds in (
        ("training, s ↓", made),
        ("answering, times base's ↓", said / said.get("base", float("nan"))),
    ):
        parts.append(seconds.rename("value").dropna().reset_index().assign(column=name))
    whole = pd.concat(parts, ignore_index=True)
    return whole[["method", "column", "value", "low", "high", "n", "seeds"]]


def _as_value(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows whose value and interval are those of a column of theirs."""
    names = {name: "value", f"{name}_low": "low", f"{name}_high": "high"}
    return rows.drop(columns=list(names.values())).rename(columns=names)
