"""Stage 1's view of the model: prompts in, pooled hidden states at layer ℓ out."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from dcr.chat import encode, render
from dcr.models import length_sorted_batches, pool, truncated_forward
from dcr.sampling import GENERAL, SEEMINGLY_TOXIC, TOXIC

CLASS = {"toxic": TOXIC, "seemingly_toxic": SEEMINGLY_TOXIC, "general": GENERAL}


class StageOneModel(nn.Module):
    """The model up to hidden state ℓ: token ids [batch, seq] → pooled hidden states [batch, hidden]."""

    def __init__(self, model: nn.Module, layer: int, pooling: str, layers_path: str = "") -> None:
        super().__init__()
        self.model, self.layer, self.pooling, self.layers_path = model, layer, pooling, layers_path

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = truncated_forward(self.model, input_ids, attention_mask, self.layer, self.layers_path)
        return pool(hidden, attention_mask, self.pooling)


class PromptRows(torch.utils.data.Dataset):
    """Tokenised prompts with their class and row number."""

    def __init__(self, table: pd.DataFrame, tokenizer, max_length: int) -> None:
        texts = render(tokenizer, table["text"].tolist())
        self.tokenizer, self.labels = tokenizer, [CLASS[x] for x in table["label"]]
        self.ids = [encode(tokenizer, [t], max_length=max_length)["input_ids"][0].tolist() for t in texts]
        self.reference: Tensor | None = None  # [rows, hidden] of the frozen base, for retention

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad({"input_ids": [self.ids[r] for r in rows]}, padding=True, padding_side="left",
                                   return_tensors="pt")
        out = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
               "classes": torch.tensor([self.labels[r] for r in rows])}
        return out if self.reference is None else {**out, "reference": self.reference[list(rows)]}


@torch.no_grad()
def pooled_states(stage: StageOneModel, rows: PromptRows, which: Sequence[int], batch_size: int = 32) -> Tensor:
    """Pooled hidden states at ℓ of some rows, [len(which), hidden], fp32."""
    device = next(stage.parameters()).device
    was_training = stage.training
    stage.eval()
    out: Tensor | None = None
    for batch in length_sorted_batches([len(rows.ids[r]) for r in which], batch_size):
        inputs = rows.collate([which[i] for i in batch])
        hidden = stage(inputs["input_ids"].to(device), inputs["attention_mask"].to(device)).float().cpu()
        out = torch.empty(len(which), hidden.shape[1]) if out is None else out
        out[batch] = hidden
    stage.train(was_training)
    return out


def reference_states(stage: StageOneModel, rows: PromptRows, batch_size: int) -> Tensor:
    """The frozen base's states, read before the adapter has moved (B = 0), so no second copy of the model is kept."""
    which = [i for i, c in enumerate(rows.labels) if c == GENERAL]
    states = pooled_states(stage, rows, which, batch_size)
    full = torch.zeros(len(rows), states.shape[1])
    full[which] = states
    return full
