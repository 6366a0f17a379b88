"""Prompts and answers as the model reads them: the chat template around them, and their tokens.

What a user or an answer says is text: a control token written in it ("<|im_end|>") is tokenised as
characters and opens or closes no turn. All else keeps the tokens of the rendered text as a whole.
"""

import datetime
import hashlib
import re
from collections.abc import Sequence

from dcr.errors import DCRError

# Some templates (Llama 3.x) print today's date: the same prompt must render the same for ever.
FIXED_DAY = datetime.date(2024, 7, 26)
MARK = "DCR-TEXT"
SPLIT = "\ufdd0"  # a code point that no text may hold; tokenising starts anew behind it
ALPACA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def encode_prompts(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, rendered up to where the assistant's answer begins.

    Raises DCRError for a template that is missing, fails, or leaves the prompt out, and for what is
    no text.
    """
    return token_ids(tokenizer, render(tokenizer, as_text(tokenizer, _texts(prompts, "prompt"))))


def encode_examples(
    tokenizer, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """(ids of each prompt, its answer and the one token that ends it; where the answer begins).

    Prompt and answer are tokenised apart, so the border is the one that generation sees. Raises
    DCRError as `encode_prompts` does, and where nothing would end an answer.
    """
    if len(responses) != len(prompts):
        raise DCRError(f"{len(prompts)} prompts but {len(responses)} responses; give one each.")
    end = turn_end(tokenizer)
    stops = tuple({end.strip(), tokenizer.eos_token or end.strip()})
    answers = []
    for text in _texts(responses, "answer"):
        text = text.strip()
        while text.endswith(stops):  # taught once, however often the data hold it
            text = text[: -max(len(s) for s in stops if text.endswith(s))].rstrip()
        answers.append(text)
    heads = encode_prompts(tokenizer, prompts)
    tails = token_ids(tokenizer, [text + end for text in as_text(tokenizer, answers)])
    return [h + t for h, t in zip(heads, tails, strict=True)], [len(h) for h in heads]


def render(tokenizer, prompts: Sequence[str]) -> list[str]:
    """Chat text of each prompt up to the assistant's turn, special tokens written out."""
    typed = _typed(tokenizer)
    return _apply(tokenizer, [[_message("user", p, typed)] for p in prompts], True)


def turn_end(tokenizer) -> str:
    """What the template puts after an answer, up to and with the control token that ends it."""
    typed = _typed(tokenizer)
    turns = [_message("user", "x", typed), _message("assistant", MARK, typed)]
    _, found, tail = _apply(tokenizer, [turns], False)[0].rpartition(MARK)
    if not found:
        raise DCRError(
            f"{tokenizer.name_or_path}: the chat template renders no assistant turn, so there is "
            "nothing to train on. Use chat_template='alpaca' or a template with such a turn."
        )
    control = _controls(tokenizer).search(tail)
    end = tail[: control.end()] if control else tail.rstrip("\n") + (tokenizer.eos_token or "")
    if not control and not tokenizer.eos_token:
        raise DCRError(
            f"{tokenizer.name_or_path}: neither the tokenizer (no eos_token) nor the chat template "
            "has a token that ends an answer. Set the tokenizer's eos_token."
        )
    return end


def stop_tokens(model, tokenizer) -> list[int]:
    """Ids at which decoding stops: ends of text (model's, tokenizer's), the template's turn end."""
    eos = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    try:
        stops.add(token_ids(tokenizer, [turn_end(tokenizer)])[0][-1])
    except DCRError:  # a template without an assistant's turn can be asked, though not taught
        pass
    return sorted(s for s in stops if s is not None)


def rendered_example(tokenizer) -> dict:
    """One rendered prompt and its hash, for the manifest: proves which template a run used."""
    text = render(tokenizer, ["How do I kill a zombie process?"])[0]
    return {"rendered_prompt": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def strip_thinking(text: str) -> str:
    """An answer without the reasoning that it closed ("<think> ... </think>")."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)
    return text.rpartition("</think>")[2].strip()


def unfinished(answer: str) -> bool:
    """Whether an answer was cut inside its reasoning, so that nothing of it can be judged."""
    return "<think>" in answer


def _apply(tokenizer, chats: list[list[dict]], add_generation_prompt: bool) -> list[str]:
    """Chat text of each conversation, the same on every day; reasoning off where it can be."""
    today = r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)"
    try:
        template = tokenizer.get_chat_template()
        template = re.sub(today, lambda m: repr(FIXED_DAY.strftime(m[2])), template)
        return tokenizer.apply_chat_template(
            chats,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=FIXED_DAY.strftime("%d %b %Y"),
            enable_thinking=False,
        )
    except Exception as error:  # whatever a template raises
        raise DCRError(
            f"{tokenizer.name_or_path}: the chat template cannot render a conversation of one user "
            f"turn ({error}). Mend it, or load the model with chat_template='alpaca'."
        ) from error


def _message(role: str, text: str, typed: bool) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}] if typed else text}


def _typed(tokenizer) -> bool:
    """Whether the template wants typed parts as content. Raises DCRError when it shows neither."""
    first: DCRError | None = None
    for typed in (False, True):
        try:
            if MARK in _apply(tokenizer, [[_message("user", MARK, typed)]], True)[0]:
                return typed
        except DCRError as error:
            first = first or error
    raise first or DCRError(
        f"{tokenizer.name_or_path}: the chat template leaves the user's text out: every prompt "
        "renders to the same turn. Use chat_template='alpaca' or another template."
    )


def _controls(tokenizer) -> re.Pattern:
    """Matches control tokens: special ones, and added ones that the template writes (no blanks)."""
    template = str(tokenizer.chat_template)
    known = [
        t.content
        for t in tokenizer.added_tokens_decoder.values()
        if t.content.strip() and (t.special or t.content in template)
    ]
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or r"(?!)")


def _texts(texts: Sequence[str], what: str) -> Sequence[str]:
    if isinstance(texts, str):
        raise DCRError(f"one {what} was given where a list of them is meant: {texts[:60]!r}.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DCRError(f"{what} {i} is {text!r}, not text.")
    return texts


def as_text(tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts with every control token broken up behind its first character."""
    controls = _controls(tokenizer)
    return [controls.sub(lambda m: m[0][0] + SPLIT + m[0][1:], t) for t in texts]


def token_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts, none added; what stands between two `SPLIT` by itself."""
    parts = [t.split(SPLIT) for t in texts]
    flat = [part for row in parts for part in row]
    ids = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    return [[i for _ in row for i in next(ids)] for row in parts]
