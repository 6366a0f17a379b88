"""One function a figure: tidy frame in, matplotlib Figure out; it reads a table, never a model."""

from dcr.plots import ablations, alignment, evaluation, refinement, representations

__all__ = ["ablations", "alignment", "evaluation", "refinement", "representations"]
