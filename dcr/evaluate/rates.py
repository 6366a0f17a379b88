"""Metric rows as figures and tables need them: published sets, forms pooled, means over sets, points of the plane."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dcr.errors import DCRError

SWAPPED = "/swapped"
FORMS = ("question", "imperative")
KEYS = ["profile", "method", "seed", "judge", "step"]


def one_profile(rows: pd.DataFrame, what: str) -> None:
    """Raise DCRError when `rows` come from more than one profile."""
    if "profile" in rows and rows["profile"].nunique() > 1:
        raise DCRError(
            f"{what} mixes profiles {sorted(rows['profile'].unique())}; make one {what} a profile."
        )


def classes(rows: pd.DataFrame) -> dict[str, str]:
    """Class of each benchmark: toxic where a DSR was measured, general by name, seemingly toxic otherwise."""
    toxic = set(rows.loc[rows["metric"] == "dsr", "benchmark"])
    return {
        b: "toxic"
        if b in toxic
        else "general"
        if b.startswith(("general", "i-alpaca"))
        else "seemingly_toxic"
        for b in dict.fromkeys(rows["benchmark"])
    }


def published(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sets as they are published: all prompts, swapped versions out."""
    return rows[(rows["form"] == "all") & ~rows["benchmark"].str.endswith(SWAPPED)]


def by_form(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of questions and imperatives, a set pooled with its form-swapped version by the number of prompts."""
    part = rows[rows["form"].isin(FORMS)].copy()
    part["benchmark"] = part["benchmark"].str.removesuffix(SWAPPED)
    keys = [k for k in (*KEYS, "benchmark", "metric", "form") if k in part]
    for name in ("value", "low", "high"):
        part[name] = part[name] * part["n"]
    pooled = part.groupby(keys, sort=False, dropna=False).agg(
        value=("value", "sum"),
        low=("low", "sum"),
        high=("high", "sum"),
        n=("n", "sum"),
        in_distribution=("in_distribution", "max"),
    )
    for name in ("value", "low", "high"):
        pooled[name] /= pooled["n"]
    return pooled.reset_index()


def balanced(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows averaged equally over questions and imperatives, of the sets (with their swapped versions) that have both."""
    part = by_form(rows)
    keys = [k for k in (*KEYS, "benchmark", "metric") if k in part]
    part = part[part.groupby(keys, dropna=False)["form"].transform("nunique") == len(FORMS)]
    return mean_over(part, keys).assign(form="balanced")


def mean_over(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Equal-weight mean of the rows of each key (sets or forms), with a normal interval from their own; n is summed."""
    part = rows.assign(half=((rows["high"] - rows["low"]) / 2) ** 2)
    mean = (
        part.groupby(keys, sort=False, dropna=False)
        .agg(
            value=("value", "mean"),
            half=("half", "sum"),
            count=("value", "size"),
            n=("n", "sum"),
            in_distribution=("in_distribution", "max"),
        )
        .reset_index()
    )
    half = np.sqrt(mean.pop("half")) / mean.pop("count")
    return mean.assign(
        low=(mean["value"] - half).clip(lower=0), high=(mean["value"] + half).clip(upper=1)
    )


def plane_points(rows: pd.DataFrame, form: str = "all") -> pd.DataFrame:
    """Mean DSR and mean compliance, each with low and high, of each method (seed) and step; sets count equally.

    form "all": the published sets; "balanced": questions and imperatives weighted equally. General sets stay out.
    """
    part = published(rows) if form == "all" else balanced(rows)
    kind = classes(part)
    part = part[
        part["metric"].isin(["compliance", "dsr"]) & (part["benchmark"].map(kind) != "general")
    ]
    keys = [k for k in ("profile", "method", "seed", "step") if k in part]
    if part.empty:
        return pd.DataFrame(columns=[*keys, "dsr", "compliance"])
    mean = mean_over(part, [*keys, "metric"]).pivot(
        index=keys, columns="metric", values=["value", "low", "high"]
    )
    mean = mean.dropna()
    mean.columns = [
        metric if name == "value" else f"{metric}_{name}" for name, metric in mean.columns
    ]
    if "dsr" not in mean or "compliance" not in mean:
        return pd.DataFrame(columns=[*keys, "dsr", "compliance"])
    points = mean.reset_index()
    if (
        "step" in points
    ):  # the point a method is known by: its last step, or a steering method's nominal strength
        steered = set(rows.loc[rows["strength"].notna(), "method"]) if "strength" in rows else set()
        last = points.groupby("method")["step"].transform("max")
        points["nominal"] = points["step"] == last.where(~points["method"].isin(steered), 100)
    return points


def class_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean refusal rate of each class over its published sets, of each method (seed) and step."""
    kind = classes(rows)
    part = published(rows[rows["metric"] == "refusal_rate"])
    part = part.assign(label=part["benchmark"].map(kind))
    return mean_over(
        part, [k for k in ("profile", "method", "seed", "step") if k in part] + ["label"]
    )
