"""Small explorers for JupyterLab (ipywidgets): a map of prompts by layer, and the answers of a run by method and category.

Each shows a static table as well, which stays where widgets do not run (GitHub, a reopened notebook without a kernel).
Prompts are escaped; toxic ones are blurred until clicked, and no answer to a toxic prompt is kept or shown.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dcr.errors import DCRError

if TYPE_CHECKING:
    from dcr.run.experiment import Experiment

SHOWN = 12  # prompts a page
EVERY = "(every)"
# Blurred by the element's own style, so that a page without our style sheet keeps it blurred; the hidden checkbox works by keyboard.
BLURRED = (
    '<label><input type="checkbox" class="dcr-show" aria-label="show a toxic prompt" style="position:absolute;opacity:0">'
    '<span class="dcr-blur" style="filter: blur(5px); cursor: pointer" title="toxic prompt: click to show">{text}</span></label>'
)
STYLE = "<style>.dcr-show:checked + .dcr-blur {filter: none !important} .dcr-show:focus + .dcr-blur {outline: 2px solid}</style>"


def prompt_html(text: str, label: str) -> str:
    """An escaped prompt; a toxic one blurred until it is clicked."""
    safe = html.escape(str(text), quote=True)
    return BLURRED.format(text=safe) if label == "toxic" else safe


def answers_table(experiment: Experiment) -> pd.DataFrame:
    """Prompts with each method's verdict, and its answer to harmless prompts only; written to explorer.csv.

    Columns id, benchmark, label, category, form, text, method, verdict, answer ("" for toxic prompts and rules).
    """
    from dcr.run.experiment import RULES

    parts = []
    prompts = experiment.prompts[["id", "benchmark", "label", "category", "form", "text"]]
    for method in (*experiment.methods, *RULES):
        verdicts = experiment.verdicts(method).set_index("prompt_id")["verdict"]
        part = prompts.assign(method=method, verdict=prompts["id"].map(verdicts), answer="")
        if method not in RULES:
            answers = experiment.generations(method).set_index("prompt_id")["response"]
            part["answer"] = part["id"].map(answers).where(part["label"] != "toxic", "")
        parts.append(part)
    table = pd.concat(parts, ignore_index=True).fillna({"category": "(none)", "answer": ""})
    experiment.write_table("explorer", table)
    return table


def rates(answers: pd.DataFrame, benchmark: str = EVERY, category: str = EVERY) -> pd.DataFrame:
    """Shares of each verdict and n, a row a method, over the chosen prompts."""
    part = chosen(answers, benchmark=benchmark, category=category)
    shares = part.groupby(["method", "verdict"], sort=False).size().unstack(fill_value=0)
    n = shares.sum(axis=1)
    return (
        shares.div(n, axis=0)
        .assign(n=n)
        .loc[list(dict.fromkeys(part["method"]))]
        .rename_axis(columns=None)
    )


def chosen(
    answers: pd.DataFrame,
    *,
    method: str = EVERY,
    benchmark: str = EVERY,
    category: str = EVERY,
    verdict: str = EVERY,
) -> pd.DataFrame:
    """Rows of the answers table that match what is chosen."""
    keep = pd.Series(True, index=answers.index)
    for column, value in (
        ("method", method),
        ("benchmark", benchmark),
        ("category", category),
        ("verdict", verdict),
    ):
        if value != EVERY:
            keep &= answers[column] == value
    return answers[keep]


def prompts_html(rows: pd.DataFrame) -> str:
    """The first prompts of a choice as an HTML table: verdict, prompt, and the answer to harmless ones."""
    lines = [
        f"<tr><td>{html.escape(str(r.verdict))}</td><td>{html.escape(str(r.form))}</td><td>{prompt_html(r.text, r.label)}</td>"
        f"<td>{'<i>not shown</i>' if r.label == 'toxic' else html.escape(str(r.answer)[:300])}</td></tr>"
        for r in rows.head(SHOWN).itertuples()
    ]
    return (
        f"{STYLE}<p>{len(rows)} prompts, first {min(SHOWN, len(rows))}</p><table style='text-align: left'><tr><th>verdict</th>"
        f"<th>form</th><th>prompt</th><th>answer</th></tr>{''.join(lines)}</table>"
    )


def read_answers(run: str | Path) -> pd.DataFrame:
    """The answers table of a run. Raises DCRError naming the notebook that writes it."""
    path = Path(run) / "tables" / "explorer.csv"
    if not path.exists():
        raise DCRError(f"{path} is missing: run notebook 04_evaluation first.")
    return pd.read_csv(path, keep_default_na=False)


def explore_answers(answers: pd.DataFrame) -> None:
    """Widgets: choose method, benchmark, category and verdict; the rates of all methods and the prompts follow.

    Refusal rates of all benchmarks stand below as a static table.
    """
    import ipywidgets as widgets
    from IPython.display import HTML, display

    def options(column: str, rows: pd.DataFrame) -> list[str]:
        return [EVERY, *dict.fromkeys(rows[column].astype(str))]

    choose = {
        c: widgets.Dropdown(options=options(c, answers), description=c)
        for c in ("method", "benchmark", "category", "verdict")
    }
    choose["method"].value = answers["method"].iloc[-1]
    shown, prompts = widgets.HTML(), widgets.HTML()

    def draw(_=None) -> None:
        picked = {c: w.value for c, w in choose.items()}
        table = rates(answers, picked["benchmark"], picked["category"])
        shown.value = _rates_page(table, f"{picked['benchmark']}, {picked['category']}")
        prompts.value = prompts_html(chosen(answers, **picked))

    def follow(change) -> None:
        """Categories of the chosen benchmark only."""
        choose["category"].unobserve(draw, names="value")
        choose["category"].options = options("category", chosen(answers, benchmark=change["new"]))
        choose["category"].value = EVERY
        choose["category"].observe(draw, names="value")

    choose["benchmark"].observe(follow, names="value")
    for widget in choose.values():
        widget.observe(draw, names="value")
    draw()
    box = widgets.VBox(
        [
            widgets.HBox(list(choose.values()), layout=widgets.Layout(flex_flow="row wrap")),
            shown,
            prompts,
        ]
    )
    display(box)
    display(HTML(_static_page(answers)))  # stays where the widget cannot be shown


def _rates_page(table: pd.DataFrame, caption: str) -> str:
    shown = table.rename(index=html.escape).to_html(
        float_format="{:.2f}".format, border=0, escape=False
    )
    return f"<p><b>Share of each verdict: {html.escape(caption)}</b></p>{shown}"


def _static_page(answers: pd.DataFrame) -> str:
    """What remains without widgets: rates by method and benchmark. No prompt is in it."""
    part = answers.assign(refused=answers["verdict"] == "refuse")
    table = part.pivot_table(index="benchmark", columns="method", values="refused", sort=False)[
        list(dict.fromkeys(answers["method"]))
    ]
    table = table.rename(index=html.escape, columns=html.escape).rename_axis(
        index=None, columns=None
    )
    return (
        "<p><b>Refusal rate by benchmark</b> (widgets to explore it run in JupyterLab)</p>"
        + table.to_html(float_format="{:.2f}".format, border=0, escape=False)
    )


def explore(experiment: Experiment, layers: list[int], names: list[str]) -> None:
    """Widgets: choose set, layer and colour, step through the prompts of the map. The picture stands without them too."""
    import ipywidgets as widgets
    from IPython.display import display

    from dcr.plots import map_2d
    from dcr.plots.style import picture
    from dcr.tables.representations import map_points

    choose = {
        "name": widgets.Dropdown(options=names, description="set"),
        "layer": widgets.SelectionSlider(
            options=layers, value=layers[-1], description="layer", continuous_update=False
        ),
        "colour": widgets.Dropdown(options=["label", "form", "source"], description="colour"),
        "prompt": widgets.IntSlider(0, 0, 0, description="prompt", continuous_update=False),
    }
    image, text = widgets.Image(format="png"), widgets.HTML()

    def draw(_=None) -> None:
        points = map_points(experiment, choose["layer"].value, choose["name"].value)
        choose["prompt"].max = len(points) - 1
        row = points.iloc[min(choose["prompt"].value, len(points) - 1)]
        figure = map_2d(points, choose["colour"].value)
        figure.axes[0].plot(
            row["x"], row["y"], "o", markersize=13, markerfacecolor="none", markeredgecolor="black"
        )
        image.value = picture(figure, "png")
        text.value = f"{STYLE}<b>{html.escape(row['label'])}, {html.escape(row['form'])}</b>: {prompt_html(row['text'], row['label'])}"

    for widget in choose.values():
        widget.observe(draw, names="value")
    draw()
    display(widgets.VBox([widgets.HBox(list(choose.values())), image, text]))
