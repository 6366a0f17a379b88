"""What the notebooks share: checked parameters, escaped tables, and the explorers. No figure code here."""

from __future__ import annotations

import html
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dcr.book.explorer import explore, explore_answers  # noqa: F401  (notebooks take their explorers from here)
from dcr.config import load_config
from dcr.errors import DCRError
from dcr.run.experiment import Experiment

PARAMETERS = ("profile", "seed", "run_dir", "overrides")
_SIMPLE = (str, int, float, bool, list, dict)


def start(namespace: Mapping[str, object]) -> Experiment:
    """The experiment of a notebook's parameters; `namespace` is the notebook's globals().

    Raises DCRError for a parameter that no notebook has (papermill only warns of a misspelt -p).
    """
    own = {
        k: v
        for k, v in namespace.items()
        if not k.startswith("_")
        and isinstance(v, _SIMPLE)
        and k not in ("In", "Out", "NUMEXPR_MAX_THREADS")
    }
    unknown = sorted(set(own) - set(PARAMETERS))
    if unknown:
        raise DCRError(
            f"unknown notebook parameter {unknown[0]!r}; known: {', '.join(PARAMETERS)}."
        )
    profile, seed = own.get("profile", "quick"), own.get("seed", 0)
    if not isinstance(profile, str) or not isinstance(seed, int) or isinstance(seed, bool):
        raise DCRError(f"profile={profile!r} must be text and seed={seed!r} a whole number.")
    load_config(profile, seed=seed, overrides=own.get("overrides", ""))
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    return Experiment(
        profile,
        seed=seed,
        run_dir=own.get("run_dir", "") or default_run_dir(profile),
        overrides=own.get("overrides", ""),
    )


def default_run_dir(profile: str) -> Path:
    """runs/<profile> of the checkout, whatever folder the kernel was started in."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs" / profile


def show(table: pd.DataFrame, caption: str = "", digits: int = 2):
    """A table with every text escaped and a caption, for display."""
    plain = table.map(lambda v: html.escape(v) if isinstance(v, str) else v)
    styler = plain.style.format(precision=digits, na_rep="").hide(axis="index").set_uuid("t")
    return styler.set_caption(html.escape(caption)).set_table_styles(
        [
            {
                "selector": "caption",
                "props": "caption-side: top; text-align: left; font-weight: bold",
            },
            {"selector": "td, th", "props": "text-align: left; padding: 2px 8px; max-width: 34em"},
        ]
    )
