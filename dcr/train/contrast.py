"""Stage 1's view of the model: prompts in, pooled hidden states at layer ℓ out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from dcr.config import RefineConfig
from dcr.errors import DCRError
from dcr.lm.batches import token_batches
from dcr.lm.blocks import pool, truncated_forward
from dcr.lm.chat import encode, render
from dcr.train.loop import StageTrainer, trained_state
from dcr.train.losses import ContrastiveLoss, drift
from dcr.train.sampling import GENERAL, SEEMINGLY_TOXIC, TOXIC

CLASS = {"toxic": TOXIC, "seemingly_toxic": SEEMINGLY_TOXIC, "general": GENERAL}


class StageOneModel(nn.Module):
    """The model up to hidden state ℓ: token ids [batch, seq] → pooled hidden states [batch, hidden]."""

    def __init__(self, model: nn.Module, layer: int, pooling: str, layers_path: str = "") -> None:
        super().__init__()
        self.model, self.layer, self.pooling, self.layers_path = model, layer, pooling, layers_path

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = truncated_forward(
            self.model, input_ids, attention_mask, self.layer, self.layers_path
        )
        return pool(hidden, attention_mask, self.pooling)


class PromptRows(torch.utils.data.Dataset):
    """Tokenised prompts with their class and row number."""

    def __init__(self, table: pd.DataFrame, tokenizer, max_length: int) -> None:
        texts = render(tokenizer, table["text"].tolist())
        self.tokenizer, self.labels = tokenizer, [CLASS[x] for x in table["label"]]
        self.ids = [
            encode(tokenizer, [t], max_length=max_length)["input_ids"][0].tolist() for t in texts
        ]
        self.reference: Tensor | None = None  # [rows, hidden] of the frozen base, for retention

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad(
            {"input_ids": [self.ids[r] for r in rows]},
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        out = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "classes": torch.tensor([self.labels[r] for r in rows]),
        }
        return out if self.reference is None else {**out, "reference": self.reference[list(rows)]}


@torch.no_grad()
def pooled_states(
    stage: StageOneModel, rows: PromptRows, which: Sequence[int], batch_size: int = 32
) -> Tensor:
    """Pooled hidden states at ℓ of some rows, [len(which), hidden], fp32."""
    device = next(stage.parameters()).device
    was_training = stage.training
    stage.eval()
    out: Tensor | None = None
    for batch in token_batches([len(rows.ids[r]) for r in which], batch_size):
        inputs = rows.collate([which[i] for i in batch])
        hidden = (
            stage(inputs["input_ids"].to(device), inputs["attention_mask"].to(device)).float().cpu()
        )
        out = torch.empty(len(which), hidden.shape[1]) if out is None else out
        out[batch] = hidden
    stage.train(was_training)
    return out


def reference_states(stage: StageOneModel, rows: PromptRows, batch_size: int) -> Tensor:
    """[rows, hidden] states of the general prompts under the frozen base; other rows are 0.

    The adapter is disabled (full parameters: read before the first step), so no second copy of the model is kept.
    """
    which = [i for i, c in enumerate(rows.labels) if c == GENERAL]
    base = (
        stage.model.disable_adapter()
        if hasattr(stage.model, "disable_adapter")
        else contextlib.nullcontext()
    )
    with base:
        states = pooled_states(stage, rows, which, batch_size)
    full = torch.zeros(len(rows), states.shape[1])
    full[which] = states
    return full


class RefineTrainer(StageTrainer):
    """Contrastive loss at ℓ, plus retention of the general prompts' hidden states."""

    def __init__(self, *, loss: ContrastiveLoss, config: RefineConfig, **kwargs) -> None:
        super().__init__(**kwargs)
        self.contrastive, self.config = loss, config
        self._step, self._parts = -1, []  # losses of the batches of one optimiser step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(inputs["input_ids"], inputs["attention_mask"])
        classes, reference, tokens = (
            inputs["classes"],
            inputs.get("reference"),
            inputs["attention_mask"].sum(),
        )
        if self.accelerator.num_processes > 1:
            # Negatives from every process. Each process computes the whole loss; the gather's backward adds up their
            # gradients and DDP divides by their number: the gradient of one process with all the prompts.
            from torch.distributed.nn.functional import all_gather

            hidden, classes = torch.cat(all_gather(hidden)), self.accelerator.gather(classes)
            reference = self.accelerator.gather(reference) if reference is not None else None
            tokens = self.accelerator.gather(tokens).sum()
        self.tokens += int(tokens)
        kind = torch.where(
            classes == GENERAL, SEEMINGLY_TOXIC if self.config.general_share else -1, classes
        )
        loss = contrast = self.contrastive(hidden, kind)
        parts = {"contrastive_loss": float(contrast.detach())}
        if reference is not None:
            general = classes == GENERAL
            kept = drift(hidden[general], reference[general])
            loss = contrast + self.config.retention * kept
            parts["drift"] = float(kept.detach())
        self._note({"loss": float(loss.detach()), **parts})
        self.check_finite(loss)
        return loss

    def _note(self, values: dict[str, float]) -> None:
        """The history shows the mean over the batches of an optimiser step."""
        if self._step != self.state.global_step:
            self._step, self._parts = self.state.global_step, []
        self._parts.append(values)
        self.metrics = {k: sum(p[k] for p in self._parts) / len(self._parts) for k in values}
        if torch.cuda.is_available():
            self.metrics["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def check_finite(self, loss: Tensor) -> None:
        """Stop at the first loss that is not finite, saying where; the last checkpoint is a good one (see `_save`)."""
        if not torch.isfinite(loss).all():
            self._give_up(f"the loss became {loss.item()}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not all(
            torch.isfinite(p).all()
            for p in trained_state(self.accelerator.unwrap_model(self.model)).values()
        ):
            self._give_up("weights are no longer finite")
        super()._save(output_dir, state_dict)

    def _give_up(self, what: str) -> None:
        step, batch = (
            self.state.global_step,
            self.state.global_step * self.args.gradient_accumulation_steps,
        )
        batch += max(0, len(self._parts) - 1) if self._step == step else -1
        found = Path(self.args.output_dir).glob("checkpoint-*/trainer_state.json")  # written last
        last = max((int(c.parent.name.rsplit("-", 1)[1]) for c in found), default=None)
        kept = (
            f"The last good checkpoint, checkpoint-{last}, is kept"
            if last
            else "No checkpoint had been written yet"
        )
        raise DCRError(
            f"refine: {what} at step {step + (self._step == step)}, batch {batch + 1} of {len(self.batches)} (rows "
            f"{self.batches.batches[batch][:8]}...). {kept}. Lower refine.lr, or train in float32."
        )
