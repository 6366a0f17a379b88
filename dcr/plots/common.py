"""What every figure does: check its table, and make labelled axes in one layout."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dcr.errors import DCRError


def need(table: pd.DataFrame, *columns: str) -> None:
    """Raise DCRError when columns or rows are missing, or profiles are mixed."""
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise DCRError(f"figure data: {'no rows' if table.empty else 'no column ' + ', '.join(missing)}; run the notebook "
                       "that writes this table first.")
    if "profile" in table and table["profile"].nunique() > 1:
        raise DCRError(f"figure data mixes profiles {sorted(table['profile'].unique())}; draw one profile at a time.")


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs):
    """(figure, axes [rows, columns]) of a size in inches; kwargs go to `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)
