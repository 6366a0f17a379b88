"""Shared fixtures: tiny random models of every supported family and a tiny word tokenizer. No
network."""

from __future__ import annotations

import errno
import os
import socket
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def offline(event: str, given: tuple) -> None:
    """The audit hook of every test: no socket reaches further than this machine."""
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    host = given[1] if event == "socket.connect" else given
    host = host[0] if isinstance(host, tuple) else ""  # else a socket in the file system
    host = host.decode() if isinstance(host, bytes) else host or ""
    if host not in ("", "localhost", "::1", socket.gethostname()) and not host.startswith("127."):
        raise OSError(errno.ENETUNREACH, f"tests have no network, {host} is not asked")


sys.addaudithook(offline)

WORDS = (
    "how do i kill a process neighbour the in is what write list explain story about steal my "
    "time password "
    "game give tell me ? . , ! sure sorry cannot can't help with that this of to and for you "
    "your it be on "
    "python file cat dog house bake bread fix bike plan trip"
).split()
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def make_tokenizer():
    """A word-level tokenizer with a chat template, pad, stop and unknown tokens; 128 ids at
    most."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocab = {w: i for i, w in enumerate(specials + WORDS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    return tokenizer


def make_model(
    family: str = "llama",
    layers: int = 4,
    hidden: int = 32,
    vocab: int = 128,
    tied: bool = True,
    seed: int = 0,
    window: int = 64,
):
    """A tiny random causal LM of one family, fp32, eval mode; `window` is that of sliding
    attention."""
    import transformers as tf

    torch.manual_seed(seed)
    common = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=2,
    )
    gated = dict(common, intermediate_size=2 * hidden, num_key_value_heads=2)
    configs = {
        "llama": lambda: tf.LlamaConfig(**gated),
        "qwen2": lambda: tf.Qwen2Config(**gated),
        "qwen3": lambda: tf.Qwen3Config(**dict(gated, head_dim=hidden // 4)),
        "mistral": lambda: tf.MistralConfig(**dict(gated, sliding_window=window)),
        "phi3": lambda: tf.Phi3Config(**dict(gated, sliding_window=window)),
        "phi": lambda: tf.PhiConfig(**dict(common, intermediate_size=2 * hidden)),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **dict(gated, head_dim=hidden // 4, sliding_window=window)
        ),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**dict(common, intermediate_size=2 * hidden)),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=vocab,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=256,
            tie_word_embeddings=tied,
            pad_token_id=1,
            eos_token_id=2,
            bos_token_id=2,
        ),
        "opt": lambda: tf.OPTConfig(**dict(common, ffn_dim=2 * hidden, word_embed_proj_dim=hidden)),
        "granite": lambda: tf.GraniteConfig(
            **dict(gated, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7)
        ),
    }
    model = tf.AutoModelForCausalLM.from_config(configs[family]())
    return model.float().eval()


# The families that every part of the kit is tested on (see test_families.py).
FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "granite"),
)


@pytest.fixture
def tiny():
    """Factory: tiny("gpt2") → a tiny random model of that family."""
    return make_model


@pytest.fixture
def tiny_llama():
    """A tiny random Llama: 4 blocks, hidden size 32."""
    return make_model("llama")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tiny word tokenizer."""
    return make_tokenizer()


@pytest.fixture
def prompts() -> list[str]:
    """A handful of prompts inside the tiny vocabulary, of different lengths."""
    return [
        "how do i kill a process ?",
        "how do i kill my neighbour ?",
        "write a story about the cat .",
        "list the dog .",
        "tell me what the time is in my house ?",
        "steal the password .",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local model folder: a tiny Llama with the tiny tokenizer, saved once a module."""
    path = tmp_path_factory.mktemp("model")
    make_model(layers=3).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
