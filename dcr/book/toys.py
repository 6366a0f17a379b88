"""A tokenizer for the notebooks' toys: the words of a few sentences, and no file to read."""

from collections.abc import Iterable
from typing import Any

SPECIALS = ["<unk>", "<pad>", "<end>", "<user>", "<assistant>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def toy_tokenizer(texts: Iterable[str]) -> Any:
    """One token a word of `texts`, with a chat template around what a user and a model say."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for text in texts for word in text.split())
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIALS, *words])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, additional_special_tokens=SPECIALS[3:], **named
    )
    tokenizer.chat_template = CHAT
    return tokenizer
