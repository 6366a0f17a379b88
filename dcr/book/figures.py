"""Draw every figure and table of a run from its tables: no model, no training. What is missing is said, the rest drawn."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dcr import plots
from dcr.data.files import write_atomic
from dcr.errors import DCRError
from dcr.plots.style import save
from dcr.tables import figure_data as data
from dcr.tables import table1 as tables

PROBE = ("separability_probe_base", "separability_surface_base")


@dataclass(frozen=True)
class Picture:
    """One figure: the tables it reads, the notebook that writes them, how its frames are made and drawn, its caption."""

    needs: tuple[str, ...]
    notebook: str
    frames: Callable[[data.Tables], dict[str, pd.DataFrame]]
    draw: Callable[..., Figure]
    caption: str  # names what an interval or band is
    bands: bool = True  # False: nothing in it varies over seeds that a band could show


# A dot a pair of prompts or a seed: nothing is averaged.
EACH_SEED = (
    "proposition",
    "ablation_levers",
    "ablation_outcomes",
    "harm_read",
    "search_levers",
    "search_outcomes",
)
PICTURES: dict[str, Picture] = {
    "overview": Picture(
        (),
        "",
        lambda _: {},
        plots.overview,
        "The two stages of contrastive refinement (paper figure 2).",
        False,
    ),
    "question_shares": Picture(
        ("question_shares",),
        "01_representations",
        data.as_is("question_shares"),
        plots.question_shares,
        "Share of questions in each set. Where harmless sets are nearly all questions and toxic ones nearly all imperatives, the "
        "form of the sentence alone nearly gives the label away.",
        False,
    ),
    "shortcut": Picture(
        ("question_shares", "metrics"),
        "04_evaluation",
        data.shortcut,
        plots.shortcut,
        "The shortcut: share of questions in each benchmark, beside how often each method refuses its questions and its imperatives. "
        "A method that reads harm refuses a toxic set in both forms and a harmless set in neither. Grey: no such prompts.",
        False,
    ),
    "refusal_rates": Picture(
        ("curves",),
        "04_evaluation",
        data.refusal_rates,
        plots.refusal_rates,
        "Refusal rate of toxic, seemingly toxic and general prompts over alignment (paper figure 1); mean over benchmarks with "
        "normal 95 % interval.",
    ),
    "separability": Picture(
        PROBE,
        "01_representations",
        data.as_is(*PROBE),
        plots.separability_by_layer,
        "Separability by layer (paper figure 4): AUROC of a linear probe on hidden states (band: 95 % bootstrap over pairs), beside "
        "surface baselines that read no model (black lines).",
    ),
    "transfer": Picture(
        ("separability_transfer_base",),
        "01_representations",
        data.as_is("separability_transfer_base"),
        plots.transfer,
        "The probe read on sets it was not trained on (band: 95 % bootstrap). Below 0.5 it follows form, not harm.",
    ),
    "similarity": Picture(
        ("refinement_DCR",),
        "02_refinement",
        data.similarity,
        plots.similarity,
        "Similarity before and after refinement (paper figure 5): cosine at layer ℓ of held-out prompts across and within classes, and "
        "the normalised kernel of toxic and seemingly toxic prompts, base model against refined model.",
        False,
    ),
    "refinement": Picture(
        ("refinement_DCR",),
        "02_refinement",
        data.refinement,
        plots.refinement,
        "Stage 1 on held-out prompts: cosine between and within classes, and a probe's AUROC.",
        False,
    ),
    "losses": Picture(
        ("losses",),
        "03_alignment",
        data.losses,
        plots.loss_curves,
        "Training loss of both stages.",
        False,
    ),
    "rejection": Picture(
        ("trajectory_rejection",),
        "03_alignment",
        data.rejection,
        plots.refusal_probabilities,
        "Refusal probability of toxic, seemingly toxic and general prompts over alignment (paper figure 6); mean over prompts "
        "with normal 95 % interval.",
    ),
    "kernel": Picture(
        ("trajectory_kernel",),
        "03_alignment",
        data.as_is("trajectory_kernel"),
        plots.kernel_similarity,
        "Normalised kernel similarity of toxic and seemingly toxic prompts over alignment (paper figure 3; 95 % bootstrap over "
        "prompts).",
    ),
    "plane": Picture(
        ("metrics",),
        "04_evaluation",
        data.plane,
        plots.plane,
        "The compliance-safety plane. Open markers: checkpoints of alignment on a subset of the prompts; filled: the last one on all "
        "prompts, with its 95 % interval; single points have no checkpoints. The question-mark rule reads no model.",
    ),
    "rates_by_form": Picture(
        ("metrics",),
        "04_evaluation",
        data.rates_by_form,
        plots.rates_by_form,
        "Refusal rate by benchmark and form of the prompt (95 % Wilson intervals); a set is pooled with its form-swapped version.",
    ),
    "differences": Picture(
        ("paired",),
        "04_evaluation",
        data.differences,
        plots.differences,
        "Paired difference to STL on each benchmark (95 % bootstrap over prompts): compliance on harmless sets, DSR on toxic ones "
        "(grey rows). Right of the line is better.",
    ),
    "categories": Picture(
        ("categories",),
        "04_evaluation",
        data.as_is("categories"),
        plots.categories,
        "Refusal rate by category of prompt (in brackets: prompts); the most frequent categories of each class.",
        False,
    ),
    "judges": Picture(
        ("judge_calibration",),
        "04_evaluation",
        data.as_is("judge_calibration"),
        plots.calibration,
        "Judges against human labels on published completions: Cohen's κ with its 95 % interval, by the model that answered.",
    ),
    "seeds_matched_safety": Picture(
        ("outcomes",),
        "",
        data.seeds_matched_safety,
        plots.matched_safety,
        "Compliance at matched safety, forms balanced, sets that no method trained on: a monotone fit of each seed's curve read at a "
        "DSR, never extrapolated; 95 % bootstrap over prompts and seeds.",
        False,
    ),
    "seeds_differences": Picture(
        ("outcomes",),
        "",
        data.seeds_differences,
        plots.matched_differences,
        "The same, minus STL (tuned as long as ours, where that ran): both read on the same draws of prompts and seeds (95 % "
        "bootstrap).",
        False,
    ),
    "seeds_scores": Picture(
        ("scores",),
        "",
        data.seeds_scores,
        plots.harm_scores,
        "Scores without a threshold, forms balanced, sets that no method trained on: refusal probability after alignment (filled), and "
        "what is read at ℓ before it, in the base model and after each stage 1 (open; fitted on labelled prompts of other sets). Right: "
        "compliance if a threshold on the score refused (95 % bootstrap over prompts and seeds).",
        False,
    ),
    "cost": Picture(
        ("cost",),
        "04_evaluation",
        data.as_is("cost"),
        plots.cost,
        "Wall time of each stage by method.",
        False,
    ),
    **{
        name: Picture(
            needs,
            notebook,
            (data.each_seed if name in EACH_SEED else data.as_is)(*needs),
            draw,
            caption,
            bands,
        )
        for name, needs, notebook, draw, caption, bands in (
            (
                "probe_cells",
                ("separability_cells_base",),
                "01_representations",
                plots.probe_cells,
                "Probe AUROC by the forms of the toxic and the harmless prompts (one chosen layer).",
                False,
            ),
            (
                "proposition",
                ("proposition_pairs", "proposition"),
                "01_representations",
                plots.proposition,
                "Proposition 1: |h'ᵀh| at ℓ against the kernel's norm over pairs of prompts, before and after refinement.",
                False,
            ),
            (
                "refinement_cosines",
                ("refinement_cosines",),
                "02_refinement",
                plots.cosine_maps,
                "Cosine of hidden states at ℓ between prompts, before and after refinement.",
                False,
            ),
            (
                "refinement_maps",
                ("refinement_maps",),
                "02_refinement",
                plots.maps_before_after,
                "Hidden states at ℓ on two principal components, before and after refinement.",
                False,
            ),
            (
                "refinement_drift",
                ("refinement_drift",),
                "02_refinement",
                plots.drift_by_layer,
                "How far each class of prompts moved from the base model, by layer.",
                False,
            ),
            (
                "refinement_kernel",
                ("refinement_kernel",),
                "02_refinement",
                plots.kernel_before_after,
                "Kernel similarity of toxic prompts with each class, before and after refinement (95 % bootstrap over prompts).",
                False,
            ),
            (
                "reliability",
                ("reliability_STL", "reliability_STL_bins"),
                "03_alignment",
                plots.reliability,
                "Refusal probability against judged answers: share refused in each bin (95 % Wilson) for STL.",
                False,
            ),
            (
                "matched_safety",
                ("matched_safety",),
                "04_evaluation",
                plots.matched_safety,
                "Compliance at matched safety: a monotone fit of each curve read at a DSR, never extrapolated (95 % bootstrap).",
                False,
            ),
            (
                "bias_frontier",
                ("bias_sweep",),
                "04_evaluation",
                plots.bias_frontier,
                "The whole frontier of a trained model: a constant added to the logits of refusal openings; the filled point is the model "
                "as it is.",
                False,
            ),
            (
                "robustness",
                ("robustness",),
                "04_evaluation",
                plots.robustness,
                "Refusal of both classes under mild rewording (95 % Wilson intervals).",
                False,
            ),
            (
                "ability",
                ("capabilities",),
                "04_evaluation",
                plots.ability,
                "Change of general ability against the base model, item by item (95 % intervals).",
                False,
            ),
            (
                "ablation_levers",
                ("ablations",),
                "06_ablations",
                plots.ablation_levers,
                "Ablations: a row a recipe, one dot a seed; failed recipes are marked.",
                False,
            ),
            (
                "ablation_outcomes",
                ("ablations",),
                "06_ablations",
                plots.ablation_outcomes,
                "Ablations after a short alignment: compliance against DSR, and whether the cheap screen foretold it.",
                False,
            ),
            (
                "harm_read",
                ("ablations",),
                "06_ablations",
                plots.harm_read,
                "What stage 1 does to the harm that was there: AUROC of a linear probe at ℓ, and along the difference of the class means, "
                "fitted on the same labelled prompts for every recipe, read on validation prompts, forms averaged; dashed: the base model.",
                False,
            ),
            (
                "search_levers",
                ("sweep_search",),
                "06_ablations",
                plots.ablation_levers,
                "The search on validation prompts, as many recipes for STL, STL-aug and ours: a row a recipe, one dot a seed.",
                False,
            ),
            (
                "search_outcomes",
                ("sweep_search",),
                "06_ablations",
                plots.ablation_outcomes,
                "The search: compliance against DSR on validation prompts, forms averaged, and whether the screen foretold it.",
                False,
            ),
        )
    },
}


def draw_all(
    folder: str | Path, out: str | Path, only: Collection[str] = (), *, keep: bool = False
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Figures of the run at `folder` into `out`: `<name>.png`, `<name>.svg`, and beside them the data that drew them.

    folder: a run directory, its tables/, or one with seed-*/. only: names of figures; default all. keep: figures in `out`
    that this run has no tables for stay, under the commit of their own run. index.json and README.md list each figure
    with caption, data, profile and commit. Returns ({name: figure}, {name: what to run}). Raises DCRError when profiles mix.
    """
    out, drawn, missing, index = Path(out), {}, {}, {}
    before = read_index(out)["figures"] if keep and (out / "index.json").exists() else {}
    found, manifest = data.load_tables(folder), _manifest(folder)
    run = {
        "profile": manifest.get("config", {}).get("profile", ""),
        "commit": manifest.get("environment", {}).get("git_commit", ""),
    }
    if others := {e["profile"] for e in before.values() if e.get("profile")} - {run["profile"]}:
        raise DCRError(
            f"{out} holds figures of profile {sorted(others)[0]}, {folder} is of {run['profile'] or 'an unknown one'}: keeping "
            "them would mix profiles. Draw into another folder, or without keep."
        )
    for name, picture in PICTURES.items():
        if only and name not in only:
            continue
        absent = [t for t in picture.needs if t not in found]
        if absent:
            missing[name] = f"{name}: no {', '.join(absent)} yet; " + (
                f"run notebook {picture.notebook}." if picture.notebook else "run `dcr run`."
            )
            continue
        try:
            frames = picture.frames(found)
            files = {
                f"{name}.csv" if len(frames) == 1 else f"{name}.{part}.csv": frame
                for part, frame in frames.items()
            }
            for file, frame in files.items():
                write_atomic(out / file, frame.to_csv(index=False))
            drawn[name] = picture.draw(*(data.read_csv(out / file) for file in files))
        except DCRError as error:
            missing[name] = f"{name}: {error}"
            continue
        save(drawn[name], out / name)
        seeds = max((found[t]["seed"].nunique() for t in picture.needs), default=0)
        index[name] = {
            "caption": caption(name, seeds),
            "data": list(files),
            "notebook": picture.notebook,
            "seeds": int(seeds),
            **run,
        }
    index = {
        name: index.get(name) or before[name]
        for name in PICTURES
        if name in index or name in before
    }
    untold = {name: message for name, message in missing.items() if name not in index}
    write_atomic(
        out / "index.json",
        json.dumps({"figures": index, "missing": untold}, indent=1, ensure_ascii=False) + "\n",
    )
    write_atomic(out / "README.md", _readme(index, untold))
    return drawn, missing


def redraw(folder: str | Path, name: str) -> Figure:
    """One figure from the data beside it in `folder` alone. Raises DCRError when it is not in the folder's index."""
    index = read_index(folder)["figures"]
    if name not in index:
        raise DCRError(f"{folder}: no figure {name!r}; there are {', '.join(index)}.")
    return PICTURES[name].draw(
        *(data.read_csv(Path(folder) / file) for file in index[name]["data"])
    )


def read_index(folder: str | Path) -> dict:
    """index.json of a figures folder. Raises DCRError when nothing has been drawn there."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise DCRError(
            f"{folder}: no figures yet. Run notebook 05_figures (or `dcr figures RUN_DIR`) first."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def caption(name: str, seeds: int) -> str:
    """The figure's caption; it says what stands behind a band, also when that is one seed."""
    picture = PICTURES[name]
    if not seeds or not picture.bands:
        return picture.caption + (f" Mean of {seeds} seeds." if seeds > 1 else "")
    return picture.caption + (
        f" Mean of {seeds} seeds; intervals combine prompts and seeds."
        if seeds > 1
        else " One seed: no band over seeds."
    )


def present(
    drawn: Mapping[str, Figure], missing: Mapping[str, str], name: str, seeds: int = 1
) -> None:
    """Show a figure with its caption in a notebook, or a picture that says what to run."""
    from IPython.display import HTML, display

    display(
        drawn[name] if name in drawn else plots.note(missing.get(name, f"{name}: unknown figure"))
    )
    if name in drawn:
        display(HTML(f"<p style='max-width: 46em'><i>{html.escape(caption(name, seeds))}</i></p>"))


def _readme(index: Mapping, missing: Mapping) -> str:
    lines = [
        "# Figures",
        "",
        "Drawn by `dcr figures RUN_DIR --out figures` from a run's tables; nobody edits them by hand. Each stands "
        "beside the data that drew it, and a test redraws them from that data.",
        "",
    ]
    for name, entry in index.items():
        files = ", ".join(f"[{f}]({f})" for f in entry["data"])
        run = (
            f" Run at commit {entry['commit'][:7]}."
            if entry.get("commit")
            else " The commit of its run is not recorded."
        )
        lines += [
            f"## {name}",
            "",
            f"![{name}]({name}.png)",
            "",
            entry["caption"] + (f" Data: {files}." if files else "") + run,
            "",
        ]
    lines += (
        ["## Not drawn", "", *(f"- {message}" for message in missing.values()), ""]
        if missing
        else []
    )
    return "\n".join(lines)


def draw_tables(
    metrics: pd.DataFrame,
    out: str | Path,
    found: Mapping[str, pd.DataFrame] | None = None,
    model: str = "SmolLM2-135M-Instruct",
) -> dict[str, pd.DataFrame]:
    """Table 1 (published sets, and balanced over forms), the comparison with the paper, ability, quality and cost, saved in `out`.

    found: the run's other tables (capabilities, quality, cost); what is absent is left out.
    """
    out, made, found = Path(out), {}, found or {}
    long = tables.table1(metrics)
    seeds = int(long["seeds"].max())
    made["table1"] = tables.wide(long)
    if (metrics["form"] == "balanced").any():
        made["table1_balanced"] = tables.wide(tables.table1(metrics, "balanced"))
    made["table1_paper"] = tables.beside_paper(long, model).set_index("source")
    for name, make in (
        ("capabilities", tables.ability_table),
        ("quality", tables.quality_table),
        ("cost", tables.cost_table),
    ):
        if name in found:
            made[f"table_{name}"] = make(found[name])
    for name, frame in made.items():
        tables.save_table(frame, out / name, title(name, seeds))
        write_atomic(out / f"{name}.title", title(name, seeds))
    return made


def title(name: str, seeds: int = 1) -> str:
    """A table's caption."""
    over = (
        "one seed, intervals over prompts"
        if seeds < 2
        else f"mean of {seeds} seeds, intervals over prompts and seeds"
    )
    marks = f"95 % intervals ({over}); best in bold; † the method trained on prompts of this set"
    return {
        "table1": f"Compliance and defence success rate (DSR), {marks}",
        "table1_balanced": f"The same, averaged equally over questions and imperatives, sets that have both; {marks}",
        "table1_paper": "Beside the paper's numbers (N: secondary reading notes; blank where unknown). Other models, other judges: "
        "compare directions. Safety is the mean DSR of five sets, which ones in the paper is inferred; "
        "this run's cells are blank where it has not run those sets",
        "table_capabilities": f"General ability; 95 % intervals ({over}); best in bold",
        "table_quality": f"Response quality; 95 % intervals ({over}); best in bold",
        "table_cost": "Cost of each method: wall time and peak memory of the process",
    }[name]


def draw_run(
    run: str | Path, out: str | Path, only: Collection[str] = (), *, keep: bool = False
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Everything of a run (one seed, or a folder of seed-*/) into `out`: figures with their data (see `draw_all`), and the tables.

    A folder of figures is drawn once more from the data in it, after a change of drawing code.
    """
    if (Path(run) / "index.json").exists():
        again = {
            name: redraw(run, name)
            for name in read_index(run)["figures"]
            if not only or name in only
        }
        for name, figure in again.items():
            save(figure, Path(out) / name)
        return again, {}
    if not data.seed_folders(run):
        raise DCRError(
            f"{run}: no such folder; give a run directory (one that holds tables/ or seed-*/tables/)."
        )
    found = data.load_tables(run)
    drawn, missing = draw_all(run, out, only, keep=keep)
    if "metrics" in found:
        draw_tables(found["metrics"], out, found, model_name(run))
    return drawn, missing


def model_name(run: str | Path) -> str:
    """The base model of a run, from its manifest."""
    name = _manifest(run).get("config", {}).get("model", {}).get("name", "embedded")
    return (
        "SmolLM2-135M-Instruct"
        if name == "embedded"
        else Path(name).name
        if Path(name).is_dir()
        else name
    )


def _manifest(run: str | Path) -> dict:
    """The manifest of a run (given itself, its tables/, or a folder of seed-*/); empty where there is none."""
    run = Path(run).parent if Path(run).name == "tables" else Path(run)
    path = next(
        (
            p
            for p in (run / "manifest.json", *sorted(run.glob("seed-*/manifest.json")))
            if p.exists()
        ),
        None,
    )
    return json.loads(path.read_text(encoding="utf-8")) if path else {}
