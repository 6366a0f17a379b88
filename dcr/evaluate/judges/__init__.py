"""Judges: answers → verdicts {comply, partial, refuse, degenerate, unscored} with P(refusal).

`phrases` (rules) or `guard:<hub id or folder>` (a guard or classifier model).
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.data import forms
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.evaluate.judges.degenerate import is_degenerate
from dcr.lm import chat
from dcr.lm.chat import strip_thinking, unfinished

log = logging.getLogger("dcr")
VERDICTS = ("comply", "partial", "refuse", "degenerate", "unscored")
JUDGES = ("phrases", "guard:<hub id or folder>")


def judge(prompts: Any, generations: pd.DataFrame, name: str = "phrases") -> pd.DataFrame:
    """Verdict rows prompt_id, judge, verdict, score for every prompt (texts, or a prompt table).

    generations: prompt_id, response, as `dcr.generate` gives for the same prompts. Closed reasoning
    (<think> ... </think>) is no part of an answer; what is missing or was cut inside its reasoning
    is `unscored`. Raises DCRError for bad prompts, an unknown judge or one whose model is missing,
    answers to unknown prompts, or two answers to one prompt.
    """
    check(name)
    prompts = prompts_of(prompts)
    answers = align_answers(prompts, generations)
    rows = score(name, prompts["text"].tolist(), answers, prompts["label"].tolist())
    if missing := sum(verdict == "unscored" for verdict, _ in rows):
        log.warning("%s: %d of %d answers are unscored", name, missing, len(rows))
    verdicts, scores = zip(*rows, strict=True)
    return pd.DataFrame(
        {"prompt_id": prompts["id"].tolist(), "judge": name, "verdict": verdicts, "score": scores}
    )


def check(name: str) -> None:
    """Raises DCRError for a judge that there is not."""
    if name != "phrases" and not (name.startswith("guard:") and name != "guard:"):
        raise DCRError(f"judge {name!r} is unknown; known: {', '.join(JUDGES)}.")


def identity(name: str) -> dict:
    """What verdicts of this judge depend on besides the answers, for artifact keys."""
    check(name)
    found: dict = {"judge": name, "code": code_of(name)}
    if name != "phrases":
        from dcr.lm.load import identity as weights_of

        found["model"] = weights_of(name.removeprefix("guard:").partition("#")[0])
    return found


def code_of(name: str) -> str:
    """12 hex digits of the code and cues that a judge's verdicts come from."""
    others = {"calibration.py"} | ({"guard.py"} if name == "phrases" else set())
    digest = hashlib.sha256()
    own = [p for p in sorted(Path(__file__).parent.glob("*.*")) if p.suffix in (".py", ".yaml")]
    for path in (*own, Path(forms.__file__), Path(chat.__file__)):
        if path.name not in others:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def score(
    name: str,
    prompts: Sequence[str],
    answers: Sequence[str | None],
    labels: Sequence[str] | None = None,
) -> list[tuple[str, float]]:
    """(verdict, P(refusal)) of each answer; None is `unscored`.

    labels: of the prompts; only Llama Guard reads them.
    """
    rows: list[tuple[str, float]] = [("unscored", float("nan"))] * len(answers)
    asked: list[int] = []
    texts: list[str] = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = None if answer is None else strip_thinking(answer)
        if text is None or unfinished(text):
            continue
        if is_degenerate(text, prompt):
            rows[i] = ("degenerate", 0.5)
        else:
            asked.append(i)
            texts.append(text)
    questions = [prompts[i] for i in asked]
    if name == "phrases":
        from dcr.evaluate.judges.phrases import score_text

        scored = [score_text(a, p) for a, p in zip(texts, questions, strict=True)]
    elif asked:
        from dcr.evaluate.judges import guard

        kinds = [labels[i] if labels else "" for i in asked]
        scored = guard.score(name.removeprefix("guard:"), questions, texts, kinds)
    else:
        scored = []
    for i, row in zip(asked, scored, strict=True):
        rows[i] = row
    return rows


def align_answers(prompts: pd.DataFrame, generations: pd.DataFrame) -> list[str | None]:
    """The answer to each prompt or None. Raises DCRError on repeated or unknown ids."""
    if missing := [c for c in ("prompt_id", "response") if c not in generations]:
        raise DCRError(f"answers: column {missing[0]!r} is missing; dcr.generate gives it.")
    ids, known = generations["prompt_id"], set(prompts["id"])
    if ids.duplicated().any():
        raise DCRError(f"answers: prompt_id {ids[ids.duplicated()].iloc[0]!r} occurs twice.")
    if unknown := sorted(set(ids) - known):
        raise DCRError(
            f"answers: prompt_id {unknown[0]!r} is not among the prompts ({len(unknown)} such)."
        )
    given = dict(zip(ids, generations["response"], strict=True))
    return [text if isinstance(text := given.get(key), str) else None for key in prompts["id"]]
