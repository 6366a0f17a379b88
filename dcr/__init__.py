"""dcr: contrastive refinement against over-refusal, with the analysis and evaluation around it.

Names load on first use, so `import dcr` costs nothing.
"""

import importlib
import os

# What Apple's GPU lacks runs on the CPU; torch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
__version__ = "0.1.0"
_NAMES = {
    "Experiment": "dcr.study.experiment",
    "load_config": "dcr.config",
    "RefineConfig": "dcr.config",
    "AlignConfig": "dcr.config",
    "DCRError": "dcr.errors",
    "load_model": "dcr.lm.load",
    "refine": "dcr.train.refine",
    "align": "dcr.train.align",
    "generate": "dcr.lm.generate",
    "judge": "dcr.evaluate.judges",
    "entk": "dcr.analysis.kernel",
    "refusal_probability": "dcr.analysis.refusal",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(
            f"module 'dcr' has no attribute {name!r}; it exports {', '.join(_NAMES)}"
        )
    module = importlib.import_module(_NAMES[name])
    value = getattr(module, "load" if name == "load_model" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
