"""Figures from tidy tables alone: numbers drawn, bytes repeat, missing stages are said, profiles never mix, seeds combine."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import fake_run
import matplotlib
import numpy as np
import pandas as pd
import pytest

from dcr import plots
from dcr.book.figures import PICTURES, draw_all, draw_run, read_index, redraw
from dcr.errors import DCRError
from dcr.evaluate.seeds import over_seeds
from dcr.plots import style
from dcr.tables import figure_data

COMMITTED = Path(__file__).resolve().parent.parent / "figures"


def texts(figure) -> list[str]:
    """Everything written on a figure."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]


def test_every_figure_is_drawn_with_labelled_axes_and_saved_with_its_data():
    run, drawn, missing = fake_run.drawn()
    made = set(fake_run.tables())
    absent = {name for name, picture in PICTURES.items() if not set(picture.needs) <= made}
    assert {"plane", "shortcut", "kernel", "similarity", "judges"}.isdisjoint(absent)
    assert set(missing) == absent and set(drawn) == set(PICTURES) - absent
    index = read_index(run / "figures")["figures"]
    for name, figure in drawn.items():
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000 and (
            run / "figures" / f"{name}.svg"
        ).exists()
        assert all((run / "figures" / file).exists() for file in index[name]["data"]) and bool(
            index[name]["data"]
        ) == (name != "overview")
        labels = [ax.get_xlabel() or ax.get_title() for ax in figure.axes] + [
            getattr(figure, "_supxlabel", None)
        ]
        assert name == "overview" or any(labels), name


def test_no_label_is_cut_and_none_covers_another():
    """Titles, axis labels, tick labels and legends of every figure lie inside the canvas and apart from one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name, figure in fake_run.drawn()[1].items():
        if name == "overview":
            continue
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [
            (t.get_text(), t.get_window_extent(canvas.get_renderer()))
            for ax in figure.axes
            for t in (ax.title, ax.xaxis.label, ax.yaxis.label)
            if t.get_text()
        ]
        boxes += [
            (str(t.get_text()), t.get_window_extent())
            for t in (figure._supxlabel, figure._supylabel)
            if t is not None
        ]
        boxes += [("legend", legend.get_window_extent()) for legend in figure.legends]
        ticks = [
            (t.label1.get_text(), t.label1.get_window_extent())
            for ax in figure.axes
            if ax.axison
            for axis in (ax.xaxis, ax.yaxis)
            for t in axis.get_major_ticks()
            if t.label1.get_visible()
            and t.label1.get_text()
            and min(axis.get_view_interval()) <= t.get_loc() <= max(axis.get_view_interval())
        ]
        for text, box in ticks:
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1, (
                f"{name}: tick label {text!r} is cut"
            )
        for i, (text, box) in enumerate(boxes):
            assert (
                box.x0 > -2
                and box.y0 > -2
                and box.x1 < figure.bbox.x1 + 2
                and box.y1 < figure.bbox.y1 + 2
            ), f"{name}: {text!r} is cut"
            for other, second in boxes[i + 1 :]:
                overlap = (
                    min(box.x1, second.x1) - max(box.x0, second.x0),
                    min(box.y1, second.y1) - max(box.y0, second.y0),
                )
                assert min(overlap) < 1.5, f"{name}: {text!r} over {other!r}"


def test_notebooks_show_pictures_not_names():
    """A figure is displayed as a PNG of sensible size in any kernel, whatever its matplotlib backend."""
    from IPython.core.formatters import DisplayFormatter

    shown, size = DisplayFormatter().format(fake_run.drawn()[1]["cost"])
    assert shown["image/png"][:4] == b"\x89PNG" and 300 < size["image/png"]["width"] < 1000


def test_pictures_are_the_same_bytes_twice(tmp_path):
    run, _, _ = fake_run.drawn()
    draw_all(
        run / "tables",
        tmp_path,
        only=("overview", "plane", "shortcut", "refusal_rates", "differences", "kernel"),
    )
    again = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in tmp_path.iterdir()
        if p.suffix in (".png", ".svg", ".csv")
    }
    assert len(again) >= 18
    assert again == {
        name: hashlib.sha256((run / "figures" / name).read_bytes()).hexdigest() for name in again
    }


def test_every_figure_redraws_from_the_data_beside_it():
    run = fake_run.drawn()[0]
    for name in ("plane", "shortcut", "similarity", "kernel"):
        assert (
            style.picture(redraw(run / "figures", name), "svg")
            == (run / "figures" / f"{name}.svg").read_bytes()
        ), name
    with pytest.raises(DCRError, match="no figure 'plain'"):
        redraw(run / "figures", "plain")


@pytest.mark.parametrize("folder", ["", "seeds"])
def test_committed_figures_come_from_the_data_beside_them(folder):
    """The repository's pictures, redrawn: the same words and the same numbers (to a thousandth of a point)."""
    place = COMMITTED / folder
    index = read_index(place)["figures"]
    assert {"overview", "plane", "rates_by_form"} | (
        {"seeds_matched_safety"} if folder else {"question_shares", "shortcut"}
    ) <= set(index)
    for name in index:
        old, new = (
            (place / f"{name}.svg").read_text(encoding="utf-8"),
            style.picture(redraw(place, name), "svg").decode(),
        )
        number = re.compile(r"(?<![\w#])-?\d+\.?\d*(?:e-?\d+)?(?!\w)")
        assert number.sub("0", _plain(old)) == number.sub("0", _plain(new)), (
            f"{name} was edited, or its drawing changed: redraw {place}"
        )
        a, b = (np.array(number.findall(_plain(text)), dtype=float) for text in (old, new))
        np.testing.assert_allclose(a, b, atol=2e-3, err_msg=name)
        assert (place / f"{name}.png").exists()


def _plain(svg: str) -> str:
    """An SVG without version and generated ids."""
    return re.sub(r"Matplotlib v[\d.]+|\b[mph][0-9a-f]{10}\b", "", svg)


def test_plotted_numbers_are_the_tables():
    points = pd.DataFrame(
        {"method": ["STL"] * 2, "step": [-1, 0], "dsr": [0.8, 0.1], "compliance": [0.4, 1.0]}
    )
    line = plots.plane(points).axes[0].lines[0]
    np.testing.assert_allclose(
        line.get_xydata(), [[0.1, 1.0], [0.8, 0.4]]
    )  # step -1 is the last one
    rates = figure_data.refusal_rates({"curves": fake_run.tables()["curves"]})["refusal_rates"]
    first = plots.refusal_rates(rates).axes[0].lines[0]
    np.testing.assert_allclose(first.get_ydata(orig=False), [0.0, 0.175, 0.7])
    curves = fake_run.tables()["curves"]
    steered = pd.concat(
        [curves, curves.query("method == 'STL'").assign(method="SCANS", strength=0.5, step=50)]
    )
    assert "SCANS" not in set(
        figure_data.refusal_rates({"curves": steered})["refusal_rates"]["method"]
    )  # strengths are no steps


def test_a_missing_stage_is_said_and_the_rest_drawn(tmp_path):
    run = fake_run.write_run(tmp_path)
    (run / "tables" / "metrics.csv").unlink()
    (run / "tables" / "cost.csv").write_text("")
    with pytest.raises(DCRError, match=r"cost.csv: not a CSV table .* run its notebook again"):
        draw_all(run / "tables", run / "figures")
    (run / "tables" / "cost.csv").unlink()
    drawn, missing = draw_all(
        run / "tables", run / "figures", only=("plane", "shortcut", "cost", "refusal_rates")
    )
    assert {"plane", "shortcut", "cost"} == set(missing) and {"refusal_rates"} == set(drawn)
    assert "run notebook 04_evaluation" in missing["plane"] and any(
        "run notebook" in t for t in texts(plots.note(missing["plane"]))
    )


def test_figures_of_an_earlier_run_stay_when_asked_to_and_say_so(tmp_path):
    first, second = fake_run.write_run(tmp_path / "first"), fake_run.write_run(tmp_path / "second")
    for run, commit in ((first, "1111111aaaa"), (second, "2222222bbbb")):
        manifest = json.loads((run / "manifest.json").read_text()) | {
            "environment": {"git_commit": commit}
        }
        (run / "manifest.json").write_text(json.dumps(manifest))
    (second / "tables" / "question_shares.csv").unlink()
    chosen = ("question_shares", "refusal_rates")
    newer = {"refusal_rates": "2222222bbbb"}
    for keep, left in ((True, {"question_shares": "1111111aaaa", **newer}), (False, newer)):
        draw_all(first, tmp_path / "out", only=chosen)
        draw_all(second, tmp_path / "out", only=chosen, keep=keep)
        assert {n: e["commit"] for n, e in read_index(tmp_path / "out")["figures"].items()} == left
        assert ("Run at commit 1111111." in (tmp_path / "out" / "README.md").read_text()) == keep
        assert (
            "question_shares"
            in json.loads((tmp_path / "out" / "index.json").read_text())["missing"]
        ) != keep
    manifest["config"]["profile"] = "other"
    (second / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DCRError, match="is of other: keeping them would mix profiles"):
        draw_all(second, tmp_path / "out", only=chosen, keep=True)


def test_an_empty_run_says_what_to_run_and_a_wrong_path_is_refused(tmp_path):
    drawn, missing = draw_all(tmp_path / "run" / "tables", tmp_path / "figures")
    assert set(drawn) == {"overview"} and set(missing) == set(PICTURES) - {"overview"}
    with pytest.raises(DCRError, match="nowhere: no such folder; give a run directory"):
        draw_run(tmp_path / "nowhere", tmp_path / "figures")


def test_mixed_profiles_are_refused(tmp_path):
    with pytest.raises(DCRError, match="mixes profiles"):
        plots.rates_by_form(pd.concat([fake_run.metric_rows("a"), fake_run.metric_rows("b")]))
    run = fake_run.write_run(tmp_path)
    fake_run.metric_rows("other").to_csv(run / "tables" / "metrics.csv", index=False)
    with pytest.raises(DCRError, match=r"mixes profiles: .*Draw one profile at a time"):
        draw_all(run, run / "figures")


def test_several_seeds_give_bands_and_one_seed_says_so(tmp_path):
    one, many = fake_run.write_run(tmp_path / "one"), fake_run.write_run(tmp_path / "many", seeds=3)
    drawn_one, _ = draw_all(one, one / "figures", only=("refusal_rates", "plane"))
    drawn_many, missing = draw_run(
        many, many / "figures", only=("refusal_rates", "plane", "rejection")
    )
    assert not missing and (many / "figures" / "table1.tex").exists()
    bands = [
        len(d["refusal_rates"].axes[0].collections)
        - sum("Line" in type(c).__name__ for c in d["refusal_rates"].axes[0].collections)
        for d in (drawn_one, drawn_many)
    ]
    assert bands == [0, 3]
    assert (
        "One seed: no band over seeds" in read_index(one / "figures")["figures"]["plane"]["caption"]
    )
    assert "Mean of 3 seeds" in read_index(many / "figures")["figures"]["plane"]["caption"]


def test_an_axis_of_steps_begins_where_its_curves_begin():
    rows = pd.DataFrame(
        [
            {
                "method": "STL",
                "step": s,
                "label": "toxic",
                "value": 0.5,
                "low": 0.4,
                "high": 0.6,
                "seeds": 1,
            }
            for s in (15, 30, 44)
        ]
    )
    axes = plots.refusal_rates(
        pd.concat([rows, rows.assign(step=rows["step"] + (rows["step"] == 44))])
    ).axes[0]
    left, right = axes.get_xlim()
    assert (
        10 < left < 15
        and 44 < right < 60
        and [t.get_text() for t in axes.get_xticklabels()] == ["15", "30", "44"]
    )
    assert plots.refusal_rates(pd.concat([rows, rows.assign(step=0)])).axes[0].get_xlim()[0] <= 0


def test_rows_that_a_number_names_stay_apart_over_seeds(tmp_path):
    """The bias of a sweep and the target of matched safety name a row; ablations keep a dot a seed."""
    from dcr.tables.figure_data import load_tables

    found = load_tables(fake_run.write_run(tmp_path / "many", seeds=2))
    frames = {
        name: PICTURES[name].frames(found)
        for name in ("bias_frontier", "matched_safety", "ablation_levers")
    }
    sweep = frames["bias_frontier"]["bias_sweep"]
    assert sorted(sweep["bias"].unique()) == [-2.0, 0.0, 2.0] and (sweep["seeds"] == 2).all()
    matched = frames["matched_safety"]["matched_safety"]
    assert matched.groupby("target")["compliance"].mean().round(2).to_dict() == {
        0.8: 0.4,
        0.85: 0.35,
    }
    assert sorted(frames["ablation_levers"]["ablations"]["seed"].unique()) == [0, 1]
    assert (
        len(
            PICTURES["ablation_levers"]
            .draw(*frames["ablation_levers"].values())
            .axes[0]
            .collections[0]
            .get_offsets()
        )
        == 6
    )


def test_seeds_are_compared_from_outcomes_alone(tmp_path):
    """What a curve does not reach is written into the picture, what it reaches is drawn."""
    found = fake_run.write_run(tmp_path / "many", seeds=2)
    drawn, _ = draw_all(found, tmp_path / "out", ("seeds_matched_safety", "seeds_differences"))
    table = pd.read_csv(tmp_path / "out" / "seeds_matched_safety.csv").set_index(
        ["method", "target"]
    )
    assert (
        table.loc[("DCR", 0.8), "compliance"] == pytest.approx(0.6 + 0.4 / 9, abs=1e-6)
        and (table["seeds"] == 2).all()
    )
    written = texts(drawn["seeds_matched_safety"])
    assert "not reached by 2 curves" in written and not any("nan" in t for t in written)
    differences = pd.read_csv(tmp_path / "out" / "seeds_differences.csv").set_index("quantity")
    assert (
        differences.loc["area", "difference"] > 0
        and differences.loc["compliance", "difference"].isna().all()
    )
    assert "at DSR 0.80" in texts(drawn["seeds_differences"]) and "area under the curve" in texts(
        drawn["seeds_differences"]
    )


def test_the_seeds_compare_as_committed():
    """`dcr compare` on the outcome tables in the repository gives the picture's numbers."""
    from dcr.tables.outcomes import compare

    found = compare(COMMITTED / "seeds" / "runs", n_boot=20)["seeds_matched_safety"]
    drawn = pd.read_csv(COMMITTED / "seeds" / "seeds_matched_safety.csv")
    pd.testing.assert_series_equal(found["compliance"], drawn["compliance"])
    assert found["seeds"].min() > 1 and not any(
        "text" in pd.read_csv(p, nrows=1) for p in (COMMITTED / "seeds" / "runs").rglob("*.csv")
    )


def test_harm_after_stage_one_is_read_against_the_base_model():
    """STL has no stage 1: its row is the base model and its values are the dashed lines; cells without the measure stay away."""
    table = pd.DataFrame(
        {
            "cell": ["STL", "STL: audited", "layer=0.5", "failed"],
            "method": ["STL", "STL", "DCR", "DCR"],
            "harm_auroc": [0.8, 0.8, 0.7, np.nan],
            "mean_auroc": [0.65, 0.65, 0.6, np.nan],
        }
    )
    axes = plots.harm_read(table).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base model", "layer=0.5"]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.8, 0.65]
    assert [tuple(c.get_offsets()[1]) for c in axes.collections] == [(0.7, 1), (0.6, 1)]


def test_over_seeds_averages_and_widens():
    rows = pd.DataFrame(
        {
            "method": "STL",
            "seed": [0, 1, 2],
            "value": [0.4, 0.5, 0.6],
            "low": [0.3, 0.4, 0.5],
            "high": [0.5, 0.6, 0.7],
            "n": 10,
        }
    )
    mean = over_seeds(rows).iloc[0]
    half = np.hypot(0.1, 1.96 * 0.1 / np.sqrt(3))
    assert (mean["value"], mean["seeds"], mean["n"]) == (pytest.approx(0.5), 3, 10)
    assert mean["high"] - mean["value"] == pytest.approx(half) and mean["value"] - mean[
        "low"
    ] == pytest.approx(half)


def test_every_method_and_class_has_its_own_look():
    assert (
        len(set(style.METHOD_COLOURS.values()))
        == len(style.METHOD_COLOURS)
        == len(set(style.METHOD_MARKERS.values()))
    )
    assert (
        set(style.CLASS_COLOURS)
        == set(style.CLASS_LINES)
        == set(style.CLASS_MARKERS)
        == {"toxic", "seemingly_toxic", "general"}
    )
    assert (
        style.method_look("mine") == style.method_look("mine")
        and style.method_look("DCR")["color"] == style.METHOD_COLOURS["DCR"]
    )
    assert style.in_order(["mine", "question-mark", "DCR", "base"]) == [
        "base",
        "DCR",
        "question-mark",
        "mine",
    ]


def test_the_classes_differ_in_grey():
    """Lightness of the three class colours, or their lines and markers, tell them apart without colour."""
    looks = {
        (style.CLASS_LINES[c], style.CLASS_MARKERS[c], style.CLASS_HATCHES[c])
        for c in style.CLASS_COLOURS
    }
    assert len(looks) == 3 and len(
        {(str(style.METHOD_LINES[m]), style.METHOD_MARKERS[m]) for m in style.METHOD_COLOURS}
    ) == len(style.METHOD_COLOURS)
