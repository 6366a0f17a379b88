"""What every notebook starts with: its checked parameters, and tables with every text escaped."""

import ast
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dcr.config import near
from dcr.errors import DCRError
from dcr.plots.tables import styled
from dcr.study.experiment import Experiment

PARAMETERS: dict[str, Any] = {"profile": str, "seeds": (str, int), "run_dir": str, "overrides": str}
INJECTED = "# Parameters\n"  # how the cell begins that papermill adds for its -p


def injected(cells: Iterable[str]) -> list[str]:
    """Names that papermill set: what the last cell that it added to this kernel assigns."""
    added = [c for c in cells if c.startswith(INJECTED)][-1:]
    nodes = [n for cell in added for n in ast.parse(cell).body if isinstance(n, ast.Assign)]
    return [t.id for node in nodes for t in node.targets if isinstance(t, ast.Name)]


def start(namespace: Mapping[str, object]) -> Experiment:
    """The experiment of a notebook's parameters; `namespace` is the notebook's globals().

    Only the parameters are looked at, and what papermill was told to set; other variables (a
    startup file's, a reader's own, those of an earlier run of the cells) are left alone.
    Raises DCRError for a parameter that no notebook has (papermill only warns) or of a wrong type.
    """
    known = ", ".join(PARAMETERS)
    for name in injected(namespace.get("In", ())):  # type: ignore[arg-type]
        if name not in PARAMETERS:
            hint = near(name, list(PARAMETERS))
            raise DCRError(f"unknown notebook parameter {name!r}; known: {known}.{hint}")
    given: dict[str, Any] = {name: namespace[name] for name in PARAMETERS if name in namespace}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, PARAMETERS[name]):
            kind = 'a number or text such as "0-4"' if name == "seeds" else "text"
            mend = f"papermill passes text with -r {name} VALUE"
            raise DCRError(f"notebook parameter {name}={value!r} must be {kind}; {mend}.")
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    return Experiment(**({"profile": "reference"} | given))


show = styled  # as notebooks call it
