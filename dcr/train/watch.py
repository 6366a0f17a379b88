"""When to stop stage 1: held-out similarity and probe, a target, and the best step restored."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from dcr.config import RefineConfig
from dcr.data.files import append_jsonl, read_jsonl, write_atomic
from dcr.train.contrast import PromptRows, StageOneModel, pooled_states
from dcr.train.loop import load_trained_state, trained_state
from dcr.train.sampling import SEEMINGLY_TOXIC, TOXIC

log = logging.getLogger("dcr")
BEST = "best.safetensors"


def fit_probe(states: Tensor, classes: Tensor):
    """A linear probe of toxic (1) against seemingly toxic (0) on states [n, hidden]; `decision_function` gives scores."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(
        states, classes
    )


def held_out_measures(
    train: Tensor, train_classes: Tensor, held: Tensor, held_classes: Tensor
) -> dict[str, float]:
    """Cross- and within-class cosine of held-out states; AUROC and accuracy of a linear probe from train to held."""
    from sklearn.metrics import accuracy_score, roc_auc_score

    unit = torch.nn.functional.normalize(held, dim=-1)
    similarity, same = unit @ unit.T, held_classes[:, None] == held_classes[None]
    off = ~torch.eye(len(held), dtype=torch.bool)
    score = fit_probe(train, train_classes).decision_function(held)
    return {
        "cross_similarity": similarity[~same].mean().item(),
        "within_similarity": similarity[same & off].mean().item(),
        "probe_auroc": float(roc_auc_score(held_classes, score)),
        "probe_accuracy": float(accuracy_score(held_classes, score > 0)),
    }


class HeldOutWatcher(TrainerCallback):
    """Held-out similarity and probe every few steps; stops on target; keeps and restores the best step."""

    PROBE_ROWS = 64  # training prompts a class that the probe is fitted on

    def __init__(
        self,
        trainer,
        stage: StageOneModel,
        held: PromptRows,
        train: PromptRows,
        config: RefineConfig,
        folder: Path,
    ) -> None:
        self.trainer, self.stage, self.held, self.train, self.config = (
            trainer,
            stage,
            held,
            train,
            config,
        )
        self.path, self.best = folder / "evaluations.jsonl", folder / BEST
        self.rows: list[dict] = []
        self.reason = "all steps done"
        self.sample = [
            r
            for c in (TOXIC, SEEMINGLY_TOXIC)
            for r in [i for i, x in enumerate(train.labels) if x == c][: self.PROBE_ROWS]
        ]

    @property
    def stops_early(self) -> bool:
        """Whether a stop rule is on (then the best step is restored; otherwise the last one stays)."""
        return self.config.target > -1

    def measure(self, step: int) -> dict:
        fitted = pooled_states(self.stage, self.train, self.sample)
        fitted_classes = torch.tensor([self.train.labels[r] for r in self.sample])
        held = pooled_states(self.stage, self.held, range(len(self.held)))
        row = {
            "step": step,
            **held_out_measures(fitted, fitted_classes, held, torch.tensor(self.held.labels)),
        }
        self.rows.append(row)
        if self.trainer.state.is_world_process_zero:
            append_jsonl(self.path, row)
        return row

    def on_train_begin(self, args, state, control, **_) -> None:
        self.rows = [r for r in read_jsonl(self.path) if r["step"] <= state.global_step]
        self.trainer.accelerator.wait_for_everyone()  # all have read before one writes
        if state.is_world_process_zero:
            write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))
        if not self.rows:
            self.measure(0)
            self._keep()

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.config.eval_steps and state.global_step != state.max_steps:
            return
        row = self.measure(state.global_step)
        best = min(r["cross_similarity"] for r in self.rows)
        if row["cross_similarity"] <= best:
            self._keep()
        if self.config.target > -1 and row["cross_similarity"] <= self.config.target:
            self.reason = f"held-out cross-class cosine {row['cross_similarity']:.3f} reached {self.config.target}"
            control.should_training_stop = True

    def _keep(self) -> None:
        if self.stops_early and self.trainer.state.is_world_process_zero:
            temporary = self.best.with_suffix(".tmp")
            save_file(trained_state(self.stage), temporary)
            temporary.replace(self.best)

    def finish(self) -> None:
        """Restore the best step where a stop rule is on; say in the history's last row why training stopped."""
        self.trainer.accelerator.wait_for_everyone()
        step = self.trainer.state.global_step
        if self.stops_early and self.best.exists():
            load_trained_state(self.stage, load_file(self.best))
            step = min(self.rows, key=lambda r: (r["cross_similarity"], -r["step"]))["step"]
        recorder = self.trainer.recorder
        if recorder.rows:
            recorder.rows[-1] |= {"stop_reason": self.reason, "best_step": step}
            if self.trainer.state.is_world_process_zero:
                write_atomic(recorder.path, "".join(json.dumps(r) + "\n" for r in recorder.rows))
        log.info(
            "refine: stopped at step %d: %s; weights of step %d",
            self.trainer.state.global_step,
            self.reason,
            step,
        )
