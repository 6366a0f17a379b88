"""Every question that the kit asks of an experiment: a registered function a table."""

from dcr.tables import (  # noqa: F401  (importing registers)
    ablations,
    alignment,
    checks,
    evaluation,
    frontier,
    refinement,
    representations,
)
