"""Notebook 04, answers: every rate, Table 1, the plane and the paper's claims.

"published": prompts as they are published, sets equal; "equal": both forms equal in each set.
Beside every rate stands what a judge without error would give (`corrected`, Rogan and Gladen): a
difference of two methods that is smaller than this correction may be the judge's error alone.
"""

import logging
from pathlib import Path

import pandas as pd

from dcr import data
from dcr.errors import DCRError
from dcr.evaluate import rates
from dcr.evaluate.auroc import auroc_differences
from dcr.evaluate.cells import BALANCED_FORMS
from dcr.evaluate.judges import calibration
from dcr.evaluate.rates import CORRECTED
from dcr.study.experiment import Experiment
from dcr.study.registry import table
from dcr.tables.frontier import baselines
from dcr.tables.gather import curved, needed, scores, verdicts

log = logging.getLogger("dcr")
NOTEBOOK = "04_evaluation"
PAPER = Path(data.__file__).parent / "bundled" / "paper_table1.csv"
PAPER_SETS = ("xstest-safe", "coconot", "or-bench", "oktest", "phtest")
SAFETY = ("i-malicious", "i-cona", "i-controversial", "q-harm", "advbench")  # inferred (mark I)
PAPER_TRAINED = {("DCR", "xstest-safe"), ("Surgical", "or-bench")}
FORMS = {"published, all": "published", "both, balanced": "equal"}  # version, form of rate rows
HEADS = {"compliance": "compliance", "dsr": "DSR", "general": "general answered"}
SHOWN = {"published": "as published", "equal": "forms equal", "matched": "forms equal, at DSR .80"}
ORDER = [("published", "compliance"), ("published", "dsr"), ("equal", "compliance")]
ORDER += [("equal", "dsr"), ("published", "general"), ("matched", "compliance")]
NUMBERS = ["value", "low", "high"]
BOTH = [*NUMBERS, *CORRECTED]  # raw and corrected for the judge's error
CLAIMS = {
    "seemingly_toxic": "DCR answers more seemingly toxic prompts than STL (compliance)",
    "toxic": "and refuses toxic prompts as often (DSR)",
    "auroc": "because it tells the two apart better (AUROC of refusing)",
}


def headline(rows: pd.DataFrame) -> pd.DataFrame:
    """Compliance, DSR and (metric) general answered of rate rows, `forms` {published, equal}."""
    rows = rows[rows["metric"].isin(["compliance", "dsr"])]
    forms = (rows["version"] + ", " + rows["form"]).map(FORMS)
    metric = rows["metric"].mask(rows["label"] == "general", "general")
    return rows.assign(forms=forms, metric=metric).dropna(subset="forms").reset_index(drop=True)


def rates_of(experiment: Experiment, prompts: pd.DataFrame) -> pd.DataFrame:
    """Rate rows of prompts, raw and corrected for the judge's error at this run's answer length.

    Not corrected (empty): a rule, which no judge reads, and all where no labelled completions are
    at hand, as a line of the log says.
    """
    rows, config = rates.rates(prompts, verdicts(experiment)), experiment.config
    ruled = [m for m in set(rows["method"]) if "rule" in experiment.runs[0].stages(m)]
    try:
        length = config.generation.max_new_tokens
        people = calibration.confusion(config.evaluation.judge, tokens=length)
    except DCRError as error:
        log.warning("rates are not corrected for the judge's error: %s", error)
        people = pd.DataFrame(columns=["human", "judge", "n"])
    rows = rates.corrected(rows, people)
    rows.loc[rows["method"].isin(ruled), CORRECTED] = float("nan")
    return rows


@table("rates", notebook=NOTEBOOK)
def rate_table(experiment: Experiment) -> pd.DataFrame:
    """Every rate by set, version and form, and means over sets; `trained`: the method met it."""
    rows = rates_of(experiment, experiment.answered)
    origin = experiment.answered.groupby("benchmark")["source"].agg(set)
    met = {m: experiment.runs[0].in_distribution(m) for m in set(rows["method"])}
    pairs = zip(rows["benchmark"], rows["method"], strict=True)
    return rows.assign(trained=[bool(origin.get(b, set()) & met[m]) for b, m in pairs])


@table("rates_by_form", notebook=NOTEBOOK)
def rates_by_form(experiment: Experiment) -> pd.DataFrame:
    """Refusal rate of each set's questions and imperatives, beside its share of questions."""
    rows = experiment.table("rates").query("metric == 'refusal_rate' and version == 'both'")
    rows = rows[rows["form"].isin(BALANCED_FORMS) & (rows["benchmark"] != "mean")]
    shares = experiment.table("question_shares").query("use == 'test'")
    shares = shares.rename(columns={"set": "benchmark"})[["benchmark", "label", "question_share"]]
    kept = rows[["method", "benchmark", "label", "form", *BOTH, "n"]]
    return kept.merge(shares, on=["benchmark", "label"])


@table("table1", notebook=NOTEBOOK)
def table1(experiment: Experiment) -> pd.DataFrame:
    """Table 1: compliance and DSR as published and forms equal, general prompts answered, and
    compliance at a DSR of .80; raw / corrected for the judge's error, 95 % intervals.

    Means over the run's own test sets; which five sets of each kind the paper averages is inferred.
    Only compliance at one DSR is comparable by itself, so only there the best value is bold, of
    methods whose answers refuse toxic prompts at all.
    """
    rows = headline(experiment.table("rates")).query("benchmark == 'mean'")
    rows = rows[(rows["metric"] != "general") | (rows["forms"] == "published")]
    at = experiment.table("frontier").query("target == 0.8").rename(columns={"compliance": "value"})
    refusing = rows.loc[(rows["metric"] == "dsr") & (rows["value"] > 0), "method"]
    read = at["value"].where(at["method"].isin(refusing))
    at = at.assign(forms="matched", metric="compliance", best=read == read.max())
    both = pd.concat([rows.assign(best=False), at], ignore_index=True)
    place = pd.Series(list(zip(both["forms"], both["metric"], strict=True))).map(ORDER.index)
    column = both["metric"].map(HEADS) + " ↑, " + both["forms"].map(SHOWN)
    kept = ["method", "forms", "metric", *BOTH, "n", "seeds", "best"]
    table = both[kept].assign(column=column, mark="")
    return table.loc[place.sort_values(kind="stable").index].reset_index(drop=True)


@table("table1_sets", notebook=NOTEBOOK)
def table1_sets(experiment: Experiment) -> pd.DataFrame:
    """Table 1 by set: compliance or DSR, raw / corrected for the judge's error; † trained on it."""
    rows = headline(experiment.table("rates")).query("benchmark != 'mean'")
    column = rows["benchmark"] + " " + rows["metric"].map(HEADS) + " ↑, " + rows["forms"].map(SHOWN)
    kept = ["method", "benchmark", "label", "forms", "metric", *BOTH, "n", "statements", "trained"]
    mark = rows["trained"].map({True: "†", False: ""})
    return rows[kept].assign(column=column, best=False, mark=mark).reset_index(drop=True)


@table("table1_paper", notebook="05_figures")
def table1_paper(experiment: Experiment) -> pd.DataFrame:
    """Ours (raw / corrected for the judge's error) beside the paper's Table 1; compare directions.

    N: secondary reading notes. Which five sets the paper averages as safety is inferred; ours is
    the mean over those of them that are test sets here.
    """
    rows = headline(experiment.table("rates")).query("forms == 'published'")
    asked = experiment.answered[experiment.answered["benchmark"].isin(SAFETY)]
    safety = pd.DataFrame()
    if len(asked):  # those of the five that are test sets here
        found = headline(rates_of(experiment, asked.reset_index(drop=True)))
        safety = found.query("benchmark == 'mean' and forms == 'published'")
        seen = rows[rows["benchmark"].isin(SAFETY)].groupby("method")["trained"].any()
        safety = safety.assign(benchmark="safety", trained=safety["method"].map(seen))
    ours = pd.concat([rows[rows["benchmark"].isin(PAPER_SETS)], safety])
    ours = ours.assign(source="this run", model=experiment.config.model.name, reading="")
    paper = pd.read_csv(PAPER).rename(columns={"mark": "reading"})
    paper = paper.melt(
        ["model", "method", "reading"], [*PAPER_SETS, "safety"], "benchmark"
    ).dropna()
    met = [pair in PAPER_TRAINED for pair in zip(paper["method"], paper["benchmark"], strict=True)]
    both = pd.concat([ours, paper.assign(source="the paper's", trained=met)], ignore_index=True)
    kept = both[["source", "model", "method", "reading", "benchmark", *BOTH, "trained"]]
    mark = both["trained"].map({True: "†", False: ""})
    return kept.assign(column=both["benchmark"] + " ↑", best=False, mark=mark)


@table("plane", notebook=NOTEBOOK)
def plane(experiment: Experiment) -> pd.DataFrame:
    """DSR and compliance: nominal points on all test prompts, others on the curve's."""
    parts = [experiment.table("rates").assign(step=-1, strength=1.0, nominal=True)]
    if curved(experiment):
        way = experiment.table("curves").assign(nominal=False)
        ends = way["step"] == way.groupby("method")["step"].transform("max")
        parts.insert(0, way[~ends | (way["strength"] != 1)])
    rows = headline(pd.concat(parts))
    rows = rows[(rows["benchmark"] == "mean") & (rows["metric"] != "general")]
    keys = ["method", "step", "strength", "nominal", "forms", "seeds"]
    wide = rows.pivot(index=keys, columns="metric", values=NUMBERS).dropna()
    names = wide.columns.map(lambda c: c[1] if c[0] == "value" else f"{c[1]}_{c[0]}")
    return wide.set_axis(names, axis=1).reset_index()


@table("paired", notebook=NOTEBOOK)
def paired(experiment: Experiment) -> pd.DataFrame:
    """DSR and compliance of every method less each baseline's, by set and over sets; Holm."""
    said = verdicts(experiment)
    return rates.rate_differences(experiment.answered, said, baselines(experiment))


@table("template_effect", notebook=NOTEBOOK)
def template_effect(experiment: Experiment) -> pd.DataFrame:
    """Rates on prompts natural in a form less those on prompts swapped into it."""
    return rates.what_the_template_does(experiment.answered, verdicts(experiment))


@table("claims", notebook=NOTEBOOK)
def claims(experiment: Experiment) -> pd.DataFrame:
    """The paper's claims, DCR less STL (above 0: as it says): published, forms, sources controlled.

    Controlled: sets of sources that no method met in training (of a class that has none, all),
    AUROC averaged over harmless sources. The other AUROCs pool sources, as is usual. Nine
    intervals, not corrected for that.
    """
    pair = [needed(experiment, m, "claims") for m in ("DCR", "STL")]
    said, read, prompts = verdicts(experiment, pair), scores(experiment, pair), experiment.prompts
    answered = prompts["id"].isin(experiment.answered["id"])
    test, met = prompts["role"] == "test", prompts["met"].astype(bool)
    all_met = met.where(test, True).groupby(prompts["label"]).transform("all")
    readings = {
        "as published": ("published", test & (prompts["version"] == "published")),
        "forms equal": ("equal", test),
        "sources controlled": ("equal", test & (~met | all_met)),
    }
    found = []
    for reading, (forms, chosen) in readings.items():
        rows = prompts[chosen].reset_index(drop=True)
        heard = prompts[chosen & answered].reset_index(drop=True)
        table = headline(rates.rate_differences(heard, said, ["STL"]))
        table = table[(table["benchmark"] == "mean") & (table["forms"] == forms)]
        by = "source" if reading == "sources controlled" else "all"
        ranked = auroc_differences(rows, read, ["STL"], by=by).assign(label="auroc")
        found += [table.assign(reading=reading), ranked.assign(reading=reading)]
    whole = pd.concat(found, ignore_index=True).rename(columns={"difference": "value"})
    whole = whole[whole["label"].isin(CLAIMS)]
    whole = whole.sort_values("label", key=lambda c: c.map(list(CLAIMS).index), kind="stable")
    whole = whole.assign(claim=whole["label"].map(CLAIMS), where=f"{NOTEBOOK}: claims")
    return whole[["claim", "reading", *NUMBERS, "n", "where"]].reset_index(drop=True)
