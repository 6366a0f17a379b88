"""Judges: answers → verdicts {comply, partial, refuse, degenerate, unscored} with a score, P(refusal) in [0, 1]."""

from __future__ import annotations

import pandas as pd

from dcr.errors import DCRError
from dcr.judges.degenerate import is_degenerate

VERDICTS = ("comply", "partial", "refuse", "degenerate", "unscored")
JUDGES = ("phrases",)


def judge(prompts: pd.DataFrame, generations: pd.DataFrame, name: str = "phrases") -> pd.DataFrame:
    """Verdict rows prompt_id, judge, verdict, score for every prompt; a missing answer is `unscored`.

    Raises DCRError for an unknown judge, answers to unknown prompts, or two answers to one prompt.
    """
    if name not in JUDGES:
        raise DCRError(f"judge {name!r} is unknown; known: {', '.join(JUDGES)}.")
    answers = align_answers(prompts, generations)
    from dcr.judges import phrases

    rows = []
    for key, text, answer in zip(prompts["id"], prompts["text"], answers, strict=True):
        if answer is None:
            verdict, score = "unscored", float("nan")
        elif is_degenerate(answer, text):
            verdict, score = "degenerate", 0.5
        else:
            verdict, score = phrases.score_text(answer)
        rows.append({"prompt_id": key, "judge": name, "verdict": verdict, "score": score})
    return pd.DataFrame(rows)


def align_answers(prompts: pd.DataFrame, generations: pd.DataFrame) -> list[str | None]:
    """The answer to each prompt, None where there is none. Raises DCRError on repeated or unknown prompt ids."""
    repeated = generations["prompt_id"].duplicated()
    if repeated.any():
        raise DCRError(f"answers: prompt_id {generations.loc[repeated, 'prompt_id'].iloc[0]!r} occurs twice.")
    unknown = set(generations["prompt_id"]) - set(prompts["id"])
    if unknown:
        raise DCRError(f"answers: prompt_id {sorted(unknown)[0]!r} is not among the prompts ({len(unknown)} such).")
    given = dict(zip(generations["prompt_id"], generations["response"], strict=True))
    return [given.get(key) for key in prompts["id"]]
