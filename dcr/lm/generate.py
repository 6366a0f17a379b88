"""Batched generation with the local model: length-sorted, shared prefix computed once, written as it comes.

All chat prompts begin with the same system text. Its keys and values are computed once and shared by every batch;
rows that have stopped leave the batch. Both change speed only: in fp32 the tokens are those of the library.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dcr.data.files import append_jsonl, read_jsonl, write_atomic
from dcr.errors import DCRError
from dcr.lm.batches import common_prefix, token_batches
from dcr.lm.chat import render

log = logging.getLogger("dcr")
COLUMNS = ["prompt_id", "method", "seed", "response", "n_tokens", "finish"]


def inference_dtype(wanted: str, device: str) -> torch.dtype:
    """ "auto" → bfloat16 where the hardware multiplies it natively, else float32; or the named dtype."""
    from dcr.lm.load import DTYPES, resolve_precision  # LEGACY: callers take in_precision

    return DTYPES[resolve_precision(wanted, device)]


def generate(
    model,
    tokenizer,
    prompts: pd.DataFrame,
    *,
    method: str = "",
    seed: int = 0,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    temperature: float = 0.0,
    out: str | Path | None = None,
    max_length: int | None = None,
    steering=None,
) -> pd.DataFrame:
    """Answers to a prompt table (columns id, text): rows prompt_id, method, seed, response, n_tokens, finish.

    Greedy, or sampled at `temperature`. The model is used as it is (its dtype, its hooks). With `out` (a JSONL file)
    rows are written batch by batch, and a second call answers only what is missing; one with other parameters is
    refused. `steering` (see `dcr.steering`) changes the forward pass or the choice of tokens, for this call only.
    Raises DCRError for an empty table, repeated ids, or changed parameters.
    """
    check_request(prompts, max_new_tokens, temperature)
    settings = {
        "method": method,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "dtype": str(model.dtype),
    }
    if steering is not None:
        settings["steering"] = steering.settings
    rows = resume(out, settings)
    done = {row["prompt_id"] for row in rows}
    todo = prompts[~prompts["id"].isin(done)]
    if not todo.empty:
        texts = todo["text"].tolist() if steering else render(tokenizer, todo["text"].tolist())
        decoder = (steering.decoder if steering else _Decoder)(
            model, tokenizer, texts, max_new_tokens, temperature, seed, max_length
        )
        ids = todo["id"].tolist()
        with tqdm(
            total=len(prompts),
            initial=len(done),
            desc=f"generate {method}",
            unit="prompt",
            leave=False,
        ) as bar:
            for batch in token_batches([len(r) for r in decoder.rows], batch_size):
                for i, tokens in zip(batch, decoder.run(batch), strict=True):
                    stopped = bool(tokens) and tokens[-1] in decoder.stops
                    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    row = dict(
                        zip(
                            COLUMNS,
                            (
                                ids[i],
                                method,
                                seed,
                                text,
                                len(tokens),
                                "eos" if stopped else "length",
                            ),
                            strict=True,
                        )
                    )
                    rows.append(row)
                    if out is not None:
                        append_jsonl(Path(out), row)
                bar.update(len(batch))
        log.info(
            "generate %s: %d prompts, %d of them cut at %d tokens",
            method,
            len(rows),
            sum(r["finish"] == "length" for r in rows),
            max_new_tokens,
        )
    order = {key: i for i, key in enumerate(prompts["id"])}
    return pd.DataFrame(sorted(rows, key=lambda r: order[r["prompt_id"]]), columns=COLUMNS)


def check_request(prompts: pd.DataFrame, max_new_tokens: int, temperature: float) -> None:
    """Raise DCRError for an empty table, a repeated id, or numbers out of range."""
    if prompts.empty:
        raise DCRError("generate: no prompts given.")
    if prompts["id"].duplicated().any():
        raise DCRError(
            f"generate: id {prompts.loc[prompts['id'].duplicated(), 'id'].iloc[0]!r} occurs twice."
        )
    if max_new_tokens < 1 or temperature < 0:
        raise DCRError(
            f"generation.max_new_tokens={max_new_tokens} and temperature={temperature}: at least 1 and 0."
        )


def resume(out: str | Path | None, settings: dict) -> list[dict]:
    """Rows already in `out`; refuses a file that was begun with other settings (kept beside it as .settings.json)."""
    if out is None:
        return []
    path, beside = Path(out), Path(f"{out}.settings.json")
    if beside.exists() and path.exists():
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [
            f"{k}: {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v
        ]
        if changed:
            raise DCRError(
                f"{path}: begun with other parameters ({'; '.join(changed)}). Use another file or delete it."
            )
    write_atomic(beside, json.dumps(settings))
    rows = read_jsonl(path)
    if rows:  # a torn last line must not stay in the middle of what follows
        write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return rows


def decode(
    model, tokenizer, texts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Greedy new token ids after each rendered text, in the texts' order (stop token included)."""
    decoder = _Decoder(model, tokenizer, texts, max_new_tokens, 0.0, 0, None)
    out: list[list[int]] = [[] for _ in texts]
    for batch in token_batches([len(r) for r in decoder.rows], batch_size):
        for i, tokens in zip(batch, decoder.run(batch), strict=True):
            out[i] = tokens
    return out


class _Decoder:
    """Greedy or sampled decoding of token rows behind their common prefix."""

    def __init__(
        self,
        model,
        tokenizer,
        texts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        max_length: int | None,
    ) -> None:
        self.model, self.tokenizer, self.limit, self.temperature = (
            model,
            tokenizer,
            max_new_tokens,
            temperature,
        )
        self.device = next(model.parameters()).device
        self.rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        room = (
            max_length or getattr(model.config, "max_position_embeddings", None) or 10**9
        ) - max_new_tokens
        for text, row in zip(texts, self.rows, strict=True):
            if len(row) > room:
                raise DCRError(
                    f"a prompt has {len(row)} tokens, but {room} fit beside {max_new_tokens} new ones: "
                    f"{text[-80:]!r}. Shorten it."
                )
        eos = model.generation_config.eos_token_id
        self.stops = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.shared = common_prefix(self.rows) if len(self.rows) > 1 else 0
        self.cache = None

    @torch.no_grad()
    def run(self, batch: Sequence[int]) -> list[list[int]]:
        """New token ids of each row, the stop token included."""
        state = self.begin(batch)
        active, out = list(range(len(batch))), [[] for _ in batch]
        for _ in range(self.limit):
            token = self._choose(self.logits(state))
            for row, t in zip(active, token.tolist(), strict=True):
                out[row].append(t)
            alive = [i for i, t in enumerate(token.tolist()) if t not in self.stops]
            if not alive:
                break
            active = [active[i] for i in alive]
            self.advance(state, token, alive)
        return out

    def begin(self, batch: Sequence[int]) -> State:
        """Rows of one batch, left-padded behind the common prefix."""
        tails = [self.rows[i][self.shared :] for i in batch]
        width, pad = max(map(len, tails)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(t)) + t for t in tails], device=self.device)
        mask = torch.tensor(
            [[1] * self.shared + [0] * (width - len(t)) + [1] * len(t) for t in tails],
            device=self.device,
        )
        return State(list(batch), ids, mask, self._prefix(len(batch)))

    def logits(self, state: State) -> Tensor:
        """Logits of the next token, [rows, vocabulary]; the tokens of `state.ids` join the cache."""
        positions = (state.mask.cumsum(-1) - 1).clamp(min=0)[:, -state.ids.shape[1] :]
        step = self.model(
            input_ids=state.ids,
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.cache = step.past_key_values
        return step.logits[:, -1]

    def advance(self, state: State, token: Tensor, alive: list[int]) -> None:
        """Append the chosen tokens; rows that have stopped leave the batch."""
        if len(alive) < len(token):
            keep = torch.tensor(alive, device=self.device)
            state.cache.batch_select_indices(keep)
            state.rows, state.mask, token = (
                [state.rows[i] for i in alive],
                state.mask[keep],
                token[keep],
            )
        state.ids = token[:, None]
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(token), 1)], 1)

    def _prefix(self, n: int):
        """Keys and values of the common prefix for n rows."""
        if not self.shared:
            return None
        if self.cache is None:
            ids = torch.tensor([self.rows[0][: self.shared]], device=self.device)
            self.cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(n)
        return cache

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        probability = (logits.float() / self.temperature).softmax(-1)
        return torch.multinomial(probability, 1, generator=self.generator)[:, 0]


@dataclass
class State:
    """A batch under way: row numbers, the tokens to read next [rows, n], attention mask [rows, seq], keys and values."""

    rows: list[int]
    ids: Tensor
    mask: Tensor
    cache: object
