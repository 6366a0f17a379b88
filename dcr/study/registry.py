"""Two registries under one name: tables, `experiment -> DataFrame`; figures, `DataFrame -> Figure`.

Notebooks, report, README and tests go through these; nothing else knows the names. Modules that
register are entry points of the group "dcr.registry", so a package outside can add its own.
"""

import difflib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dcr.errors import DCRError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

GROUP = "dcr.registry"
OWN = ("dcr.tables", "dcr.plots")  # also where a checkout runs without being installed
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Table:
    """How one table is made, and which notebook shows it."""

    make: Callable[[Any], "pd.DataFrame"]
    notebook: str


@dataclass(frozen=True)
class Drawing:
    """How the figure of a table is drawn; the caption names what an interval or band is."""

    draw: Callable[["pd.DataFrame"], "Figure"]
    caption: str


TABLES: dict[str, Table] = {}
FIGURES: dict[str, Drawing] = {}


def table(name: str, *, notebook: str = "") -> Callable[[F], F]:
    """Register `experiment -> DataFrame` under `name`. Raises DCRError for a name that is taken."""
    return lambda make: _added(make, TABLES, name, Table(make, notebook))


def figure(name: str, *, caption: str) -> Callable[[F], F]:
    """Register `DataFrame -> Figure` under its table's name. Raises DCRError for a taken one."""
    return lambda draw: _added(draw, FIGURES, name, Drawing(draw, caption))


def _added(function: F, registry: dict, name: str, entry: object) -> F:
    known = registry.get(name)
    if known is not None:
        before = getattr(known, "make", None) or known.draw
        if (before.__module__, before.__qualname__) != (function.__module__, function.__qualname__):
            raise DCRError(
                f"{name!r} is registered already, by {before.__module__}; choose another name."
            )
    registry[name] = entry
    return function


@functools.cache
def load_all() -> None:
    """Import every module that registers tables and figures."""
    for name in (*OWN, *(entry.value for entry in entry_points(group=GROUP))):
        import_module(name)


def table_entry(name: str) -> Table:
    """The table's entry. Raises DCRError listing near names."""
    return _known(TABLES, name, "table")


def figure_entry(name: str) -> Drawing:
    """The figure's entry. Raises DCRError listing near names."""
    return _known(FIGURES, name, "figure")


def _known(registry: dict, name: str, what: str):
    load_all()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, 3)
        listed = ", ".join(near or sorted(registry))
        raise DCRError(
            f"{what} {name!r} is unknown; {'did you mean' if near else 'known'}: {listed}."
        )
    return registry[name]


def read_table(path: Path, text: str = "") -> "pd.DataFrame":
    """A table as it was written (or is, in `text`): floats to the bit, "" alone is missing.

    Raises DCRError naming the file where it is missing or no table.
    """
    import pandas as pd

    try:
        source = io.StringIO(text) if text else path
        how: dict[str, Any] = {"float_precision": "round_trip", "keep_default_na": False}
        return pd.read_csv(source, na_values=[""], **how)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DCRError(
            f"{path}: no table ({reason}). Delete it and make it again: dcr table {path.stem}."
        ) from error
