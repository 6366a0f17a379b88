"""Figures from made-up tables: every registered one is drawn, legible, repeatable, with the table's
numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fake_run
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dcr.errors import DCRError
from dcr.plots import style
from dcr.plots.panels import Curves, Dots, curves, dots, log_steps
from dcr.study.registry import FIGURES, figure_entry, load_all

load_all()
NEW = "plane frontier auroc_by_source source_shortcut gap same_rows judge_calibration".split()


def texts(figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def marks(ax) -> list[tuple[float, float]]:
    """(x, y) of every marker of an axes."""
    lines = [line for line in ax.lines if line.get_marker() not in ("None", "", None)]
    return [p for line in lines for p in zip(*line.get_data(), strict=True)]


def test_every_registered_figure_has_a_made_up_frame_and_the_new_ones_are_registered():
    assert set(FIGURES) <= set(fake_run.tables()) and set(NEW) <= set(FIGURES)
    assert {"matched_safety", "bias_frontier", "harm_scores"}.isdisjoint(FIGURES)


@pytest.mark.parametrize("name", list(FIGURES))
def test_figure_is_labelled_legible_and_leaves_its_table_alone(name):
    frame = fake_run.tables()[name]
    before = frame.copy()
    figure = FIGURES[name].draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    axes = [ax for ax in figure.axes if ax.axison]
    across = [ax.get_xlabel() for ax in axes] + [figure.get_supxlabel()]
    assert name in ("overview", "categories") or any(across), "no axis label"
    assert FIGURES[name].caption.endswith(".") and len(FIGURES[name].caption) > 40
    canvas = FigureCanvasAgg(figure)
    for _ in range(2):  # the layout settles as it does when saved
        canvas.draw()
    boxes = [
        (t.get_text(), t.get_window_extent(canvas.get_renderer()))
        for ax in figure.axes
        for t in (ax.title, ax.xaxis.label, ax.yaxis.label)
        if t.get_text()
    ]
    whole = [t for t in (figure._supxlabel, figure._supylabel) if t is not None and t.get_text()]
    boxes += [(t.get_text(), t.get_window_extent()) for t in whole]
    boxes += [("legend", legend.get_window_extent()) for legend in figure.legends]
    for i, (text, box) in enumerate(boxes):
        inside = box.x0 > -2 and box.y0 > -2 and box.x1 < figure.bbox.x1 + 2
        assert inside and box.y1 < figure.bbox.y1 + 2, f"{text!r} is cut"
        for other, second in boxes[i + 1 :]:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(wide, high) < 1.5, f"{text!r} over {other!r}"
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                label = tick.label1
                if label.get_visible() and label.get_text() and low <= tick.get_loc() <= high:
                    box = label.get_window_extent()
                    cut = box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1
                    assert not cut, f"tick label {label.get_text()!r} is cut"


@pytest.mark.slow
def test_every_figure_draws_what_its_table_function_makes(tmp_path):
    """The columns that tables make are those that figures read: on a made-up experiment."""
    from stub_experiment import StubExperiment

    from dcr.study.registry import read_table

    stub = StubExperiment(root=tmp_path)
    elsewhere = {"ablations", "search", "judge_calibration"}  # grids, and people's labels
    for name in sorted(set(FIGURES) - elsewhere):
        stub.table(name).to_csv(tmp_path / f"{name}.csv", index=False)
        assert FIGURES[name].draw(read_table(tmp_path / f"{name}.csv")).axes, name


def test_same_table_same_bytes_and_notebooks_show_the_saved_picture(tmp_path):
    for name in ("plane", "same_rows"):
        frame = fake_run.tables()[name]
        figure = FIGURES[name].draw(frame)
        shown, size = figure._repr_png_()
        style.save(figure, tmp_path / name)
        style.save(FIGURES[name].draw(frame), tmp_path / f"{name}-again")
        assert shown == (tmp_path / f"{name}.png").read_bytes() and 300 < size["width"] < 1100
        for kind in ("png", "svg"):
            one, two = (tmp_path / f"{n}.{kind}" for n in (name, f"{name}-again"))
            assert one.read_bytes() == two.read_bytes()
        assert b"<dc:date>" not in (tmp_path / f"{name}.svg").read_bytes()


def test_another_process_draws_the_same_bytes():
    """Whose hashes of text differ, and with them the order of sets."""
    code = (
        "import hashlib, fake_run; from dcr.plots.style import picture; "
        "from dcr.study.registry import FIGURES, load_all; load_all(); "
        "drawn = [FIGURES[n].draw(fake_run.tables()[n]) for n in ('paired', 'rates_by_form')]; "
        "print([hashlib.sha256(picture(f, 'svg')).hexdigest() for f in drawn])"
    )
    asked = [sys.executable, "-W", "ignore", "-c", code]
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parent), str(folder)])
    said = {
        subprocess.check_output(
            asked, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}, text=True
        )
        for seed in "123"
    }
    assert len(said) == 1


def test_plane_shows_both_ways_of_counting_with_the_tables_points():
    frame = fake_run.tables()["plane"]
    figure = FIGURES["plane"].draw(frame)
    assert [ax.get_title() for ax in figure.axes] == ["as published", "forms equal"]
    for ax, forms in zip(figure.axes, ("published", "equal"), strict=True):
        part = frame[frame["forms"] == forms]
        drawn = {c.get_label(): tuple(np.ravel(c.lines[0].get_data())) for c in ax.containers}
        known = part[part["nominal"]].set_index("method")
        assert drawn == {m: (r["dsr"], r["compliance"]) for m, r in known.iterrows()}
        way = [line for line in ax.lines if line.get_marker() == "."]
        assert len(way) == len(fake_run.METHODS) and all(len(w.get_xdata()) == 3 for w in way)
        assert max(w.get_alpha() for w in way) < 0.5
        ends = ax.containers[0].lines[2][1].get_segments()[0][:, 1]  # bar of compliance
        row = known.loc["base"]
        assert np.allclose(ends, [row["compliance_low"], row["compliance_high"]])
    two = FIGURES["plane"].draw(frame[frame["step"] != 0]).axes[0]
    assert not [line for line in two.lines if line.get_marker() == "."]


def test_losses_are_smoothed_and_families_of_stage_2_stand_apart():
    frame = fake_run.rows("method stage seed step", ["STL", "DCR"], ["align"], [0], range(1, 10))
    frame = frame.assign(loss=(frame["step"] == 5) * 5.0)
    axes = FIGURES["losses"].draw(frame).axes
    assert [ax.get_title()[-3:] for ax in axes] == ["STL", "DCR"]
    drawn = [line.get_ydata() for line in axes[0].lines if len(line.get_ydata()) == 9]
    assert drawn[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_the_kernel_has_a_column_before_alignment_and_one_for_each_step():
    frame = fake_run.tables()["kernel_trajectory"]
    axes = FIGURES["kernel_trajectory"].draw(frame).axes
    titles = ["before alignment", *(f"after step {s}" for s in (1, 4, 16, 64))]
    assert [ax.get_title() for ax in axes] == titles
    assert [y for _, y in marks(axes[1])] == [0, 1]  # nothing beside its tick


def test_rare_categories_are_not_drawn_and_seconds_start_at_0():
    frame = fake_run.tables()["categories"]
    rare = frame.assign(n=frame["category"].map({"privacy": 4, "w & t": 5}))
    labels = FIGURES["categories"].draw(rare).axes[0].get_yticklabels()
    assert [t.get_text() for t in labels] == ["s: w & t (5)"]
    few = FIGURES["categories"].draw(frame.assign(n=2)).axes[0].get_yticklabels()
    assert len(few) == 2  # a small run shows what it has
    alike = frame.assign(category=frame["category"].map("{:_>60}".format), n=9)
    alike = alike.assign(category="what is asked of a chemist who " + alike["category"])
    heat = FIGURES["categories"].draw(alike).axes[0]
    labels = [t.get_text() for t in heat.get_yticklabels()]
    assert labels == ["s: what is asked of a chemist who … (9)"] * 2
    cost = FIGURES["cost"].draw(fake_run.tables()["cost"])
    assert all(ax.get_xlim()[0] == 0 for ax in cost.axes)


@pytest.mark.parametrize("name", ["from $5 to $6", "pay $x^$ now", r"$\foo$ and", "one $"])
def test_a_name_with_dollars_is_no_mathematics(name):
    for what, column in (
        ("categories", "category"),
        ("plane", "method"),
        ("robustness", "wrapper"),
    ):
        frame = fake_run.tables()[what]
        named = frame.assign(**{column: frame[column].replace(frame[column].iloc[0], name)})
        svg = style.picture(FIGURES[what].draw(named), "svg").decode()
        assert name in svg.replace("&amp;", "&"), what


def test_frontier_shows_compliance_and_the_dsr_that_the_threshold_gives():
    frame = fake_run.tables()["frontier"]
    figure = FIGURES["frontier"].draw(frame)
    titles = [ax.get_title().replace("\n", " ") for ax in figure.axes]
    assert titles[:2] == ["compliance at DSR 0.80", "DSR given (aim 0.80)"] and len(titles) == 4
    for ax, target, value in ((0, 0.8, "compliance"), (3, 0.9, "dsr")):
        wanted = frame[frame["target"] == target][value].tolist()
        assert [x for x, _ in marks(figure.axes[ax])] == wanted
    assert figure.axes[3].lines[-1].get_xdata()[0] == 0.9


def test_sources_are_read_with_forms_equal_and_the_mean_stands_last():
    frame = fake_run.tables()["auroc_by_source"]
    figure = FIGURES["auroc_by_source"].draw(frame)
    titles = ["oktest", "or-80k (met; not in the mean)", "mean"]
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes] == titles
    equal = frame[frame["toxic_form"] == "balanced"].set_index(["source", "method"])["auroc"]
    assert [x for x, _ in marks(figure.axes[2])] == equal["mean"].tolist()
    every = FIGURES["auroc_by_source"].draw(frame.assign(met=True))
    assert [ax.get_title() for ax in every.axes] == ["oktest", "or-80k", "mean"]
    ax = FIGURES["source_shortcut"].draw(fake_run.tables()["source_shortcut"]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["oktest", "or-80k", "mean"]
    faces = {round(float(d.get_ydata()[0])): d.get_markerfacecolor() for d in ax.lines[:-1]}
    assert [faces[row] == "white" for row in range(3)] == [False, True, False]


def test_differences_are_filled_where_the_corrected_p_is_small():
    frame = fake_run.tables()["frontier_differences"]
    ax = FIGURES["frontier_differences"].draw(frame).axes[1]  # compliance at DSR 0.90
    faces = {line.get_markerfacecolor() for line in ax.lines if line.get_marker() in ("o", "s")}
    assert faces == {"white"}  # p_holm 0.2 and 0.9
    assert len(FIGURES["frontier_differences"].draw(frame).axes) == 3


def test_a_legend_of_long_names_fits_and_means_of_two_classes_are_two_rows():
    frame = fake_run.tables()["source_shortcut"]
    long = frame.replace({"matched pairs": "a pairing with a name of forty letters, or so"})
    figure = FIGURES["source_shortcut"].draw(long)
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    paired = fake_run.tables()["paired"]
    means = paired.assign(benchmark="mean").groupby(["method", "label"]).head(1)
    ax = FIGURES["paired"].draw(pd.concat([paired, means], ignore_index=True)).axes[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels[-2:] == ["mean, seemingly toxic", "mean, toxic"] and len(marks(ax)) == 6


def test_curves_average_seeds_with_their_range_and_bars_do_not_hide_one_another():
    frame = fake_run.rows("method seed step", ["STL"], [0, 1], [1, 2, 4])
    frame = frame.assign(loss=frame["step"] + frame["seed"])
    ax = curves(frame, "loss", Curves("step", "method", limits=None)).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [1.5, 2.5, 4.5]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 5
    one = fake_run.valued(fake_run.rows("method step", ["STL", "DCR"], [0, 4, 16]), seeds=1)
    lines = curves(one, "value", Curves("step", "method")).axes[0].lines
    starts = [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 3]
    assert len(set(starts)) == 2 and max(starts) < 0.1


def test_steps_are_named_as_they_are_and_stand_apart():
    ax = curves(
        fake_run.rows("method step value", ["a"], range(1, 500), [0.5]),
        "value",
        Curves("step", "method"),
    ).axes[0]
    ticks = [int(t.get_text()) for t in ax.get_xticklabels()]
    assert ticks[0] == 1 and len(ticks) <= 7
    log_steps(ax, pd.Series([0, 50, 52, 100]))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "50", "100"]


def test_dots_draw_every_row_once_and_rows_without_a_value_keep_their_place():
    frame = fake_run.tables()["ablations"]
    figure = FIGURES["ablations"].draw(frame)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["layer=0.5", "loss=nt (failed)", "layer=0.7"]
    assert len(marks(figure.axes[0])) == 4
    many = fake_run.rows("method value", list("abc"), [0.1, 0.2])
    assert len(marks(dots(many, "value", Dots("method")).axes[0])) == 6


def test_logarithmic_axes_of_less_than_a_decade_name_their_ticks_apart():
    frame = fake_run.tables()["proposition"]
    narrow = frame.assign(bilinear=31_900 + 3_000 * frame["i"], kernel=2e4 + 1e3 * frame["i"])
    figure = FIGURES["proposition"].draw(narrow)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [t for t in figure.axes[0].xaxis.get_major_ticks() if low <= t.get_loc() <= high]
    boxes = [t.label1.get_window_extent() for t in ticks]
    assert len(boxes) >= 2 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_missing_columns_no_rows_and_mixed_profiles_are_refused():
    draw, frame = FIGURES["gap"].draw, fake_run.tables()["gap"]
    with pytest.raises(DCRError, match="figure gap: its table lacks .*'auroc'"):
        draw(frame.drop(columns="auroc"))
    with pytest.raises(DCRError, match="figure gap: its table has no rows"):
        draw(frame.head(0))
    with pytest.raises(DCRError, match="profiles a, b mix"):
        draw(frame.assign(profile=["a", *["b"] * (len(frame) - 1)]))
    with pytest.raises(DCRError, match="did you mean: plane"):
        figure_entry("plan")


def test_methods_are_told_apart_by_colour_and_marker_and_new_ones_keep_their_look():
    from dcr.config import methods_file

    assert {*methods_file(), "question-mark"} <= set(style.METHODS) | {"SelfCD", "DCR-tuned"}
    looks = [tuple(map(str, style.METHODS[m])) for m in style.METHODS]
    assert len({c for c, _ in looks}) == len(looks)
    shared = [m for m, n in Counter(m for _, m in looks).items() if n > 1]
    assert sorted(shared) == ["D", "v"]  # by families of hues far apart
    assert style.METHODS["DCR"][1] != style.METHODS["DCR-token"][1]
    assert style.method_look("mine") == style.method_look("mine") != style.method_look("yours")
    assert style.in_order(["mine", "DCR", "base", "DCR"]) == ["base", "DCR", "mine"]
    assert set(style.looks(["toxic", "general"])) == {"toxic", "general"}
    others = style.looks([f"source {i}" for i in range(20)]).values()
    assert len({tuple(look.values()) for look in others}) == 20


def test_a_figure_from_outside_the_package_is_registered_under_its_name():
    from matplotlib.figure import Figure

    @style.drawing
    def from_outside_(table: pd.DataFrame) -> Figure:
        """A figure of somebody else's: its caption is its docstring."""
        return dots(table, "value", Dots("method"))

    try:
        entry = figure_entry("from_outside")
        assert entry.caption.startswith("A figure of somebody")
        assert marks(entry.draw(fake_run.rows("method value", ["a"], [0.3])).axes[0]) == [(0.3, 0)]
    finally:
        FIGURES.pop("from_outside")
