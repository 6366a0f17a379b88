"""What tables ask of an experiment: its seeds below one another; few prompts for dear measures."""

from collections.abc import Callable, Sequence

import pandas as pd

from dcr.data.sets import first_requests
from dcr.errors import DCRError
from dcr.evaluate.auroc import auroc
from dcr.run.readings import Run
from dcr.study.experiment import Experiment

RULE = "question-mark"
LABELS = ("toxic", "seemingly_toxic", "general")


def methods_of(experiment: Experiment, stage: str = "") -> list[str]:
    """The run's methods and the question-mark rule; with `stage` those that go through it."""
    every = dict.fromkeys((*experiment.methods, RULE))
    return [m for m in every if not stage or stage in experiment.runs[0].stages(m)]


def stacked(
    experiment: Experiment,
    read: Callable[[Run, str], pd.DataFrame],
    methods: Sequence[str] | None = None,
) -> pd.DataFrame:
    """`read(run, method)` of every method (default: all) and seed, with columns method and seed."""
    methods = methods_of(experiment) if methods is None else methods
    pairs = [(run, m) for m in methods for run in experiment.runs_of(m)]
    return joined([read(run, m).assign(method=m, seed=run.seed) for run, m in pairs])


def joined(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables below one another. Raises DCRError where there is none."""
    if not parts:
        raise DCRError("no method of this run has what this table shows; run one that has.")
    return pd.concat(parts, ignore_index=True)


def curved(experiment: Experiment) -> list[str]:
    """The methods that have a curve: more points than the one that they are read at."""
    return [m for m in methods_of(experiment) if len(experiment.runs[0].points(m)) > 1]


def steps_of(experiment: Experiment, method: str) -> dict[int, int]:
    """Alignment steps whose weights every seed kept → the step to ask a run for, -1 of the last.

    Seeds end at different steps where an audit leaves them mixes of different size; the last is
    called by the first seed's.
    """
    first, *others = (run.steps(method) for run in experiment.runs_of(method))
    shared = set(first[:-1]).intersection(*(steps[:-1] for steps in others))
    return {step: step for step in first if step in shared} | {first[-1]: -1}


def verdicts(experiment: Experiment, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """Verdicts on the test prompts: prompt_id, method, seed, verdict, finish where known."""
    return stacked(experiment, lambda run, m: run.verdicts(m), methods)


def scores(experiment: Experiment, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """Refusal scores of test and validation prompts: prompt_id, method, seed, score."""
    return stacked(experiment, lambda run, m: run.scores(m), methods)


def scored_prompts(experiment: Experiment) -> pd.DataFrame:
    """Test and validation prompts, as the frontier reads them."""
    return pd.concat([experiment.validation, experiment.prompts], ignore_index=True)


def range_over_seeds(rows: pd.DataFrame, by: Sequence[str], value: str = "value") -> pd.DataFrame:
    """`by`, value (mean), low, high (least and most of the seeds), seeds, for what no prompts
    stand behind; a single seed has no range (NaN)."""
    found = rows.groupby(list(by), sort=False)[value].agg(["mean", "min", "max", "size"])
    found.loc[found["size"] == 1, ["min", "max"]] = float("nan")
    return found.set_axis([value, "low", "high", "seeds"], axis=1).reset_index()


def first_of_each(prompts: pd.DataFrame, n: int, by: Sequence[str] = ("label",)) -> pd.DataFrame:
    """All prompts of the first `n` requests of each group, in the order of the ledger's hash."""
    groups = [first_requests(rows, n) for _, rows in prompts.groupby(list(by), sort=False)]
    return pd.concat(groups, ignore_index=True)


def in_turn(prompts: pd.DataFrame, n: int, by: Sequence[str]) -> pd.DataFrame:
    """`n` prompts of each class, one of each group in turn, in the order of the ledger's hash."""
    rows = prompts.sort_values("request", kind="stable")
    turn = rows.groupby(["label", *by], sort=False).cumcount().sort_values(kind="stable").index
    rows = rows.loc[turn].groupby("label").head(n)
    return rows.sort_values("label", key=lambda c: c.map(LABELS.index), ignore_index=True)


def followed_prompts(experiment: Experiment, per_class: int) -> pd.DataFrame:
    """Validation prompts, one a request, on which kernels, probabilities and maps are followed.

    Every other request as a question. No method trains on them, and no test prompt is spent.
    """
    rows = experiment.validation.sort_values("request", kind="stable")
    turn = rows.groupby("label")["request"].transform(lambda names: names.factorize()[0]) % 2
    other = rows["form"].eq("question") == turn.astype(bool)  # not the form that is its turn
    one = rows.loc[other.sort_values(kind="stable").index].drop_duplicates(["label", "request"])
    return in_turn(one, per_class, ["form"])


def auroc_rows(prompts: pd.DataFrame, scores: pd.DataFrame, name: str) -> pd.DataFrame:
    """`name`, auroc, low, high, n: toxic against the rest, a row a column of `scores`."""
    long = scores.set_axis(prompts["id"]).rename_axis("prompt_id").reset_index()
    long = long.melt("prompt_id", var_name="method", value_name="score").assign(seed=0)
    found = auroc(prompts, long, by="all").rename(columns={"method": name})
    return found[[name, "auroc", "low", "high", "n"]]


def needed(experiment: Experiment, method: str, name: str) -> str:
    """`method` if the run has it. Raises DCRError naming the table otherwise."""
    if method not in methods_of(experiment):
        known = ", ".join(experiment.methods)
        raise DCRError(f"table {name!r} needs {method}; this run has {known}.")
    return method
