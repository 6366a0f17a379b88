"""Tables from metric rows alone: Table 1 beside the paper's, general ability, response quality, cost."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dcr.errors import DCRError
from dcr.evaluate.rates import balanced, classes, mean_over, one_profile, plane_points, published
from dcr.evaluate.seeds import over_seeds

__all__ = [
    "ability_table",
    "beside_paper",
    "cost_table",
    "paper_table",
    "plane_points",
    "quality_table",
    "table1",
    "wide",
]
BOLD = "**"
PAPER = Path(__file__).parent.parent / "data" / "bundled" / "paper_table1.csv"
OVER_REFUSAL_SETS = ("xstest-safe", "coconot", "or-bench", "oktest", "phtest")
# The paper's five safety sets are inferred (PAPER mark I): HarmfulQ there, Q-Harm here.
SAFETY_SETS = ("i-malicious", "i-cona", "i-controversial", "q-harm", "advbench")
SHORT = {"dsr": "DSR", "compliance": "compl."}
UP, DOWN = "↑", "↓"
PAPER_IN_DISTRIBUTION = {
    ("DCR", "xstest-safe"),
    ("Surgical", "or-bench"),
}  # what those methods trained on


def paper_table() -> pd.DataFrame:
    """The paper's Table 1 as far as it is known (mark N: secondary reading notes); unknown cells are missing."""
    return pd.read_csv(PAPER)


def table1(rows: pd.DataFrame, form: str = "all") -> pd.DataFrame:
    """Method × benchmark: value, low, high, n, seeds, in_distribution, best, from metric rows of one profile (last step).

    Compliance for harmless sets, DSR for toxic ones; `mean compliance` and `mean DSR` average sets equally, sets that the
    method trained on included, and `mean compliance, out of distribution` without those that any method trained on.
    Seeds are averaged. Raises DCRError when profiles are mixed.
    """
    one_profile(rows, "table")
    part = (
        published(rows)
        if form == "all"
        else balanced(rows)
        if form == "balanced"
        else rows[rows["form"] == form]
    )
    part = part[part["metric"].isin(["compliance", "dsr"])]
    if part.empty:
        raise DCRError(
            f"table 1: no rows for form {form!r}; known: {sorted(rows['form'].unique())}."
        )
    kind = classes(part)
    part = over_seeds(part.assign(in_distribution=part["in_distribution"].astype(bool)))
    sets = part[part["benchmark"].map(kind) != "general"]
    means = [
        mean_over(sets, ["method", "metric"]).assign(
            benchmark=lambda t: t["metric"].map(
                {"dsr": "mean DSR", "compliance": "mean compliance"}
            )
        )
    ]
    trained = set(part.loc[part["in_distribution"], "benchmark"])
    outside = sets[~sets["benchmark"].isin(trained) & (sets["metric"] == "compliance")]
    if trained and len(outside):
        means.append(
            mean_over(outside, ["method", "metric"]).assign(
                benchmark="mean compliance, out of distribution"
            )
        )
    means = pd.concat(means, ignore_index=True)
    table = pd.concat(
        [part, means.assign(in_distribution=False, seeds=part["seeds"].max())], ignore_index=True
    )
    best = table.groupby("benchmark")["value"].transform("max")
    table = table.assign(best=table["value"] >= best - 1e-9)
    order = sorted(dict.fromkeys(table["benchmark"]), key=lambda b: _place(b, kind))
    return table.sort_values("benchmark", key=lambda c: c.map(order.index), kind="stable")[
        [
            "method",
            "benchmark",
            "metric",
            "value",
            "low",
            "high",
            "n",
            "seeds",
            "in_distribution",
            "best",
        ]
    ]


def _place(benchmark: str, kind: dict[str, str]) -> int:
    """Column groups: means first, harmless sets, general sets, toxic sets."""
    return (
        0
        if benchmark.startswith("mean")
        else {"seemingly_toxic": 1, "general": 2, "toxic": 3}[kind[benchmark]]
    )


def cell(row, marks: tuple[str, str] = (BOLD, BOLD)) -> str:
    """ "0.85 [0.79, 0.90]†" with the best value between marks; † in-distribution."""
    value = f"{row.value:.2f}"
    value = f"{marks[0]}{value}{marks[1]}" if row.best else value
    return f"{value} [{row.low:.2f}, {row.high:.2f}]" + (
        "†" if getattr(row, "in_distribution", False) else ""
    )


def wide(table: pd.DataFrame, marks: tuple[str, str] = (BOLD, BOLD)) -> pd.DataFrame:
    """One row a method, one column a benchmark (with the measure, its direction and n)."""
    n = table.groupby("benchmark")["n"].agg(
        lambda n: f"{n.min()}" if n.min() == n.max() else f"{n.min()}-{n.max()}"
    )
    shown = table.assign(
        cell=[cell(r, marks) for r in table.itertuples()],
        column=[
            f"{r.benchmark} {UP}"
            if r.benchmark.startswith("mean")
            else f"{r.benchmark} {SHORT.get(r.metric, r.metric)} {UP} (n={n[r.benchmark]})"
            for r in table.itertuples()
        ],
    )
    result = shown.pivot(index="method", columns="column", values="cell")[
        list(dict.fromkeys(shown["column"]))
    ]
    return result.reindex(_once(table["method"])).fillna("").rename_axis(columns=None)


def beside_paper(table: pd.DataFrame, model: str = "SmolLM2-135M-Instruct") -> pd.DataFrame:
    """Ours and the paper's compliance and safety, one row a (source, model, method); unknown cells stay blank.

    The best value of each model's block is bold; † marks sets that the method trained on.
    """
    ours = table[table["benchmark"].isin([*OVER_REFUSAL_SETS, *SAFETY_SETS])]
    rows = []
    for method in _once(table["method"]):
        part = ours[ours["method"] == method]
        safety = part[part["benchmark"].isin(SAFETY_SETS)].assign(
            benchmark="safety", in_distribution=False
        )
        if len(safety) == len(SAFETY_SETS):
            safety = mean_over(safety, ["method", "benchmark"])
        else:
            safety = safety.head(0)
        both = pd.concat([part[part["benchmark"].isin(OVER_REFUSAL_SETS)], safety]).set_index(
            "benchmark"
        )
        rows.append(
            {
                "source": "this run",
                "model": model,
                "method": method,
                "mark": "",
                **both["value"].to_dict(),
                **{f"{b} interval": f" [{r.low:.2f}, {r.high:.2f}]" for b, r in both.iterrows()},
                **{f"{b} trained": bool(r.in_distribution) for b, r in both.iterrows()},
            }
        )
    paper = paper_table().assign(source="the paper's (secondary notes)")
    whole = pd.concat([pd.DataFrame(rows), paper], ignore_index=True)
    for name in (*OVER_REFUSAL_SETS, "safety"):
        values = pd.to_numeric(whole.get(name, pd.Series(index=whole.index, dtype=float)))
        best = values == values.groupby([whole["source"], whole["model"]]).transform("max")
        trained = [
            name_trained is True or (m, name) in PAPER_IN_DISTRIBUTION and source != "this run"
            for name_trained, m, source in zip(
                whole.get(f"{name} trained", pd.Series(index=whole.index, dtype=object)),
                whole["method"],
                whole["source"],
                strict=True,
            )
        ]
        interval = whole.get(f"{name} interval", pd.Series("", index=whole.index)).fillna("")
        whole[name] = [
            "" if v != v else (f"{BOLD}{v:.2f}{BOLD}" if b else f"{v:.2f}") + i + ("†" if t else "")
            for v, b, i, t in zip(values, best, interval, trained, strict=True)
        ]
    kept = whole[["source", "model", "method", *OVER_REFUSAL_SETS, "safety", "mark"]].fillna("")
    return kept.rename(columns={c: f"{c} {UP}" for c in (*OVER_REFUSAL_SETS, "safety")})


def ability_table(rows: pd.DataFrame) -> pd.DataFrame:
    """General ability, method × task (columns method, task, metric, value, low, high, n): best bold, intervals, n."""
    _need(rows, "capabilities", "method", "task", "metric", "value", "low", "high", "n")
    one_profile(rows, "table")
    rows = over_seeds(rows).assign(benchmark=lambda t: t["task"], in_distribution=False)
    sign = rows["metric"].map(lambda m: -1.0 if m == "perplexity" else 1.0)
    best = (sign * rows["value"]).groupby([rows["benchmark"], rows["metric"]]).transform("max")
    table = wide(rows.assign(best=sign * rows["value"] >= best - 1e-9))
    return table.rename(columns=lambda c: c.replace(UP, DOWN) if " perplexity " in c else c)


def quality_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Response quality, method × measure (columns method, metric, value; low, high, n where known), the paper's win rates beside.

    The best value is bold where more is better (win rates and scores).
    """
    if {"measure", "prompts"} <= set(rows):
        rows = rows.assign(
            metric=rows["prompts"].str.replace("_", " ")
            + ": "
            + rows["measure"].str.replace("_", " ")
        )
    _need(rows, "quality", "method", "metric", "value")
    one_profile(rows, "table")
    rows = over_seeds(rows)
    best = rows.groupby("metric")["value"].transform("max")
    texts = [
        f"{BOLD}{r.value:.2f}{BOLD}"
        if r.value >= b - 1e-9 and _more_is_better(r.metric)
        else f"{r.value:.2f}"
        for r, b in zip(rows.itertuples(), best, strict=True)
    ]
    if {"low", "high"} <= set(rows):
        texts = [
            t if r.low != r.low else f"{t} [{r.low:.2f}, {r.high:.2f}]"
            for t, r in zip(texts, rows.itertuples(), strict=True)
        ]
    column = [f"{m} {UP}" if _more_is_better(m) else m for m in rows["metric"]]
    shown = rows.assign(cell=texts, column=column)
    result = shown.pivot_table(
        index="method", columns="column", values="cell", aggfunc="first", sort=False
    )
    paper = paper_table().dropna(subset=["win_rate_vs_stl"])
    for model, part in paper.groupby("model", sort=False):
        rates = part.set_index("method")["win_rate_vs_stl"].map("{:.1f}".format)
        result = result.join(
            rates.rename(f"paper (N), {model}: AlpacaEval win rate against STL, % {UP}"),
            how="outer",
        )
    return (
        result.reindex(_once([*rows["method"], *paper["method"]]))
        .fillna("")
        .rename_axis(columns=None)
    )


def _more_is_better(metric: str) -> bool:
    return any(word in metric for word in ("win", "score", "quality", "helpful", "overlap"))


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Wall time (s) of each stage and peak memory (MiB), a row a method (columns name, kind, seconds, peak_memory_mib)."""
    _need(rows, "cost", "name", "kind", "seconds", "peak_memory_mib")
    rows = over_seeds(rows)
    stages = [k for k in ("refine", "align", "steer", "generate") if k in set(rows["kind"])]
    stages += [k for k in dict.fromkeys(rows["kind"]) if k not in stages]
    seconds = rows.pivot_table(index="name", columns="kind", values="seconds", aggfunc="sum")[
        stages
    ]
    table = seconds.rename(columns={k: f"{k}, s {DOWN}" for k in stages})
    table[f"all, s {DOWN}"] = seconds.sum(axis=1)
    table[f"peak memory, MiB {DOWN}"] = rows.groupby("name")["peak_memory_mib"].max()
    shown = table.reindex(_once(rows["name"])).rename_axis(index="method", columns=None)
    return shown.map(lambda v: "" if v != v else f"{v:.0f}" if v >= 10 else f"{v:.1f}")


def _need(rows: pd.DataFrame, what: str, *columns: str) -> None:
    missing = [c for c in columns if c not in rows]
    if missing or rows.empty:
        raise DCRError(
            f"table {what}: {'no rows' if rows.empty else 'no column ' + ', '.join(missing)}; run the notebook that writes it."
        )


def _once(names) -> list:
    return list(dict.fromkeys(names))
