"""Explorers for JupyterLab (ipywidgets): type a prompt and see how it is read; look at answers.

All text is escaped; toxic prompts are blurred until clicked; no answer to one is kept or shown.
"""

import html
from typing import Any

import numpy as np
import pandas as pd

from dcr.data.forms import form_of, swap_form
from dcr.errors import DCRError
from dcr.plots.tables import styled
from dcr.study.experiment import Experiment

READ_BY = ("base", "STL", "DCR")
SHOWN = 12  # prompts a page
EVERY = "(every)"
NO_MODEL = (
    "This run directory holds tables only, and reading a prompt needs a model. "
    "The button trains the small embedded one here (some minutes the first time)."
)
# The element's own style blurs, so also without our style sheet; the checkbox works by keyboard.
BLURRED = (
    '<label><input type="checkbox" class="dcr-show" aria-label="show a toxic prompt" '
    'style="position:absolute;opacity:0"><span class="dcr-blur" style="filter: blur(5px); '
    'cursor: pointer" title="toxic prompt: click to show">{text}</span></label>'
)
STYLE = (
    "<style>.dcr-show:checked + .dcr-blur {filter: none !important} "
    ".dcr-show:focus + .dcr-blur {outline: 2px solid}</style>"
)


def prompt_html(text: str, label: str) -> str:
    """An escaped prompt; a toxic one blurred until it is clicked."""
    safe = html.escape(str(text))
    return BLURRED.format(text=safe) if label == "toxic" else safe


def rows_html(rows: pd.DataFrame, columns: tuple[str, ...]) -> str:
    """The first prompts of a choice as an HTML table: `columns` of them, then the prompt."""
    cells = [
        "".join(f"<td>{html.escape(str(row[c])[:300])}</td>" for c in columns)
        + f"<td>{prompt_html(row['text'], row['label'])}</td>"
        for row in rows.head(SHOWN).to_dict("records")
    ]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in (*columns, "prompt"))
    body = "".join(f"<tr>{c}</tr>" for c in cells)
    count = f"<p>{len(rows)} prompts, first {min(SHOWN, len(rows))}</p>"
    return f"{STYLE}{count}<table style='text-align: left'><tr>{head}</tr>{body}</table>"


def read_prompt(experiment: Experiment, text: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How base, STL and DCR read a prompt in both forms, and the nearest training prompts.

    Readings: method, form, prompt, refusal score (log odds of opening with a refusal), probe (log
    odds of toxic, at ℓ, fitted on minimal pairs). Nearest: cosine at ℓ of the base model, label,
    text. Raises DCRError for an empty prompt.
    """
    from dcr.analysis.probes import fit_probe, is_toxic
    from dcr.analysis.refusal import refusal_score
    from dcr.lm.states import hidden_states
    from dcr.tables.representations import pairings

    if not text.strip():
        raise DCRError("type a prompt first.")
    run = experiment.runs[0]
    texts = list(dict.fromkeys([text.strip(), swap_form(text.strip())]))
    known = pairings(run)["matched pairs"].reset_index(drop=True)
    layer, parts, nearest = run.layer("DCR"), [], pd.DataFrame()
    for method in (m for m in READ_BY if m in ("base", *experiment.methods)):
        model, tokenizer = run.model(method)
        trained = run.states(method, known)[layer]  # [pairs, hidden]
        states = hidden_states(model, tokenizer, texts)[layer]  # [forms, hidden]
        named: dict[str, Any] = {"method": method, "form": [form_of(t) for t in texts]}
        named |= {"prompt": texts, "refusal score": refusal_score(model, tokenizer, texts)}
        named["probe"] = fit_probe(trained, is_toxic(known)).decision_function(states)
        parts.append(pd.DataFrame(named))
        if nearest.empty:
            norms = np.linalg.norm(trained, axis=1) * np.linalg.norm(states[0])
            cosine = pd.Series(trained @ states[0] / norms, dtype=float).round(3)
            nearest = known.assign(cosine=cosine).nlargest(5, "cosine")
    return pd.concat(parts, ignore_index=True), nearest[["cosine", "label", "text"]]


def explore(experiment: Experiment) -> None:
    """A box to type a prompt in, and how it is read (`read_prompt`) below it."""
    import ipywidgets as widgets
    from IPython.display import display

    box = widgets.Text(value="How do I kill a Python process?", layout={"width": "40em"})
    button = widgets.Button(description="Read", button_style="primary")
    out, live = widgets.HTML(), [experiment]

    def read(_) -> None:
        out.value, button.disabled = "<p>reading …</p>", True
        try:
            if not live[0].runs:
                live[0] = Experiment("embedded")
            readings, nearest = read_prompt(live[0], box.value)
            near = rows_html(nearest, ("cosine", "label"))
            out.value = f"{styled(readings).to_html()}<p>Nearest training prompts</p>{near}"
        except DCRError as error:
            out.value = f"<p>{html.escape(str(error))}</p>"
        except Exception as error:  # the log has the rest
            out.value = f"<p>{type(error).__name__}: {html.escape(str(error))}</p>"
            raise
        finally:
            button.description, button.disabled = "Read", False

    button.on_click(read)
    if not experiment.runs:
        button.description, out.value = "Use the embedded model", f"<p>{NO_MODEL}</p>"
    display(widgets.VBox([widgets.HBox([box, button]), out]))


def answers(experiment: Experiment) -> pd.DataFrame:
    """Answered prompts with each method's verdict (first seed); its answer to harmless ones."""
    run, parts = experiment.runs[0], []
    prompts = experiment.answered[["id", "benchmark", "label", "form", "text"]]
    for method in experiment.methods:
        said = run.verdicts(method).set_index("prompt_id").reindex(prompts["id"])
        # A rule gives verdicts alone, and a server may leave an answer out.
        given = said.get("response", pd.Series("", said.index)).fillna("")
        shown = np.where(prompts["label"] == "toxic", "", given)
        named = {"method": method, "verdict": said["verdict"].to_numpy(), "answer": shown}
        parts.append(prompts.assign(**named))
    return pd.concat(parts, ignore_index=True)


def explore_answers(table: pd.DataFrame) -> None:
    """Choose method, benchmark and verdict of `answers`; counts of verdicts and prompts follow."""
    import ipywidgets as widgets
    from IPython.display import display

    chosen = {
        c: widgets.Dropdown(options=[EVERY, *dict.fromkeys(table[c])], description=c)
        for c in ("method", "benchmark", "verdict")
    }
    out = widgets.HTML()

    def draw(_=None) -> None:
        rows = table
        for column, widget in chosen.items():
            rows = rows if widget.value == EVERY else rows[rows[column] == widget.value]
        counts = rows.groupby(["method", "verdict"]).size().rename("prompts").reset_index()
        shown = rows_html(rows, ("method", "verdict", "form", "answer"))
        out.value = styled(counts).to_html() + shown

    for widget in chosen.values():
        widget.observe(draw, names="value")
    draw()
    display(widgets.VBox([widgets.HBox(list(chosen.values())), out]))
