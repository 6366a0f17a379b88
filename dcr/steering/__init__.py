"""Methods that act beside the weights, or edit them in closed form.

Each is a small frozen object that is fitted, kept as `facts` and `tensors`, run by `generate` and
`refusal_score`, and scored. `KINDS` names them as methods.yaml does.
"""

from typing import Any

from dcr.steering.gate import Gate
from dcr.steering.scans import Scans
from dcr.steering.surgical import Surgical
from dcr.steering.tied import Tied
from dcr.steering.tokens import DecisionToken, TokenGate

KINDS: dict[str, Any] = {
    "scans": Scans,
    "surgical": Surgical,
    "gate": Gate,
    "token": DecisionToken,
    "token+gate": TokenGate,
    "tied": Tied,
}

__all__ = ["KINDS", "DecisionToken", "Gate", "Scans", "Surgical", "Tied", "TokenGate"]
