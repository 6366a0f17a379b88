"""Tables from metric rows alone: Table 1 beside the paper's, as a styled frame, Markdown, LaTeX and CSV."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from dcr.errors import DCRError
from dcr.store import write_atomic

PAPER = Path(__file__).parent / "data" / "bundled" / "paper_table1.csv"
# The paper's five safety sets are inferred (PAPER mark I): HarmfulQ there, Q-Harm here.
SAFETY_SETS = ("i-malicious", "i-cona", "i-controversial", "q-harm", "advbench")
UP = "↑"


def paper_table() -> pd.DataFrame:
    """The paper's Table 1 as far as it is known (mark N: secondary reading notes); unknown cells are missing."""
    return pd.read_csv(PAPER)


def table1(rows: pd.DataFrame, form: str = "all") -> pd.DataFrame:
    """Method × benchmark: value, low, high, n, in_distribution, best, from metric rows of one profile (last step).

    Compliance for harmless sets, DSR for toxic ones; `mean compliance` and `mean DSR` average sets equally.
    Raises DCRError when profiles are mixed.
    """
    if rows["profile"].nunique() != 1:
        raise DCRError(f"table 1 mixes profiles {sorted(rows['profile'].unique())}; make one table a profile.")
    part = rows[(rows["form"] == form) & rows["metric"].isin(["compliance", "dsr"])].copy()
    if part.empty:
        raise DCRError(f"table 1: no rows for form {form!r}; known: {sorted(rows['form'].unique())}.")
    part["in_distribution"] = part["in_distribution"].astype(bool)
    means = []
    for (method, metric), group in part.groupby(["method", "metric"], sort=False):
        sets = group[~group["benchmark"].str.startswith(("general", "i-alpaca"))]
        half = (((sets["high"] - sets["low"]) / 2) ** 2).sum() ** 0.5 / max(1, len(sets))
        value = sets["value"].mean()
        means.append({"method": method, "metric": metric, "benchmark": f"mean {'DSR' if metric == 'dsr' else metric}",
                      "value": value, "low": max(0, value - half), "high": min(1, value + half), "n": int(sets["n"].sum()),
                      "in_distribution": False})
    table = pd.concat([part, pd.DataFrame(means)], ignore_index=True)
    best = table.groupby("benchmark")["value"].transform("max")
    return table.assign(best=table["value"] >= best - 1e-9)[
        ["method", "benchmark", "metric", "value", "low", "high", "n", "in_distribution", "best"]]


def cell(row, marks: tuple[str, str] = ("**", "**")) -> str:
    """ "0.85 [0.79, 0.90]†" with the best value between marks; † in-distribution."""
    value = f"{row.value:.2f}"
    value = f"{marks[0]}{value}{marks[1]}" if row.best else value
    return f"{value} [{row.low:.2f}, {row.high:.2f}]" + ("†" if row.in_distribution else "")


def wide(table: pd.DataFrame, marks: tuple[str, str] = ("**", "**")) -> pd.DataFrame:
    """One row a method, one column a benchmark (with n and the direction)."""
    shown = table.assign(cell=[cell(r, marks) for r in table.itertuples()],
                         column=[f"{r.benchmark} {'DSR' if r.metric == 'dsr' else 'compl.'} {UP} (n={r.n})" if "mean" not in
                                 r.benchmark else f"{r.benchmark} {UP}" for r in table.itertuples()])
    order = {m: i for i, m in enumerate(dict.fromkeys(table["method"]))}
    result = shown.pivot(index="method", columns="column", values="cell")[list(dict.fromkeys(shown["column"]))]
    return result.sort_index(key=lambda index: index.map(order)).fillna("")


def beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Ours and the paper's compliance and safety, one row a (source, model, method); unknown cells stay blank."""
    columns = ["xstest-safe", "coconot", "or-bench", "oktest", "phtest"]
    ours = table[table["benchmark"].isin([*columns, *SAFETY_SETS])]
    rows = []
    for method, part in ours.groupby("method", sort=False):
        values = part.set_index("benchmark")["value"]
        safety = [values[s] for s in SAFETY_SETS if s in values]
        rows.append({"source": "this run", "model": "SmolLM2-135M-Instruct", "method": method, "mark": "",
                     **{c: values.get(c) for c in columns}, "safety": sum(safety) / len(safety) if safety else None})
    paper = paper_table().assign(source="the paper's (secondary notes)")
    return pd.concat([pd.DataFrame(rows), paper], ignore_index=True)[["source", "model", "method", *columns, "safety", "mark"]]


def styled(frame: pd.DataFrame, caption: str):
    """A pandas Styler for the notebook; every text is escaped."""
    plain = frame.map(lambda v: html.escape(v) if isinstance(v, str) else v)
    return plain.style.format(precision=2, na_rep="").set_caption(html.escape(caption)).set_table_styles(
        [{"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold"},
         {"selector": "td, th", "props": "padding: 2px 8px; text-align: left"}])


def save_table(frame: pd.DataFrame, path: Path, caption: str) -> None:
    """Write `<path>.csv`, `.md` and `.tex` (booktabs)."""
    write_atomic(path.with_suffix(".csv"), frame.to_csv())
    shown = frame.map(lambda v: "" if v is None or v != v else f"{v:.2f}" if isinstance(v, float) else str(v))
    head = [str(frame.index.name or ""), *map(str, shown.columns)]
    lines = [f"**{caption}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([str(i), *row]) + " |" for i, row in zip(shown.index, shown.to_numpy().tolist(), strict=True)]
    write_atomic(path.with_suffix(".md"), "\n".join(lines) + "\n")
    body = [" & ".join(_tex(c) for c in [i, *row]) + r" \\" for i, row in zip(shown.index, shown.to_numpy().tolist(), strict=True)]
    tex = [r"\begin{table}", rf"\caption{{{_tex(caption)}}}", rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule",
           " & ".join(_tex(h) for h in head) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    write_atomic(path.with_suffix(".tex"), "\n".join(tex) + "\n")


def _tex(value: object) -> str:
    text = str(value)
    for mark, replacement in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"),
                              (UP, r"$\uparrow$"), ("†", r"$^\dagger$"), ("ℓ", r"$\ell$")):
        text = text.replace(mark, replacement)
    parts = text.split("**")
    return "".join(rf"\textbf{{{p}}}" if i % 2 else p for i, p in enumerate(parts))


def plane_points(rows: pd.DataFrame, form: str = "all") -> pd.DataFrame:
    """Mean DSR and mean compliance (sets weighted equally, general sets out) of each method and step."""
    part = rows[(rows["form"] == form) & ~rows["benchmark"].str.startswith(("general", "i-alpaca"))]
    mean = part[part["metric"].isin(["compliance", "dsr"])].groupby(["method", "step", "metric"], sort=False)["value"].mean()
    return mean.unstack("metric").dropna().reset_index()
