"""What is read off a run's models: scores, hidden states, kernels, general ability, losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dcr.data.files import read_jsonl, write_atomic
from dcr.data.sets import PLAIN_REFUSAL, table_hash
from dcr.run.answers import Answers
from dcr.run.training import Point


class Run(Answers):
    """One configuration with one seed: what is trained, asked and read."""

    def complete(self, method: str) -> None:
        """Make all that a method's curve and frontier need: what answers needs is trained first."""
        if self.config.generation.endpoint:  # a served model answers; nothing runs here
            self.verdicts(method)
            return
        for on in self.relies_on(method):
            self.complete(on)
        for point in self.points(method):
            self.verdicts(method, *point)
        self.scores(method)

    def answers(
        self, method: str, prompts: pd.DataFrame, point: Point | None = None, *, tokens: int = 0
    ) -> pd.DataFrame:
        """As `Answers.answers`; of a method that another answers for, what that one says.

        That to the prompts that the method's own score lets through; the others are refused.
        """
        on = self.entry(method).get("answers")
        if not on or self.config.generation.endpoint:
            return super().answers(method, prompts, point, tokens=tokens)
        steering = self.steering(method, (point or Point()).strength)
        refused = steering.decided(self.refusal(method, prompts))
        rows = super().answers(on, prompts, tokens=tokens).assign(method=method)
        rows = rows.set_index("prompt_id").loc[prompts["id"]].reset_index(names="prompt_id")
        length = len(self.base()[1](PLAIN_REFUSAL, add_special_tokens=False)["input_ids"])
        plain = {"response": PLAIN_REFUSAL, "n_tokens": length, "finish": "eos"}
        return rows.assign(**{c: rows[c].mask(refused, v) for c, v in plain.items()})

    def _measured(
        self,
        kind: str,
        method: str,
        prompts: pd.DataFrame,
        measure: Callable[..., Any],
        step: int = -1,
        precision: str = "",
        **settings: Any,
    ) -> Path:
        """Folder of `measure(model, tokenizer, folder)`; an array goes to values.npy."""
        from dcr.lm.blocks import in_precision

        owner, (step, _) = self.owner(method, step, 1.0)
        key = {"weights": self.weights_key(owner, step), "prompts": table_hash(prompts), **settings}

        def build(folder: Path) -> dict:
            model, tokenizer = self.model(owner, step)
            with in_precision(model, precision or self.base_model.precision):
                values = measure(model, tokenizer, folder)
            if isinstance(values, np.ndarray):
                np.save(folder / "values.npy", values)
            return {"prompts": len(prompts), **self.facts(self.config)}

        return self.store.get(kind, self.name_of(owner, step, 1.0), key, build).path

    def scores(self, method: str) -> pd.DataFrame:
        """prompt_id, method, seed, score (higher: more inclined to refuse); validation and test.

        A rule's verdict, a steering method's own score, else the refusal score.
        """
        from dcr.evaluate.rates import question_mark_rule

        prompts = pd.concat([self.validation, self.prompts], ignore_index=True)
        if "rule" in self.stages(method):
            rows = question_mark_rule(prompts)[["prompt_id", "score"]]
        else:
            values = self.refusal(method, prompts)
            rows = pd.DataFrame({"prompt_id": prompts["id"], "score": values})
        return rows.assign(method=method, seed=self.seed)

    def refusal(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        """[n] refusal scores of any prompts (see `scores`)."""
        from dcr.analysis.refusal import PHRASES_VERSION, refusal_score
        from dcr.lm.device import keeping

        method, texts = self.decider(method), prompts["text"].tolist()
        steering = self.steering(method)

        def measure(model, tokenizer, folder):
            score = steering.score if steering else refusal_score
            with keeping(folder):
                return np.asarray(score(model, tokenizer, texts))

        settings = {"openings": PHRASES_VERSION, "steering": steering and steering.settings}
        folder = self._measured("score", method, prompts, measure, step, **settings)
        return np.load(folder / "values.npy")

    def refusal_probability(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        """[n] the score as a probability, in [0, 1]."""
        from scipy.special import expit

        return expit(self.refusal(method, prompts, step))

    def states(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        """[layers + 1, n, hidden] fp32 states at each prompt's last token."""
        from dcr.lm.states import hidden_states

        texts, path = prompts["text"].tolist(), self.config.model.layers_path

        def measure(model, tokenizer, folder):
            hidden_states(model, tokenizer, texts, out=folder, truncate=True, layers_path=path)

        folder = self._measured("states", method, prompts, measure, step)
        return np.load(folder / "values.npy", mmap_mode="r")

    def kernel(self, method: str, prompts: pd.DataFrame, step: int = -1) -> np.ndarray:
        """[n, n] norms ‖K(x', x)‖_F of the empirical tangent kernel on first tokens."""
        from dcr.analysis.kernel import entk

        k, path = self.config.evaluation.kernel_tokens, self.config.model.layers_path
        *texts, last = prompts["text"]

        def measure(model, tokenizer, _folder):
            found = entk(model, tokenizer, texts, [last], k=k, truncate=True, layers_path=path)
            return found.norms

        folder = self._measured("kernel", method, prompts, measure, step, "fp32", k=k)
        return np.load(folder / "values.npy")

    def ability(self, method: str) -> pd.DataFrame:
        """Per item: task, item, metric, hit (or loss and tokens of held-out answers)."""
        from dcr.evaluate.ability import measure_items, task_facts

        options = self.config.evaluation
        held_out = self.prompts.query("label == 'general' and response != ''")

        def measure(model, tokenizer, folder):
            rows = measure_items(model, tokenizer, held_out, options, folder=folder)
            write_atomic(folder / "items.jsonl", rows.to_json(orient="records", lines=True))

        tasks = {"tasks": task_facts(options), "limit": options.capability_limit}
        folder = self._measured("ability", method, held_out, measure, asked=tasks)
        return pd.DataFrame(read_jsonl(folder / "items.jsonl"))

    def answer_losses(self, method: str, prompts: pd.DataFrame) -> pd.DataFrame:
        """item, loss, tokens: how unlikely the base model finds a method's answers to prompts among
        `answered` (those that are not empty)."""
        from dcr.evaluate.ability import answer_losses

        said = self.generations(method)  # those that are judged: a batch of its own reads others
        said = said.rename(columns={"prompt_id": "id"})[["id", "response"]]
        rows = prompts.drop(columns="response", errors="ignore").merge(said, on="id")

        def measure(model, tokenizer, folder):
            found = answer_losses(model, tokenizer, rows)
            write_atomic(folder / "losses.jsonl", found.to_json(orient="records", lines=True))

        folder = self._measured("losses", "base", rows, measure)
        return pd.DataFrame(read_jsonl(folder / "losses.jsonl"))
