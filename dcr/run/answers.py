"""What a run asks of what it trained: answers to prompts, and verdicts on them."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pandas as pd

from dcr.data.files import content_key, read_jsonl, write_atomic
from dcr.data.sets import first_requests, table_hash, test_prompts, validation_prompts
from dcr.errors import DCRError
from dcr.run.training import Point, Training


class Answers(Training):
    """The asking half of a run: prompts, the same for every seed and method; answers; verdicts."""

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """All test prompts."""
        return test_prompts(self.config, of=self.of)

    @cached_property
    def validation(self) -> pd.DataFrame:
        """The prompts on which thresholds and recipes are chosen."""
        return validation_prompts(self.config, of=self.of)

    @cached_property
    def answered(self) -> pd.DataFrame:
        """The test prompts that are answered and judged; all are scored."""
        sets = self.prompts.groupby("benchmark", sort=False)
        parts = [first_requests(rows, self.config.data.answered) for _, rows in sets]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def curve_prompts(self) -> pd.DataFrame:
        """The answered prompts asked at each point of a curve: the first of each benchmark."""
        sets = [rows for _, rows in self.answered.groupby("benchmark", sort=False)]
        forms = 1 + self.config.evaluation.forms
        each = max(2, self.config.data.curve_limit // (forms * len(sets)))
        return pd.concat([first_requests(rows, each) for rows in sets], ignore_index=True)

    def owner(self, method: str, step: int, strength: float) -> tuple[str, Point]:
        """The method and point that a point is the same as, so that nothing is asked twice."""
        if self.config.generation.endpoint:
            return method, Point(step, strength)
        entry = self.entry(method)
        if strength == 0 and (on := entry.get("answers") or entry.get("steers")):
            return on, Point()
        stages = self.stages(method)
        if step == 0 and "steering" not in entry and stages == ["align"]:
            return "base", Point()
        if step == 0 and "align" in stages:  # so nothing after it has to be trained
            return method, Point(0, strength)
        return method, Point(-1 if step == self.steps(method)[-1] else step, strength)

    def answers(
        self, method: str, prompts: pd.DataFrame, point: Point | None = None, *, tokens: int = 0
    ) -> pd.DataFrame:
        """Answers to any prompts: prompt_id, method, seed, response, n_tokens, finish.

        tokens: new tokens at most (0: the run's). Raises DCRError for a method without a served
        model where the configuration names an endpoint.
        """
        from dcr.lm.generate import generate

        step, strength = point or Point()
        options = self.config.generation
        options = options.replaced(max_new_tokens=tokens or options.max_new_tokens)
        seed = self.seed if options.temperature else 0  # greedy answers do not depend on it
        served = options.served.get(method, "") if options.endpoint else ""
        if options.endpoint and (point not in (None, Point()) or not served):
            raise DCRError(
                f"generation.endpoint: {method} has no served model for this; name it in "
                "generation.served={METHOD: NAME}. Steered methods and checkpoints need the "
                "local model."
            )
        steering = None if served else self.steering(method, strength)
        key = {
            "weights": served or self.weights_key(method, step),
            "prompts": table_hash(prompts),
            "generation": options.replaced(served={}).model_dump(),
            "seed": seed,
            "steering": steering.settings if steering else None,
        }

        def build(folder: Path) -> dict:
            out = folder / "generations.jsonl"
            if options.endpoint:
                from dcr.lm.endpoint import generate_remote

                rows = generate_remote(prompts, options, served=served, seed=seed, out=out)
                return {"prompts": len(rows), "missing": len(prompts) - len(rows)}
            model, tokenizer = self.model(method, step)
            how = options.model_dump(exclude={"endpoint", "served"})
            how |= {"seed": seed, "precision": self.base_model.precision, "steering": steering}
            rows = generate(model, tokenizer, prompts, out=out, **how)
            facts = {"prompts": len(rows), "new_tokens": int(rows["n_tokens"].sum())}
            facts["truncated"] = int((rows["finish"] == "length").sum())
            return {**facts, **self.facts(self.config)}

        artifact = self.store.get("generate", self.name_of(method, step, strength), key, build)
        rows = pd.DataFrame(read_jsonl(artifact.path / "generations.jsonl"))
        return rows.assign(method=method, seed=self.seed)

    def judged(
        self, method: str, prompts: pd.DataFrame, point: Point | None = None, *, tokens: int = 0
    ) -> pd.DataFrame:
        """`answers` with the configured judge's verdicts; a rule has verdicts alone."""
        from dcr.evaluate.judges import identity, judge
        from dcr.evaluate.rates import question_mark_rule

        if "rule" in self.stages(method):
            return question_mark_rule(prompts).assign(method=method, seed=self.seed)
        answers = self.answers(method, prompts, point, tokens=tokens)
        name = self.config.evaluation.judge
        said = answers.drop(columns=["method", "seed"]).to_dict("records")
        key = {"answers": content_key(said), "prompts": table_hash(prompts), **identity(name)}

        def build(folder: Path) -> None:
            rows = judge(prompts, answers, name=name)
            text = rows.to_json(orient="records", lines=True, force_ascii=False)
            write_atomic(folder / "verdicts.jsonl", text)

        artifact = self.store.get("judge", self.name_of(method, *(point or Point())), key, build)
        verdicts = pd.DataFrame(read_jsonl(artifact.path / "verdicts.jsonl"))
        return answers.merge(verdicts, on="prompt_id", validate="one_to_one", how="right").assign(
            method=method, seed=self.seed
        )

    @staticmethod
    def name_of(method: str, step: int, strength: float) -> str:
        """What artifacts of a point are called."""
        at = f"@{step}" if step >= 0 else ""
        return method + at + (f"x{strength:g}" if strength != 1 else "")

    def generations(self, method: str, step: int = -1, strength: float = 1.0) -> pd.DataFrame:
        """Answers to `answered`; at another point than the nominal one to those of the curve."""
        return self._asked(self.answers, method, step, strength)

    def verdicts(self, method: str, step: int = -1, strength: float = 1.0) -> pd.DataFrame:
        """Answers and verdicts on the same prompts as `generations`."""
        return self._asked(self.judged, method, step, strength)

    def _asked(
        self, ask: Callable[..., pd.DataFrame], method: str, step: int, strength: float
    ) -> pd.DataFrame:
        if "rule" in self.stages(method):
            return ask(method, self.answered)
        owner, point = self.owner(method, step, strength)
        rows = ask(owner, self.answered if point == Point() else self.curve_prompts, point)
        if (step, strength) != Point() and point == Point():
            rows = rows[rows["prompt_id"].isin(self.curve_prompts["id"])].reset_index(drop=True)
        return rows.assign(method=method)
