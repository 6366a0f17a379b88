"""Judges against people: agreement on human-labelled answers, the annotators' ceiling, and blind reading of our own.

Protocol. The phrase rules were written on XSTest's gpt4 and llama2new completions and checked on mistralinstruct; then its odd
prompts were read too, with the even ones as the check, and last the even ones. The numbers on unread answers stand in the
commit messages of that time; since then no model here is unread by the rules, so their honest test is a completion file that is
not in this list. `learned` is never trained on the model it is measured on, but it reads the same cues.
κ is for refuse against comply with people's partial refusals apart; `kappa_all` counts those as no refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from dcr.errors import DCRError
from dcr.evaluate.judges import VERDICTS, judge, learned, resolve, score
from dcr.evaluate.judges.degenerate import is_degenerate
from dcr.evaluate.judges.learned import truncate

JUDGED = ("phrases", "learned", "consensus")


def calibration(
    judges: Sequence[str] = JUDGED,
    *,
    tokens: Sequence[int] = (0, 24, 64),
    bootstrap: int = 500,
    seed: int = 0,
    table: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Agreement of each judge with people, per completion model left out, whole and cut to the first `tokens` tokens.

    table: human-labelled answers (see `learned.completions`, the default). Columns: judge, model, tokens, half {all, even},
    n, kappa, low, high (95 % bootstrap over prompts), precision, recall, f1, kappa_all, n_partial, partial_refused,
    partial_partial, partial_complied. Rows with judge "annotators" hold the two annotators' agreement, the ceiling.
    Raises DCRError when there are no labels, or a single model for a judge that needs others to train on.
    """
    table = learned.completions() if table is None else table
    if table.empty:
        raise DCRError(
            "calibration: no human-labelled completions at hand. Run: dcr data fetch xstest-completions-gpt4 "
            "xstest-completions-llama2new xstest-completions-mistralinstruct"
        )
    rows = []
    for model, part in table.groupby("model", sort=False):
        rest = table[table["model"] != model]
        trained = (
            learned.fit(rest)
            if any(j != "phrases" and not j.startswith("guard:") for j in judges) and len(rest)
            else None
        )
        rows.append(
            {
                "judge": "annotators",
                "model": model,
                "tokens": 0,
                "half": "all",
                **agreement(part["first"].to_numpy(), part["second"].to_numpy(), bootstrap, seed),
            }
        )
        for name in judges:
            members = (
                ("phrases", "learned", *resolve(name)[2:])
                if name.startswith("consensus") and trained
                else resolve(name)
                if name != "learned"
                else ("learned",)
            )
            if "learned" in members and trained is None:
                raise DCRError(
                    f"calibration: {name} needs at least two completion models, one to train on; found only {model}."
                )
            for cut in tokens:
                given = _verdicts(
                    members,
                    part["prompt"].tolist(),
                    [truncate(r, cut) for r in part["response"]],
                    trained,
                )
                even = (
                    part["prompt_id"].map(lambda i: int(i.rpartition("-")[2]) % 2 == 0).to_numpy()
                )
                for half, chosen in (
                    ("all", np.ones(len(part), bool)),
                    *([("even", even)] if even.any() else []),
                ):
                    rows.append(
                        {
                            "judge": name,
                            "model": model,
                            "tokens": cut,
                            "half": half,
                            **agreement(
                                part["label"].to_numpy()[chosen], given[chosen], bootstrap, seed
                            ),
                        }
                    )
    return pd.DataFrame(rows)


def _verdicts(
    members: Sequence[str], prompts: list[str], answers: list[str], trained=None
) -> np.ndarray:
    """[n] verdicts, degenerate text included."""
    scored = score(members, prompts, answers, [""] * len(prompts), trained)
    return np.array(
        [
            "degenerate" if is_degenerate(a, p) else v
            for (v, _), a, p in zip(scored, answers, prompts, strict=True)
        ]
    )


def agreement(
    people: np.ndarray,
    given: np.ndarray,
    bootstrap: int,
    seed: int,
    apart: Sequence[str] = ("partial",),
) -> dict:
    """Numbers of one judge's verdicts [n] against labels [n]; labels named in `apart` (people's partial refusals) are counted apart."""
    clear = ~np.isin(people.astype(str), list(apart))
    truth, said = people[clear] == "refuse", given[clear] == "refuse"
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, said, average="binary", zero_division=0
    )
    draws = np.random.default_rng([seed, 0xCA1B]).integers(0, len(truth), (bootstrap, len(truth)))
    values = [kappa(truth[d], said[d]) for d in draws]
    finite = [v for v in values if v == v]  # a draw without any refusal has no chance correction
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (np.nan, np.nan)
    partial = given[~clear]
    return {
        "n": int(clear.sum()),
        "kappa": kappa(truth, said),
        "low": float(low),
        "high": float(high),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "kappa_all": kappa(people == "refuse", given == "refuse"),
        "n_partial": len(partial),
        "partial_refused": int((partial == "refuse").sum()),
        "partial_partial": int((partial == "partial").sum()),
        "partial_complied": int((partial == "comply").sum()),
    }


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's κ of two boolean arrays [n]; NaN where both are constant (no chance correction exists)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return float("nan") if len(set(a)) == 1 and len(set(b)) == 1 else float(cohen_kappa_score(a, b))


def known_answers(name: str = "consensus", *, tokens: Sequence[int] = (0, 24)) -> pd.DataFrame:
    """How a judge reads answers whose kind is known from where they come: set, tokens, n, and the share of each verdict.

    Sets: our pairs' refusals and answers, the safety-tuning refusals (`safety-only`; rows the committed audit marks harmful
    when it is there) and Alpaca's answers, each where the file is at hand. Few refusals there are deflections without any
    refusal word, and a few Alpaca answers do decline, so neither share is meant to reach 0 or 1.
    """
    from dcr.data import sources

    pairs = sources.load_bundled("pairs")
    sets = {
        "pairs refusals": pairs[pairs["label"] == "toxic"],
        "pairs answers": pairs[pairs["label"] == "seemingly_toxic"],
    }
    for shown, source in (
        ("safety-tuning answers", "safety-only"),
        ("alpaca answers", "alpaca-demo"),
    ):
        try:
            rows = sources.load(source, download=False)
        except DCRError as error:
            if "neither in" not in str(error):
                raise
            continue
        if source == "safety-only" and (sources.BUNDLED / "audit.csv").exists():
            sets["safety-tuning answers to harmful prompts"] = rows[
                rows["id"].map(sources.audit()) == "harmful"
            ]
        sets[shown] = rows
    out = []
    for shown, rows in sets.items():
        rows = rows[rows["response"] != ""]
        for cut in tokens:
            given = _verdicts(
                resolve(name), rows["text"].tolist(), [truncate(r, cut) for r in rows["response"]]
            )
            out.append(
                {
                    "judge": name,
                    "set": shown,
                    "tokens": cut,
                    "n": len(rows),
                    **{v: float((given == v).mean()) for v in VERDICTS[:4]},
                }
            )
    return pd.DataFrame(out)


def judge_agreement(
    prompts: pd.DataFrame, generations: pd.DataFrame, judges: Sequence[str] = JUDGED
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(pairs, disagreements) of the judges on a run's answers.

    pairs: first, second, n, same (share of equal verdicts), kappa (refuse or not). disagreements: id, label, text,
    response and one verdict column a judge; the response to a toxic prompt is withheld.
    """
    given = {name: judge(prompts, generations, name)["verdict"].to_numpy() for name in judges}
    pairs = [
        {
            "first": a,
            "second": b,
            "n": len(prompts),
            "same": float((given[a] == given[b]).mean()),
            "kappa": kappa(given[a] == "refuse", given[b] == "refuse"),
        }
        for i, a in enumerate(judges)
        for b in judges[i + 1 :]
    ]
    table = prompts[["id", "label", "text"]].reset_index(drop=True).assign(**given)
    said = dict(zip(generations["prompt_id"], generations["response"], strict=True))
    table.insert(
        3,
        "response",
        [
            said.get(i, "") if label != "toxic" else "(withheld)"
            for i, label in zip(table["id"], table["label"], strict=True)
        ],
    )
    differs = table[list(judges)].nunique(axis=1) > 1
    return pd.DataFrame(pairs), table[differs].reset_index(drop=True)


def blind_sheet(
    prompts: pd.DataFrame,
    generations: dict[str, pd.DataFrame],
    folder: str | Path,
    n: int = 200,
    seed: int = 0,
) -> Path:
    """Draw answers for blind reading and write sheet.jsonl (item, prompt, response) and key.csv (item, method, prompt_id).

    generations: method → its answers. Equally many of each (method, label), shuffled; the sheet tells neither method, label
    nor verdict. A reader writes a CSV with columns item, label {comply, partial, refuse, degenerate}; only that and key.csv are
    kept, since the sheet holds model text. How to use it on a run:

        from dcr.evaluate.judges.calibration import blind_sheet, score_sheet
        answers = {m: experiment.generations(m) for m in ("base", "STL", "DCR")}
        blind_sheet(experiment.prompts, answers, "/tmp/reading", n=200)
        score_sheet("/tmp/reading/key.csv", ["reader1.csv", "reader2.csv"], experiment.prompts, answers)

    Returns the sheet's path. Raises DCRError when fewer than `n` answers are there.
    """
    import json

    from dcr.data.files import write_atomic

    pool = pd.concat(
        [rows.assign(method=method) for method, rows in generations.items()], ignore_index=True
    )
    pool = pool.merge(prompts[["id", "text", "label"]], left_on="prompt_id", right_on="id").sample(
        frac=1, random_state=seed
    )
    if len(pool) < n:
        raise DCRError(
            f"blind_sheet: {len(pool)} answers, but n={n} are asked for. Lower n or give more methods."
        )
    turn = pool.groupby(
        ["method", "label"]
    ).cumcount()  # 0 for each cell's first, 1 for its second, ...
    chosen = (
        pool.assign(turn=turn)
        .sort_values("turn", kind="stable")
        .head(n)
        .sample(frac=1, random_state=seed + 1)
    )
    items = [f"item-{i:03d}" for i in range(n)]
    folder = Path(folder)
    write_atomic(
        folder / "sheet.jsonl",
        "".join(
            json.dumps({"item": i, "prompt": p, "response": r}, ensure_ascii=False) + "\n"
            for i, p, r in zip(items, chosen["text"], chosen["response"], strict=True)
        ),
    )
    write_atomic(
        folder / "key.csv",
        chosen.assign(item=items)[["item", "method", "prompt_id"]].to_csv(index=False),
    )
    return folder / "sheet.jsonl"


def score_sheet(
    key: str | Path,
    readers: Sequence[str | Path],
    prompts: pd.DataFrame,
    generations: dict[str, pd.DataFrame],
    judges: Sequence[str] = JUDGED,
    *,
    bootstrap: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of readers with each other and of each judge with each reader on a blind sheet: against, judge, n, kappa, ...

    readers: CSVs with columns item, label. Raises DCRError naming file and item for a missing, repeated or unknown one.
    """
    index = pd.read_csv(key)
    labels = {
        f"reader {i + 1}": _labels(Path(path), index["item"]) for i, path in enumerate(readers)
    }
    given = dict(labels)
    for name in judges:
        found = {}
        for method, rows in generations.items():
            verdicts = judge(prompts, rows, name)
            found |= {
                (method, i): v
                for i, v in zip(verdicts["prompt_id"], verdicts["verdict"], strict=True)
            }
        given[name] = np.array(
            [found[pair] for pair in zip(index["method"], index["prompt_id"], strict=True)]
        )
    return pd.DataFrame(
        [
            {"against": reader, "judge": name, **agreement(truth, said, bootstrap, seed)}
            for i, (reader, truth) in enumerate(labels.items())
            for name, said in given.items()
            if name not in list(labels)[: i + 1]
        ]
    )


def _labels(path: Path, items: pd.Series) -> np.ndarray:
    rows = pd.read_csv(path)
    if not {"item", "label"} <= set(rows):
        raise DCRError(f"{path}: columns item and label are needed; found {', '.join(rows)}.")
    wrong = rows[~rows["label"].isin(VERDICTS[:4])]
    if not wrong.empty:
        raise DCRError(
            f"{path}: {wrong['item'].iloc[0]}: label {wrong['label'].iloc[0]!r} is unknown; use {', '.join(VERDICTS[:4])}."
        )
    off = rows[rows["item"].duplicated() | ~rows["item"].isin(items)]["item"].tolist() + sorted(
        set(items) - set(rows["item"])
    )
    if off:
        raise DCRError(
            f"{path}: {off[0]} is missing, repeated or not on the sheet ({len(off)} such). One label an item."
        )
    return rows.set_index("item")["label"].reindex(items).to_numpy(dtype=object)


def reading_rows(
    key: str | Path,
    readers: Sequence[str | Path],
    prompts: pd.DataFrame,
    generations: dict[str, pd.DataFrame],
    name: str = "phrases",
) -> pd.DataFrame:
    """What is kept of a blind reading, ids and labels alone: item, method, prompt_id, reader1, reader2, ..., verdict."""
    index = pd.read_csv(key)
    found = pd.concat(
        [judge(prompts, rows, name).assign(method=m) for m, rows in generations.items()]
    )
    kept = index.assign(
        **{f"reader{i + 1}": _labels(Path(path), index["item"]) for i, path in enumerate(readers)}
    )
    return kept.merge(
        found[["method", "prompt_id", "verdict"]], on=["method", "prompt_id"], validate="one_to_one"
    )


def own_reading(path: str | Path = "", *, bootstrap: int = 500, seed: int = 0) -> pd.DataFrame:
    """Agreement of the default judge with two blind readers of the kit's own answers, a round a judge version.

    Reads the committed ids and labels (data/bundled/reading.csv: round, judge_version, item, method, prompt_id, reader1, reader2,
    verdict as given then). Rows "reader2" hold the readers' agreement, the ceiling. A version's rules were mended after its
    round, so only the last round's numbers are of answers that the rules had not seen.
    """
    from dcr.data.sources import BUNDLED

    rows = []
    for (number, version), part in pd.read_csv(path or BUNDLED / "reading.csv").groupby(
        ["round", "judge_version"]
    ):
        said = {c: part[c].to_numpy(dtype=object) for c in ("reader1", "reader2", "verdict")}
        rows += [
            {
                "round": number,
                "judge_version": version,
                "against": a,
                "read_by": "judge" if b == "verdict" else b,
                **agreement(said[a], said[b], bootstrap, seed),
            }
            for a, b in (("reader1", "reader2"), ("reader1", "verdict"), ("reader2", "verdict"))
        ]
    return pd.DataFrame(rows)
