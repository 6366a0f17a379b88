"""Notebook 06: grids of recipes, a row a cell and seed, failures too; validation prompts only."""

from __future__ import annotations

import pandas as pd

from dcr.errors import DCRError
from dcr.study import grid
from dcr.study.experiment import Experiment
from dcr.study.registry import table


@table("ablations", notebook="06_ablations")
def ablations(experiment: Experiment) -> pd.DataFrame:
    """The profile's own grid of recipes, run where it has not run; else `ablations`, if it ran.

    Raises DCRError naming the command where a profile without a grid of its own has run none.
    """
    profile = experiment.config.profile
    wanted = grid.grid_for(profile)
    if (grid.GRIDS / f"{profile}.yaml").exists():
        return grid.run_grid(wanted, experiment.root)
    rows = grid.collect(wanted, experiment.root)
    if (rows["status"] == "missing").all():
        raise DCRError(
            f"no grid of recipes has run in {experiment.root}: dcr grid ablations "
            f"--profile {profile} --run-dir {experiment.root} runs it (hours)."
        )
    return rows


@table("search", notebook="06_ablations")
def search(experiment: Experiment) -> pd.DataFrame:
    """The search for a recipe, as far as it has run in this directory (`dcr grid search`)."""
    return grid.collect(grid.load_grid("search"), experiment.root)
