"""Evaluation figures draw the numbers of their tables; what was not reached is written, not drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dcr.errors import DCRError
from dcr.plots import evaluation
from dcr.plots.style import picture


def test_matched_safety_draws_values_and_writes_reasons():
    table = pd.DataFrame(
        {
            "method": ["STL", "DCR"],
            "quantity": "compliance",
            "target": 0.8,
            "compliance": [0.4, np.nan],
            "low": [0.3, np.nan],
            "high": [0.5, np.nan],
            "reason": ["", "not reached (highest DSR 0.62)"],
        }
    )
    figure = evaluation.matched_safety(table)
    axis = figure.axes[0]
    assert [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1][0] == 0.4
    assert [t.get_text() for t in axis.texts] == ["not reached (highest DSR 0.62)"] and picture(
        figure, "png"
    )[:4] == b"\x89PNG"


def test_frontier_robustness_and_ability():
    sweep = pd.DataFrame(
        {
            "method": "DCR",
            "bias": [-1.0, 0.0, 1.0],
            "dsr": [0.1, 0.5, 0.9],
            "compliance": [0.9, 0.6, 0.2],
        }
    )
    lines = evaluation.bias_frontier(sweep).axes[0].lines
    assert lines[0].get_xdata().tolist() == [0.1, 0.5, 0.9] and lines[1].get_ydata().tolist() == [
        0.6
    ]
    robust = pd.DataFrame(
        [
            {
                "method": "DCR",
                "label": lb,
                "wrapper": w,
                "refusal_rate": 0.5,
                "low": 0.4,
                "high": 0.6,
            }
            for lb in ("toxic", "seemingly_toxic")
            for w in ("plain", "polite")
        ]
    )
    assert [t.get_text() for t in evaluation.robustness(robust).axes[0].get_yticklabels()] == [
        "plain",
        "polite",
    ]
    ability = pd.DataFrame(
        {
            "method": ["base", "DCR", "DCR"],
            "task": ["piqa", "piqa", "held-out answers"],
            "metric": ["acc", "acc", "perplexity"],
            "change": [0.0, -0.02, 1.1],
            "change_low": [0.0, -0.05, 1.0],
            "change_high": [0.0, 0.01, 1.2],
        }
    )
    assert len(evaluation.ability(ability).axes) == 2
    with pytest.raises(DCRError, match="no rows"):
        evaluation.ability(ability[ability["method"] == "base"])
