"""Notebook 06: grids of recipes, a row a cell and seed, failures too; validation prompts only."""

from __future__ import annotations

import pandas as pd

from dcr.run import grid
from dcr.run.experiment import Experiment
from dcr.run.registry import table


@table("ablations", notebook="06_ablations")
def ablations(experiment: Experiment) -> pd.DataFrame:
    """The profile's own grid of recipes, run where it has not run."""
    return grid.run_grid(grid.grid_for(experiment.config.profile), experiment.root)


@table("search", notebook="06_ablations")
def search(experiment: Experiment) -> pd.DataFrame:
    """The search for a recipe, as far as it has run in this directory (`dcr grid search`)."""
    return grid.collect(grid.load_grid("search"), experiment.root)
