"""Answers and verdicts of a method on prompts beyond its benchmarks (wrapped prompts, a biased decoder), cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dcr.data.files import read_jsonl, write_atomic


def judged_answers(
    experiment,
    method: str,
    prompts: pd.DataFrame,
    kind: str,
    name: str,
    *,
    settings: dict | None = None,
    around: Callable | None = None,
    max_new_tokens: int = 0,
) -> pd.DataFrame:
    """Rows prompt_id, response, n_tokens, finish, verdict of a method, generated as the experiment generates.

    kind, name: where the artifact stands in the run directory; settings: what else it depends on. around: (model, tokenizer)
    → context manager held while generating (a hook, say). max_new_tokens: 0 takes the run's own
    limit. Judged by the curve's judge; a missing answer is `unscored`.
    """
    from dcr.data.sets import table_hash
    from dcr.evaluate.judges import judge
    from dcr.lm.generate import generate, inference_dtype

    options, judge_name, extra = (
        experiment.config.generation,
        experiment.config.evaluation.curve_judge,
        {},
    )
    options = options.replaced(max_new_tokens=max_new_tokens or options.max_new_tokens)
    dependencies = {
        "weights": experiment.weights_key(method, -1),
        "prompts": table_hash(prompts),
        "settings": settings or {},
        "generation": options.model_dump(),
        "judge": judge_name,
        "seed": experiment.config.seed,
    }
    if "steer" in experiment.stages(method):
        from dcr.run.steer import steering_of

        extra["steering"] = steering_of(experiment, method, -1)
        dependencies["steering"] = extra["steering"].settings

    def build(folder: Path) -> dict:
        model, tokenizer = experiment.model(method)
        model = model.to(inference_dtype(experiment.config.model.precision, str(model.device)))
        with around(model, tokenizer) if around else contextlib.nullcontext():
            rows = generate(
                model,
                tokenizer,
                prompts,
                method=method,
                seed=experiment.config.seed,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                out=folder / "generations.jsonl",
                **extra,
            )
        verdicts = judge(prompts, rows, name=judge_name)
        rows = rows.merge(verdicts[["prompt_id", "verdict"]], on="prompt_id")
        write_atomic(
            folder / "verdicts.jsonl",
            rows.drop(columns="response").to_json(orient="records", lines=True),
        )
        return {
            "prompts": len(rows),
            "truncated": int((rows["finish"] == "length").sum()),
            "unscored": int((rows["verdict"] == "unscored").sum()),
        }

    artifact = experiment.store.get(kind, name, dependencies, build)
    answers = pd.DataFrame(read_jsonl(artifact.path / "generations.jsonl"))
    verdicts = pd.DataFrame(read_jsonl(artifact.path / "verdicts.jsonl"))
    return answers.merge(verdicts[["prompt_id", "verdict"]], on="prompt_id", validate="one_to_one")
