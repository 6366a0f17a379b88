"""Answers of the local model to prompts: written as they come, gone on with after a kill."""

import contextlib
import json
import logging
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dcr.data.files import append_jsonl, content_key, read_jsonl, write_atomic
from dcr.data.read import prompts_of
from dcr.errors import DCRError
from dcr.lm.batches import fitted
from dcr.lm.blocks import fingerprint, in_precision
from dcr.lm.chat import encode_prompts, render, stop_tokens, strip_thinking
from dcr.lm.decode import Decoder, Decoding, Steering, Unsteered
from dcr.lm.device import resolve_precision

log = logging.getLogger("dcr")
COLUMNS = ["prompt_id", "method", "seed", "response", "n_tokens", "finish"]  # finish: eos, length


def generate(  # noqa: PLR0913
    model,
    tokenizer,
    prompts,
    *,
    method: str = "",
    seed: int = 0,
    max_new_tokens: int = 24,
    batch_size: int = 64,
    max_tokens_per_batch: int = 0,
    temperature: float = 0.0,
    precision: str = "",
    out: str | Path | None = None,
    steering: Steering | None = None,
) -> pd.DataFrame:
    """Answers to prompts (texts, or a prompt table): one row a prompt, columns `COLUMNS`.

    Greedy, or sampled at `temperature` (a sample depends on the seed and its prompt alone); what
    else a model's generation config asks for (top-p, a penalty of repetition) is not done.
    precision: "bf16" or "fp32" for this call; "" takes the weights as they are. A batch holds at
    most `batch_size` prompts and `max_tokens_per_batch` tokens, new ones counted (0: what the
    device holds). With `out` (JSONL) rows are written as they come, and a second call answers what
    is missing; one with other parameters is refused. Reasoning that a model closed is cut from its
    answer (n_tokens counts it). steering: a method of `dcr.steering`. Raises DCRError for bad
    prompts, parameters, too little memory, and logits that are not numbers.
    """
    prompts = prompts_of(prompts)
    if not (max_new_tokens >= 1 and temperature >= 0):
        raise DCRError(
            f"generation.max_new_tokens={max_new_tokens}, temperature={temperature}: give at least "
            "1 and 0."
        )
    if precision:
        precision = resolve_precision(precision, model.device)
    settings = {
        "method": method,
        "seed": int(seed),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "max_tokens_per_batch": max_tokens_per_batch,
        "temperature": temperature,
        "precision": precision or str(model.dtype),
        **({"steering": steering.settings} if steering else {}),
        **({"model": fingerprint(model, tokenizer)} if out else {}),
    }
    answers = Answers(prompts, {"method": method, "seed": int(seed)}, settings, out)
    texts = answers.todo["text"].tolist()
    if not texts:
        return answers.frame()
    rows = encode_prompts(tokenizer, texts)
    rows = fitted(model, rows, answers.todo, room=max_new_tokens)
    thinks = render(tokenizer, texts[:1])[0].rstrip().endswith("<think>")  # opened by the template
    with in_precision(model, precision) if precision else contextlib.nullcontext(), torch.no_grad():
        started = steering.start(model, tokenizer, texts) if steering else Unsteered()
        if started.prefill:
            rows = [[*row, *ids] for row, ids in zip(rows, started.prefill, strict=True)]
        for i, text in started.answers.items():
            answers.add(i, text, len(tokenizer(text, add_special_tokens=False)["input_ids"]), True)
        stops = stop_tokens(model, tokenizer)
        options = Decoding(max_new_tokens, temperature, seed)
        decoder = Decoder(model, rows, stops, options, started)
        left = [i for i in range(len(rows)) if i not in started.answers]
        for batch, outputs in decoder.batches(left, batch_size, max_tokens_per_batch):
            for i, tokens in zip(batch, outputs, strict=True):
                stopped = tokens[-1] in stops  # by a token that need not be a special one
                said = tokens[:-1] if stopped else tokens
                text = "<think>" * thinks + tokenizer.decode(said, skip_special_tokens=True)
                answers.add(i, strip_thinking(text), len(tokens), stopped)
    return answers.frame()


class Answers:
    """Rows of answers as they come, in memory and in a file that a later call goes on from."""

    def __init__(
        self, prompts: pd.DataFrame, marks: dict, settings: dict, out: str | Path | None
    ) -> None:
        """marks: method and seed, the same in every row."""
        self.prompts, self.marks, self.out = prompts, marks, out
        asked = content_key(prompts[["id", "text"]].to_numpy().tolist())
        self.rows = resume(out, settings | {"prompts": asked})
        done = {row["prompt_id"] for row in self.rows}
        self.todo = prompts[~prompts["id"].isin(done)].reset_index(drop=True)
        self.bar = tqdm(total=len(prompts), unit="prompt", leave=False, desc="answers")
        self.bar.update(len(self.rows))

    def add(self, i: int, response: str, n_tokens: int, stopped: bool) -> None:
        """The answer to prompt `i` of `todo`."""
        row = {
            "prompt_id": self.todo["id"].iloc[i],
            **self.marks,
            "response": response.strip(),
            "n_tokens": n_tokens,
            "finish": "eos" if stopped else "length",
        }
        self.rows.append(row)
        self.bar.update(1)
        if self.out is not None:
            append_jsonl(Path(self.out), row)

    def frame(self) -> pd.DataFrame:
        """All answers in the prompts' order, columns `COLUMNS`."""
        self.bar.close()
        cut = sum(row["finish"] == "length" for row in self.rows)
        counts = len(self.rows), len(self.prompts), cut
        log.info("%d of %d prompts answered, %d answers cut at the limit of tokens", *counts)
        order = {key: i for i, key in enumerate(self.prompts["id"])}
        rows = sorted(self.rows, key=lambda row: order[row["prompt_id"]])
        return pd.DataFrame(rows, columns=COLUMNS)


def resume(out: str | Path | None, settings: dict) -> list[dict]:
    """Rows already in `out`; refuses a file begun with other settings (kept in .settings.json)."""
    if out is None:
        return []
    path, beside = Path(out), Path(f"{out}.settings.json")
    rows = read_jsonl(path)
    if rows and not beside.exists():
        raise DCRError(f"{path}: holds rows that no such call wrote. Give another file.")
    if rows:
        before = json.loads(beside.read_text(encoding="utf-8"))
        pairs = [(k, before.get(k), settings.get(k)) for k in (settings | before)]
        changed = [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]
        if changed:
            raise DCRError(
                f"{path}: begun with other parameters ({'; '.join(changed)}). Use another file or "
                "delete it."
            )
    write_atomic(beside, json.dumps(settings))
    return rows
