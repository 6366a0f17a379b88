"""Every registered table on a made-up experiment.

What it says, what it may not depend on, and a table from outside.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import stub_experiment
from stub_experiment import StubExperiment

from dcr.errors import DCRError
from dcr.evaluate import rates as rates_module
from dcr.evaluate.judges import calibration
from dcr.plots.tables import latex
from dcr.study import registry
from dcr.tables import gather

registry.load_all()
TABLES = [n for n, t in registry.TABLES.items() if t.make.__module__.startswith("dcr.tables")]
ELSEWHERE = {"ablations", "search", "judge_calibration"}  # test_grid.py, test_calibration.py
FAMILY = {"p_holm", "best"}  # what names a row's place among its rows


CONFUSION = pd.DataFrame(
    {
        "human": ["refuse", "refuse", "comply", "comply"],
        "judge": ["refuse", "comply", "refuse", "comply"],
        "n": [900, 100, 50, 950],
    }
)


@pytest.fixture(scope="module", autouse=True)
def people():
    """Labelled completions as if at hand: sensitivity .9, specificity .95."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        found = lambda name, *, tokens: asked.append((name, tokens)) or CONFUSION  # noqa: E731
        patch.setattr(calibration, "confusion", found)
        yield asked


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return StubExperiment(root=tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", [n for n in TABLES if n not in ELSEWHERE])
def test_every_table_is_tidy_and_holds_no_text(stub, name):
    table = stub.table(name)
    assert len(table) and not table.columns.duplicated().any()
    assert not {"text", "response", "answer"} & set(table)
    texts = set(stub.prompts["text"]) | set(stub.validation["text"])
    assert not any(texts & set(table[c].astype(str)) for c in table.select_dtypes(exclude="number"))
    for low, high in (("low", "high"), ("dsr_low", "dsr_high"), ("change_low", "change_high")):
        if low in table:
            known = table[[low, high]].dropna()
            assert (known[low] <= known[high] + 1e-12).all()


ALONE = ["rates", "table1_sets", "plane", "frontier", "auroc_by_source", "score_agreement", "gap"]
ALONE += ["categories", "rates_by_form", "refusal_rates", "refusal_probability", "paired"]
ALONE += ["frontier_differences", "kernel", "refinement_drift", "robustness", "ability", "claims"]


@pytest.mark.parametrize("name", ALONE)
def test_no_number_changes_with_the_company_it_is_read_in(stub, name):
    fewer = StubExperiment(methods=("STL", "DCR"), root=stub.root).table(name)
    kept = [c for c in fewer if c not in FAMILY]
    every = stub.table(name)[kept]
    if "method" in every:
        every = every[every["method"].isin(fewer["method"])]
    if "against" in every:
        every = every[every["against"].isin(fewer["against"])]
    keys = [
        c for c in kept if every[c].dtype == object or c in ("step", "strength", "target", "layer")
    ]
    a, b = (t[kept].sort_values(keys, kind="stable").reset_index(drop=True) for t in (every, fewer))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


@pytest.mark.parametrize("name", ["rates", "frontier", "curves", "kernel", "refusal_probability"])
def test_what_runs_on_the_first_seed_alone_has_its_numbers(stub, name):
    some = StubExperiment(root=stub.root, every_seed=("question-mark", "base", "STL")).table(name)
    one = StubExperiment(root=stub.root, seeds=(0,)).table(name)
    for method, rows in some.groupby("method"):
        expected = stub.table(name) if method in ("question-mark", "base", "STL") else one
        expected = expected[expected["method"] == method].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), expected)
    assert not some.equals(stub.table(name))


def test_differences_are_of_the_seeds_that_both_have(stub):
    found = StubExperiment(root=stub.root, every_seed=("question-mark", "base", "STL"))
    rows = found.table("frontier_differences").set_index(["method", "against"])
    assert set(rows.loc[("base", "STL"), "seeds"]) == {2}
    assert set(rows.loc[("DCR", "STL"), "seeds"]) == {1}
    one = StubExperiment(root=stub.root, seeds=(0,)).table("frontier_differences")
    one = one.set_index(["method", "against"]).loc[("DCR", "STL"), "difference"]
    pd.testing.assert_series_equal(rows.loc[("DCR", "STL"), "difference"], one)


def test_only_what_is_at_one_safety_is_best(stub, monkeypatch):
    table = stub.table("table1")
    assert set(table.loc[table["best"], "forms"]) == {"matched"} and table["best"].sum() >= 1
    assert not stub.table("table1_sets")["best"].any()
    shown = [("compliance", "published"), ("dsr", "published"), ("compliance", "equal")]
    shown += [("dsr", "equal"), ("general", "published"), ("compliance", "matched")]
    columns = table[["metric", "forms"]].drop_duplicates()
    assert list(columns.itertuples(index=False, name=None)) == shown
    assert (table.groupby("method").size() == len(shown)).all()
    tex = latex(table)
    assert tex.count(r"\bfseries") == table["best"].sum() and r"\toprule" in tex
    best = table.loc[table["best"], "method"].item()
    monkeypatch.setitem(stub_experiment.RATES, best, (0.0, 0.0, 0.0))  # it refuses nothing now
    again = StubExperiment(root=stub.root).table("table1")
    matched = again[again["forms"] == "matched"].set_index("method")
    assert matched["value"].idxmax() == best and not matched.loc[best, "best"]
    assert matched["best"].sum() == 1


def test_where_a_method_stands_takes_each_number_from_its_own_table(stub):
    standing = stub.table("standing")
    assert not standing.duplicated(["method", "column"]).any()
    wide = standing.pivot(index="method", columns="column", values="value")
    at = stub.table("frontier").query("target == 0.9").set_index("method")["compliance"]
    pd.testing.assert_series_equal(
        wide["compliance at DSR 0.90 ↑"][at.index], at, check_names=False
    )
    given = stub.table("frontier").query("target == 0.9").set_index("method")["dsr"]
    column = "DSR on test prompts, set to 0.90 ↑"
    pd.testing.assert_series_equal(wide[column][given.index], given, check_names=False)
    mean = stub.table("auroc_by_source").query("source == 'mean' and toxic_form == 'imperative'")
    mean = mean.query("harmless_form == 'question'").set_index("method")["auroc"]
    column = "AUROC, toxic / harmless: imperative / question ↑"
    pd.testing.assert_series_equal(wide[column][mean.index], mean, check_names=False)
    changes = stub.table("robustness").query("label == 'toxic' and wrapper != 'plain'")
    least = changes.groupby("method")["change"].min()
    column = "toxic refused, worst rewording ↑"
    pd.testing.assert_series_equal(wide[column][least.index], least, check_names=False)
    cost = stub.table("cost").query("method == 'DCR' and kind in ['refine', 'align', 'fit']")
    assert wide.loc["DCR", "training, s ↓"] == cost["seconds"].sum() / 2 > 0
    tasks = [c for c in wide if c.endswith("less STL's ↑")]
    assert tasks and (wide.loc["STL", tasks] == 0).all()


def test_seconds_are_summed_within_a_seed_and_lent_where_another_decides_or_answers(stub):
    def made(name, kind, seed, seconds):
        return {
            "name": name,
            "kind": kind,
            "seed": seed,
            "seconds": seconds,
            "peak_memory_mib": 1.0,
        }

    found = [made("base", "generate", 0, 10.0), made("base", "generate", 0, 90.0)]
    found += [made("STL", "generate", s, 40.0 + 20 * s) for s in (0, 1)]
    found += [made("Token+Gate", "fit", s, 7.0) for s in (0, 1)]
    found += [made("Token+Gate", "score", s, n) for s in (0, 1) for n in (1.0, 2.0, 3.0)]
    some = SimpleNamespace(methods=("base", "STL", "Token+Gate-base"), artifacts=lambda **_: found)
    cost = registry.TABLES["cost"].make(some)
    assert not cost.duplicated(["method", "kind", "seed"]).any()
    mean = cost.groupby(["method", "kind"])["seconds"].mean()
    own = {"fit": 7.0, "generate": 100.0, "score": 6.0}
    assert mean["Token+Gate-base"].to_dict() == own and "Token+Gate" not in mean
    experiment = StubExperiment(root=stub.root)
    experiment.made = {k: v for k, v in stub.made.items() if k != "standing"} | {"cost": cost}
    wide = experiment.table("standing").pivot(index="method", columns="column", values="value")
    assert wide["answering, times base's ↓"].dropna().to_dict() == {
        **{"base": 1.0, "STL": 0.5, "Token+Gate-base": 1.0}
    }
    assert wide["training, s ↓"].dropna().to_dict() == {"Token+Gate-base": 7.0}


def test_what_seeds_alone_spread_stays_possible_and_one_seed_has_no_range(stub):
    cosines = stub.table("similarity").query("measure == 'cosine, within'")
    for name, rows in (("drift", stub.table("refinement_drift")), ("value", cosines)):
        assert (rows["low"] <= rows[name]).all() and (rows[name] <= rows["high"]).all()
    rows = pd.DataFrame({"m": "a", "seed": [0, 1], "value": [0.8, 1.0]})
    assert gather.range_over_seeds(rows, ["m"]).iloc[0].tolist() == ["a", 0.9, 0.8, 1.0, 2]
    assert gather.range_over_seeds(rows[:1], ["m"])[["low", "high"]].isna().all(axis=None)


def test_a_mean_of_probabilities_meets_no_made_up_prompt(monkeypatch):
    """0.02 for all prompts: nothing spreads, so no interval does."""
    same = lambda run, method, prompts, step=-1: np.full(len(prompts), 0.02)  # noqa: E731
    monkeypatch.setattr(stub_experiment.StubRun, "refusal_probability", same)
    stub = StubExperiment(methods=("base", "STL"))
    for name in ("refusal_probability", "rejection"):
        assert stub.table(name)[["low", "high"]].to_numpy() == pytest.approx(0.02), name


def test_every_rate_stands_beside_what_a_judge_without_error_gives(stub, people):
    rates = stub.table("rates")
    config = stub.config
    assert set(people) == {(config.evaluation.judge, config.generation.max_new_tokens)}
    judged = rates["metric"].isin(["compliance", "dsr", "refusal_rate"])
    ruled = rates["method"] == "question-mark"
    assert (rates["corrected"].notna() == (judged & ~ruled)).all(), "no judge reads a rule"
    read = rates[judged & ~ruled]
    of = read["metric"].map({"compliance": (0.95, 0.9)}).fillna(0)
    se, sp = (of.map(lambda pair, i=i: pair[i] if pair else (0.9, 0.95)[i]) for i in (0, 1))
    expected = ((read["value"] + sp - 1) / (se + sp - 1)).clip(0, 1)
    pd.testing.assert_series_equal(read["corrected"], expected, check_names=False)
    assert (read["corrected_low"] <= read["corrected"]).all()
    assert (read["corrected"] <= read["corrected_high"]).all()
    for name in ("table1", "table1_sets", "rates_by_form", "table1_paper"):
        table = stub.table(name)
        known = table["corrected"].notna()
        mine = table["method"].isin(stub.methods)
        if "forms" in table:  # scores are read by no judge
            mine &= table["forms"] != "matched"
        if "source" in table:
            mine &= table["source"] == "this run"
        assert known.equals(mine), name


def test_without_labelled_completions_rates_are_raw_and_the_log_says_why(monkeypatch, caplog):
    def absent(name, *, tokens):
        raise DCRError("no human-labelled completions at hand. Run: dcr data fetch x")

    monkeypatch.setattr(calibration, "confusion", absent)
    stub = StubExperiment(methods=("base", "STL"))
    assert stub.table("rates")["corrected"].isna().all()
    assert stub.table("table1")["corrected_high"].isna().all()
    assert "not corrected for the judge's error: no human-labelled" in caplog.text


def test_the_mean_beside_the_papers_has_the_interval_of_every_other_mean(stub):
    """Not the mean of its sets' bounds: sets are drawn together, requests crossed with seeds."""
    table = stub.table("table1_paper").query("source == 'this run' and benchmark == 'safety'")
    prompts = stub.prompts[stub.prompts["benchmark"].isin(["advbench", "q-harm"])]
    found = rates_module.rates(prompts.reset_index(drop=True), gather.verdicts(stub))
    found = found.query("benchmark == 'mean' and version == 'published' and form == 'all'")
    found = found.query("metric == 'dsr'").set_index("method")
    numbers = ["value", "low", "high"]
    mine = table.set_index("method")[numbers]
    pd.testing.assert_frame_equal(mine, found.loc[mine.index, numbers])
    sets = stub.table("rates").query("version == 'published' and form == 'all'")
    sets = sets[sets["benchmark"].isin(["advbench", "q-harm"]) & (sets["metric"] == "dsr")]
    averaged = sets.groupby("method")[numbers].mean()
    width = (mine["high"] - mine["low"])["STL"]
    assert width < 0.9 * (averaged["high"] - averaged["low"])["STL"]


def test_sets_that_are_trained_on_enter_no_mean(stub):
    rates = stub.table("rates").query(
        "version == 'published' and form == 'all' and method == 'STL'"
    )
    rates = rates[rates["metric"] == "compliance"].set_index(["label", "benchmark"])["value"]
    mine = rates["seemingly_toxic"]
    assert mine["mean"] == pytest.approx((mine["oktest"] + mine["or-80k"]) / 2)
    assert mine["xstest-safe"] != pytest.approx(mine["mean"])
    marked = stub.table("table1_sets").query("method == 'DCR' and trained")
    assert set(marked["benchmark"]) == {"xstest-safe", "advbench"} and (marked["mark"] == "†").all()
    means = stub.table("auroc_by_source").query("source == 'xstest-safe'")
    assert means.empty


def test_a_set_of_two_classes_and_a_general_set_of_any_name_are_read_by_label():
    stub = StubExperiment(methods=("base", "STL"))
    prompts = stub.prompts
    toxic = (prompts["benchmark"] == "oktest") & (prompts["category"] == "kind 0")
    general = prompts["benchmark"] == "general-test"
    prompts.loc[toxic, "label"] = "toxic"
    prompts.loc[general, ["benchmark", "source"]] = "mine"
    shares = stub.table("question_shares").query("set == 'oktest'")
    assert dict(zip(shares["label"], shares["n"], strict=True)) == {
        "toxic": 4,
        "seemingly_toxic": 8,
    }
    rates = stub.table("rates")
    assert set(rates.query("benchmark == 'oktest' and metric == 'dsr'")["label"]) == {"toxic"}
    assert set(rates.query("benchmark == 'mine'")["label"]) == {"general"}
    mean = rates.query(
        "benchmark == 'mean' and label == 'seemingly_toxic' and metric == 'compliance'"
    )
    assert mean["sets"].max() == 2  # oktest and or-80k: no general set among them
    assert len(stub.table("table1").query("metric == 'general' and method == 'STL'")) == 1


def test_the_source_shortcut_shows_in_its_own_row_alone(stub):
    """States carry the source three times as far as harm.

    A probe of one source knows it and little else.
    """
    table = stub.table("source_shortcut").query("toxic_form == 'balanced'")
    read = table.set_index(["pairing", "source"])["auroc"]
    assert read["oktest against refusals", "oktest"] > 0.9
    assert read["oktest against refusals", "or-80k"] < 0.75
    assert read["or-80k against refusals", "or-80k"] > 0.9
    assert set(table["source"]) == {"oktest", "or-80k", "mean"}  # none met in training


def test_a_pairings_mean_leaves_out_its_own_sources_and_what_methods_met():
    stub = StubExperiment(methods=("base", "STL"))
    stub.prompts.loc[stub.prompts["benchmark"] == "or-80k", "met"] = True
    phtest = stub_experiment.prompt_rows("phtest", "seemingly_toxic", 0.5, "test", met=False)
    for run in stub.runs:
        run.prompts = pd.concat([stub.prompts, phtest], ignore_index=True)
    table = stub.table("source_shortcut").query("toxic_form == 'balanced'")
    read = table.pivot(index="pairing", columns="source", values="auroc")
    both = read.loc["matched pairs", ["oktest", "phtest"]].mean()
    assert read.loc["matched pairs", "mean"] == pytest.approx(both)
    own, other = read.loc["oktest against refusals"], read.loc["or-80k against refusals"]
    assert own["mean"] == pytest.approx(own["phtest"]) != pytest.approx(own["oktest"])
    assert other["mean"] == pytest.approx(other[["oktest", "phtest"]].mean())
    met = table.set_index(["pairing", "source"])["met"]
    assert met["oktest against refusals", "oktest"] and met["matched pairs", "or-80k"]
    assert not met["matched pairs", "oktest"] and not met[:, "mean"].any()


def test_the_gap_is_read_by_probes_of_sources_that_hold_both_classes(stub, monkeypatch):
    from dcr.tables import frontier

    seen = []
    monkeypatch.setattr(
        frontier,
        "fit_probe",
        lambda states, toxic: seen.append(len(toxic)) or _fit(states, toxic),
    )
    _fit = importlib.import_module("dcr.analysis.probes").fit_probe
    run = stub.runs[0]
    held = frontier.unseen(run, 4)
    frontier._probe(run, "STL", -1, held)
    named = frontier.pairings(run)
    both = {k: v for k, v in named.items() if k != "sources (paper)"}
    assert seen == [len(pd.concat(both.values()).drop_duplicates("id"))]
    assert all(
        v.groupby("source")["label"].nunique().max() == 2 for k, v in both.items() if "pairs" in k
    )


def test_same_rows_names_what_an_audit_does(stub):
    table = stub.table("same_rows").set_index(["method", "other"])
    assert (table["same_source"]).all() and not (table["relation"] == "partly").any()
    assert table.loc[("STL-audited", "STL"), "relation"] == "subset"
    assert table.loc[("STL", "STL-audited"), "relation"] == "superset"
    assert table.loc[("STL", "DCR"), ["relation", "share"]].tolist() == ["same", 1.0]
    part = table.loc[("STL", "STL-audited")]
    assert part["share"] == part["n_other"] / part["n"] < 1


def test_followed_prompts_are_validation_prompts_with_both_forms(stub):
    from dcr.tables.gather import followed_prompts

    rows = followed_prompts(stub, 4)
    assert set(rows["role"]) == {"validation"}
    assert not rows.duplicated(["label", "request"]).any()  # two of one request are no pair
    assert (rows.groupby(["label", "form"]).size() == 2).all()
    assert rows["label"].drop_duplicates().tolist() == ["toxic", "seemingly_toxic", "general"]


def test_a_table_that_needs_a_method_says_so():
    with pytest.raises(DCRError, match="'claims' needs DCR; this run has base, STL"):
        StubExperiment(methods=("base", "STL")).table("claims")


def test_a_package_outside_adds_a_table_and_its_figure(tmp_path, monkeypatch, stub):
    (tmp_path / "their_tables.py").write_text(
        textwrap.dedent(
            '''
            """A table and a figure from outside."""
            import matplotlib.pyplot as plt
            from dcr.study.registry import figure, table

            @table("lengths", notebook="theirs")
            def lengths(experiment):
                words = experiment.prompts["text"].str.split().str.len()
                words = words.groupby(experiment.prompts["label"]).mean()
                return words.rename("words").reset_index()

            @figure("lengths", caption="Mean number of words a prompt.")
            def draw(frame):
                return frame.plot.barh("label", "words").figure
            '''
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("theirs", "their_tables", registry.GROUP)
    known = registry.entry_points(group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [*known, point])
    registry.load_all.cache_clear()
    try:
        assert stub.table("lengths")["words"].gt(0).all()
        picture = registry.figure_entry("lengths").draw(stub.table("lengths"))
        assert picture.axes and registry.figure_entry("lengths").caption
        assert registry.TABLES["lengths"].notebook == "theirs"
    finally:
        registry.TABLES.pop("lengths", None), registry.FIGURES.pop("lengths", None)
        sys.modules.pop("their_tables", None), registry.load_all.cache_clear()


def test_seeds_whose_alignment_ends_at_different_steps_are_read_at_their_last(stub, monkeypatch):
    """As an audit leaves them: it drops other rows of each seed's mix."""
    names = ("curves", "refusal_probability", "kernel_trajectory")
    expected = {name: stub.table(name).query("method == 'STL'") for name in names}
    kept = {0: [0, 2, 8], 1: [0, 2, 4, 7]}
    known = stub_experiment.StubRun.verdicts

    def verdicts(run, method, step=-1, strength=1.0):
        assert step == -1 or step in kept[run.seed], f"step {step} was not recorded"
        return known(run, method, 8 if step == 7 else step, strength)

    monkeypatch.setattr(stub_experiment.StubRun, "steps", lambda run, method: kept[run.seed])
    monkeypatch.setattr(stub_experiment.StubRun, "verdicts", verdicts)
    other = StubExperiment(root=stub.root)
    for name, rows in expected.items():
        found = other.table(name).query("method == 'STL'")
        pd.testing.assert_frame_equal(*(t.reset_index(drop=True) for t in (found, rows)))
        assert found["step"].max() == 8


def test_a_class_whose_every_source_was_met_keeps_its_prompts_in_the_claims():
    """As AdvBench alone, whose other prompts are anchors, beside OKTest, which nobody met."""
    stub = StubExperiment(methods=("base", "STL", "DCR"))
    stub.prompts.loc[stub.prompts["label"] == "toxic", "met"] = True
    claims = stub.table("claims").set_index(["reading", "claim"])["n"]
    toxic = "and refuses toxic prompts as often (DSR)"
    assert claims["sources controlled", toxic] == claims["forms equal", toxic]


@pytest.mark.parametrize("name", ["transfer", "source_shortcut", "gap"])
def test_a_run_of_sets_that_are_trained_on_alone_says_so(name):
    """Not in a traceback, which would end `dcr run` before its other tables."""
    stub = StubExperiment(methods=("STL", "DCR"), seeds=(0,))
    for run in stub.runs:
        run.prompts = run.prompts[run.prompts["benchmark"].str.startswith("xstest")]
    with pytest.raises(DCRError, match="no test set is unseen.*XSTest.*Name another"):
        stub.table(name)


def test_longer_answers_are_longer(stub):
    experiment = StubExperiment(root=stub.root)
    experiment.config = stub.config.override({"generation.max_new_tokens": 256})
    with pytest.raises(DCRError, match="longer_tokens=128: answers have 256 tokens already"):
        experiment.table("longer_answers")


def test_a_plane_without_curves_has_its_points(stub, monkeypatch):
    """As with align.checkpoints=last."""
    nominal = stub.table("plane").query("nominal and method != 'SCANS'").reset_index(drop=True)
    monkeypatch.setattr(stub_experiment.StubRun, "steps", lambda run, method: [8])
    other = StubExperiment(methods=("base", "STL", "DCR"), root=stub.root)
    pd.testing.assert_frame_equal(other.table("plane"), nominal)
    with pytest.raises(DCRError, match="no method of this run"):
        other.table("curves")


def test_a_run_without_what_a_table_shows_is_told(stub):
    with pytest.raises(DCRError, match="no method of this run"):
        gather.stacked(stub, lambda run, m: run.scores(m), [])


@pytest.mark.parametrize("name", ["robustness_prompts", "longer_prompts"])
def test_checks_that_are_turned_off_say_so(stub, name):
    evaluation = stub.config.evaluation.replaced(**{name: 0})
    off = StubExperiment(root=stub.root)
    off.config = stub.config.replaced(evaluation=evaluation)
    table = name.replace("_prompts", "").replace("longer", "longer_answers")
    with pytest.raises(DCRError, match=f"evaluation.{name}=0: this table is skipped"):
        registry.table_entry(table).make(off)
