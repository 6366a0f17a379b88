"""Training-free peers on top of an aligned model: SCANS, Surgical.

Each is a small frozen object with `settings`, `at(strength)` and `start`; `dcr.lm.generate.generate(..., steering=it)`
runs it. Hooks come off on exit, so the model is untouched afterwards.
"""

from dcr.steering.hooks import ablated, shifted
from dcr.steering.scans import Scans, choose_threshold, fit_scans
from dcr.steering.surgical import Surgical, fit_surgical

__all__ = [
    "Scans",
    "Surgical",
    "ablated",
    "choose_threshold",
    "fit_scans",
    "fit_surgical",
    "shifted",
]
