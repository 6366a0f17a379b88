"""The kernel against jacrev on tiny models, the random-probe estimate, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_model

from dcr.analysis.kernel import entk
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers
from dcr.lm.chat import render

A = ["how do i kill a process ?", "list the dog ."]
B = ["how do i kill my neighbour ?", "steal the password .", "how ?"]


def exact(model, tokenizer, prompts, tokens, wanted):
    """‖K‖_F by torch.func.jacrev over every wanted parameter, prompt by prompt."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if wanted(n)}

    def logits(values, ids):
        return torch.func.functional_call(model, values, (), {"input_ids": ids}).logits[0, -1][
            tokens
        ]

    rows = []
    for text in render(tokenizer, prompts):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        jacobian = torch.func.jacrev(logits)(parameters, ids)
        rows.append(torch.cat([j.reshape(len(tokens), -1) for j in jacobian.values()], 1))
    return np.array([[float((a @ b.T).norm()) for b in rows] for a in rows])


def scaled(name: str):
    """Families outside the common list that change logits or embeddings on their way."""
    import transformers as tf

    torch.manual_seed(0)
    small = dict(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, pad_token_id=1,
    )  # fmt: skip
    configs = {
        "cohere": lambda: tf.CohereConfig(**small, logit_scale=0.25),
        "gemma2": lambda: tf.Gemma2Config(**small, final_logit_softcapping=0.5),
        "opt with projections": lambda: tf.OPTConfig(
            vocab_size=128, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=8, pad_token_id=1,
        ),
    }  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(configs[name]()).float().eval()


@pytest.mark.parametrize(
    "family, tied",
    [(f, f not in ("gpt_neox", "phi")) for f in FAMILIES]
    + [("llama", False), ("granite", False)]
    + [(n, True) for n in ("cohere", "gemma2", "opt with projections")],
)
@pytest.mark.parametrize("parameters", ["all", "blocks"])
def test_equals_jacrev(family, tied, parameters, tiny_tokenizer):
    """Logit scales and caps, embedding multipliers, positions, projections and norms below the
    blocks included."""
    model = make_model(family, 2, 16, tied=tied) if family in FAMILIES else scaled(family)
    result = entk(model, tiny_tokenizer, A, B, k=4, parameters=parameters)
    blocks = next(n for n, m in model.named_modules() if m is decoder_layers(model)) + "."
    oracle = exact(
        model,
        tiny_tokenizer,
        [*A, *B],
        result.tokens,
        lambda n: parameters == "all" or n.startswith(blocks),
    )
    np.testing.assert_allclose(result.norms, oracle, rtol=2e-4)
    np.testing.assert_allclose(result.cross, oracle[:2, 2:], rtol=2e-4)


@pytest.mark.parametrize("fault", ["a matrix in two blocks", "a matrix used outside its layer"])
def test_a_model_whose_factors_are_not_known_is_refused(fault, tiny_tokenizer):
    model = make_model(layers=2, hidden=16)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(3.0)  # else the blocks hardly count beside the embeddings
    first, second = (block.mlp for block in model.model.layers)
    if fault == "a matrix in two blocks":
        second.down_proj.weight = first.down_proj.weight
    else:
        first.down_proj.forward = lambda x: (
            3.0 * torch.nn.functional.linear(x, first.down_proj.weight)
            + torch.nn.functional.linear(x, first.down_proj.weight) * x.sum()
        )
    with pytest.raises(DCRError, match="LlamaForCausalLM is not known well enough"):
        entk(model, tiny_tokenizer, A, B, k=3, parameters="blocks")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_refusal_tokens_and_ratios(tiny_tokenizer):
    model = make_model(layers=2, hidden=16)
    result = entk(model, tiny_tokenizer, A, B, tokens="refusal")
    oracle = exact(model, tiny_tokenizer, [*A, *B], result.tokens, lambda n: True)
    np.testing.assert_allclose(
        result.normalised, oracle[:2, 2:] / np.diag(oracle)[:2, None], rtol=1e-4
    )
    assert (result.symmetric <= 1 + 1e-6).all()
    same = entk(model, tiny_tokenizer, A[:1], A[:1], k=4)
    assert same.normalised[0, 0] == pytest.approx(1.0, rel=1e-5)


def test_all_tokens_estimate_is_unbiased_and_its_interval_covers(tiny_tokenizer):
    model = make_model(layers=2, hidden=16)
    oracle = exact(model, tiny_tokenizer, [A[0], B[0]], list(range(128)), lambda n: True)[0, 1]
    found = [
        entk(model, tiny_tokenizer, A[:1], B[:1], tokens="all", k=12, seed=s) for s in range(24)
    ]
    squares = [r.cross[0, 0] ** 2 for r in found]
    error = np.std(squares) / np.sqrt(len(squares))
    assert abs(np.mean(squares) - oracle**2) < 3.5 * error and error < 0.2 * oracle**2
    bounds = [tuple(side[0, 1] for side in r.interval) for r in found]
    assert np.mean([low <= oracle <= high for low, high in bounds]) >= 0.75
    assert (
        entk(model, tiny_tokenizer, A[:1], B[:1], k=4).interval is None
    )  # exact kernels carry no interval


def test_lora_kernel_and_its_degenerate_start(tiny_tokenizer, caplog):
    from dcr.train.adapters import Lora, train_blocks

    torch.manual_seed(0)
    model = train_blocks(make_model(layers=2, hidden=16), 0, 2, Lora(2, 4))
    with caplog.at_level("WARNING", logger="dcr"):
        result = entk(model, tiny_tokenizer, A, B, k=4, parameters="lora")
    assert result.degenerate and "degenerate" in caplog.text
    oracle = exact(
        model, tiny_tokenizer, [*A, *B], result.tokens, lambda n: "lora_B" in n
    )  # at B = 0, A has none
    np.testing.assert_allclose(result.cross, oracle[:2, 2:], rtol=1e-4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    trained = entk(model, tiny_tokenizer, A, B, k=4, parameters="lora")
    oracle = exact(model, tiny_tokenizer, [*A, *B], trained.tokens, lambda n: "lora_" in n)
    np.testing.assert_allclose(trained.cross, oracle[:2, 2:], rtol=1e-4)
    assert not trained.degenerate
    with pytest.raises(DCRError, match="no adapter"):
        entk(make_model(), tiny_tokenizer, A, B, parameters="lora")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": "some"}, "top-k, refusal or all"),
        ({"parameters": "head"}, "all, blocks or lora"),
        ({"tokens": "all", "k": 2}, "k >= 3"),
        ({"k": 0}, "k=0; tokens='top-k' needs k >= 1 and <= 128"),
        ({"k": 129}, "k=129; tokens='top-k' needs k >= 1 and <= 128"),
    ],
)
def test_bad_choices(change, message, tiny_tokenizer):
    with pytest.raises(DCRError, match=message):
        entk(make_model(), tiny_tokenizer, A, B, **change)


def test_empty_class_is_refused(tiny_tokenizer):
    with pytest.raises(DCRError, match="prompts_a: no rows"):
        entk(make_model(), tiny_tokenizer, [], B)


def test_prompts_are_read_from_a_path(tiny_tokenizer, tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("text\n" + "\n".join(B))
    model = make_model(layers=2, hidden=16)
    read, given = (entk(model, tiny_tokenizer, A, b, k=2).cross for b in (path, B))
    np.testing.assert_array_equal(read, given)


def test_a_long_common_beginning_changes_nothing(tiny_tokenizer):
    """The template's tokens are handled in a basis of their own: more of them than dimensions, and
    none at all."""
    model = make_model(layers=2, hidden=16)
    for head in (
        "tell me what the time is in my house and list the dog and the cat of my house ",
        "",
    ):
        a, b = (
            [head + "how do i kill ?"],
            [head + "steal the bike .", "how ?" if not head else head + "how ?"],
        )
        result = entk(model, tiny_tokenizer, a, b, k=4)
        oracle = exact(model, tiny_tokenizer, [*a, *b], result.tokens, lambda n: True)
        np.testing.assert_allclose(result.cross, oracle[:1, 1:], rtol=1e-4)


def test_prompt_over_the_context_and_broken_weights(tiny_tokenizer):
    model = make_model(layers=2, hidden=16)
    model.config.max_position_embeddings = 9
    with pytest.raises(DCRError, match="prompt 1 .* tokens, 9 fit"):
        entk(
            model,
            tiny_tokenizer,
            ["how ?"],
            ["how do i kill a process in my house ?"],
        )
    assert entk(
        model,
        tiny_tokenizer,
        ["how ?"],
        ["how do i kill my process ?"],
        truncate=True,
        k=3,
    ).cross.shape == (1, 1)
    model.config.max_position_embeddings = 256
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(DCRError, match="prompt 0 .* are not finite"):
        entk(model, tiny_tokenizer, A, B, tokens="refusal")
