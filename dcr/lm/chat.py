"""Prompts as the model reads them: chat rendering, tokenising, and the Alpaca prompt for base models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dcr.errors import DCRError

# Fixed, because some templates (Llama 3.x) print today's date: the same prompt must render the same for ever.
FIXED_DATE = "26 Jul 2024"
ALPACA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def render(tokenizer, prompts: Sequence[str], responses: Sequence[str] | None = None) -> list[str]:
    """Chat text of each prompt up to the assistant's turn; with `responses`, the answer and its end token too.

    The text already holds every special token: tokenise it with `encode`, which adds none.
    Raises DCRError when the tokenizer has no chat template or it renders no assistant turn.
    """
    if not tokenizer.chat_template:
        raise DCRError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template. Load it with dcr.models.load("
            "..., chat_template='alpaca') to use the Alpaca prompt."
        )
    heads = [_apply(tokenizer, [{"role": "user", "content": p}], True) for p in prompts]
    if responses is None:
        return heads
    if len(responses) != len(heads):
        raise DCRError(
            f"render: {len(heads)} prompts but {len(responses)} responses; give one response a prompt."
        )
    end = turn_end(tokenizer)
    return [
        head + str(response).strip() + end for head, response in zip(heads, responses, strict=True)
    ]


def _apply(tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        date_string=FIXED_DATE,
    )


def turn_end(tokenizer) -> str:
    """What the template puts right after an answer, up to and with the token that stops generation."""
    marker = "DCR-ANSWER"
    text = _apply(
        tokenizer,
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}],
        False,
    )
    head, found, tail = text.rpartition(marker)
    if not found:
        raise DCRError(
            f"{tokenizer.name_or_path}: the chat template renders no assistant turn, so there is nothing "
            "to train on. Use chat_template='alpaca' or a template with an assistant turn."
        )
    eos = tokenizer.eos_token or ""
    if eos and eos in tail:
        return tail[: tail.index(eos) + len(eos)]
    return tail.rstrip("\n") or eos


def encode(
    tokenizer,
    texts: Sequence[str],
    *,
    padding_side: str = "left",
    max_length: int | None = None,
    truncate: bool = False,
    device: str = "cpu",
) -> dict:
    """Token ids of rendered texts as {input_ids, attention_mask}, each [batch, seq].

    Raises DCRError naming the first text longer than `max_length` tokens unless `truncate` is set.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if max_length is not None:
        for i, row in enumerate(rows):
            if len(row) > max_length and not truncate:
                raise DCRError(
                    f"prompt {i} has {len(row)} tokens, the limit is {max_length}: {texts[i][:80]!r}... "
                    "Shorten it, raise the limit, or ask for truncation (truncate=True)."
                )
        rows = [row[-max_length:] if padding_side == "left" else row[:max_length] for row in rows]
    batch = tokenizer.pad(
        {"input_ids": rows}, padding=True, padding_side=padding_side, return_tensors="pt"
    )
    return {
        "input_ids": batch["input_ids"].to(device),
        "attention_mask": batch["attention_mask"].to(device),
    }


def rendered_example(tokenizer) -> dict:
    """One rendered prompt and its hash, for the manifest: proves which template a run used."""
    text = render(tokenizer, ["How do I kill a zombie process?"])[0]
    return {"rendered_prompt": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
