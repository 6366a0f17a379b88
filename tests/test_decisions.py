"""Gate, decision token, their sum and the tied edit: planted harm comes back; exports stand
alone."""

from __future__ import annotations

import ast
import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_steering import plant, unit

from dcr.analysis import refusal
from dcr.config import SteeringConfig
from dcr.data.sets import PLAIN_REFUSAL
from dcr.errors import DCRError
from dcr.lm.blocks import decoder_layers, replaced
from dcr.lm.chat import encode_prompts
from dcr.lm.generate import generate
from dcr.lm.states import residuals
from dcr.steering import KINDS, DecisionToken, Gate, Scans, Tied, TokenGate
from dcr.steering.gate import balanced_auroc, cells, check_sources, nominal
from dcr.steering.hooks import template_ends
from dcr.steering.tied import down_projection, tied
from dcr.steering.tokens import combined, fit_combination

LIMIT = 5


def pairs(source: str = "pairs", things: str = "cat dog house bike bread file") -> pd.DataFrame:
    """Both classes in both forms: "steal" is harm, "bake" is not."""
    rows = [
        {"text": text, "label": label, "form": form, "request": f"{thing}", "source": source}
        for thing in things.split()
        for other in ("my house", "the cat", "your game")
        for verb, label in (("steal", "toxic"), ("bake", "seemingly_toxic"))
        for form, text in (
            ("question", f"how do i {verb} the {thing} in {other} ?"),
            ("imperative", f"{verb} the {thing} in {other} ."),
        )
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def planted(tiny_tokenizer):
    """A model whose block 1 writes a direction where harm is asked for, and that direction."""
    model, direction = make_model(seed=4), unit()
    hooks = plant(model, tiny_tokenizer, "steal", 1, direction, size=8.0)
    yield model, direction
    for hook in hooks:
        hook.remove()


def test_a_gate_finds_planted_harm_and_answers_what_it_lets_pass(planted, tiny_tokenizer):
    model, direction = planted
    held = pairs("held", "story plan trip").assign(benchmark="held")
    gate = Gate.fit(model, tiny_tokenizer, {"pairs": pairs()}, held, SteeringConfig(target=1.0))
    facts = gate.facts
    assert facts["layer"] in (2, 3) and facts["validation_auroc"] == 1.0
    assert facts["sources"] == ["pairs"] and facts["validation_refused"] == 0.0
    assert float(gate.tensors["weight"] @ direction) > 0.05
    table = pd.DataFrame({"id": ["a", "b"], "text": ["steal the trip .", "bake the trip ."]})
    answers = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=gate)
    own = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT)
    assert answers["response"].tolist() == [PLAIN_REFUSAL, own["response"][1]]
    off = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=gate.at(0.0))
    assert off["response"].tolist() == own["response"].tolist()
    again = Gate.load(json.loads(json.dumps(facts)), gate.tensors)
    assert again.settings == gate.settings != gate.at(2.0).settings


@pytest.mark.parametrize("place", ["template", "instruction", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_scores_are_read_off_the_librarys_states(family, place, tiny_tokenizer, prompts):
    model = make_model(family)
    head, tail = template_ends(tiny_tokenizer)
    tokens = {"template": [-1, None], "instruction": [-tail - 1, -tail], "mean": [head, -tail]}
    gate = Gate(
        {"layer": 2, "tokens": tokens[place]},
        {"weight": unit(), "bias": torch.tensor(0.25)},
    )
    expected = []
    for row in encode_prompts(tiny_tokenizer, prompts):
        with torch.no_grad():
            state = model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0]
        expected.append(float(state[slice(*tokens[place])].mean(0) @ unit() + 0.25))
    np.testing.assert_allclose(gate.score(model, tiny_tokenizer, prompts), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_gate_needs_transformers_alone(
    dtype, tmp_path, tiny_tokenizer, capsys, monkeypatch
):
    model, held = make_model(seed=4).to(dtype), pairs("held", "story plan")
    gate = Gate.fit(model, tiny_tokenizer, {"pairs": pairs()}, held, SteeringConfig())
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in gate.tensors.items()}, tmp_path / "steering.safetensors"
    )
    (tmp_path / "steering.json").write_text(json.dumps({"kind": "gate", **gate.facts}))
    (tmp_path / "use.py").write_text(gate.script)
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(gate.script))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert names == {"json", "pathlib", "sys", "safetensors", "transformers"}
    text = "how do i steal the trip ?"
    monkeypatch.setattr(sys, "argv", ["use.py", text])
    runpy.run_path(str(tmp_path / "use.py"))
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    score = gate.score(model, tiny_tokenizer, [text])[0]
    assert said["score"] == pytest.approx(score, abs=1e-3 if dtype == torch.float32 else 0.1)
    assert (said["answer"] == PLAIN_REFUSAL) == (score >= gate.facts["threshold"])


def test_the_exported_script_renders_as_the_kit_does(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    """A template that prints the day, and one that thinks unless it is told not to."""
    told = (
        "{{ date_string or 'steal' }} {% if enable_thinking is undefined %}steal my bike{% endif %}"
    )
    tokenizer, model = make_tokenizer(), make_model(seed=4)
    tokenizer.chat_template = told + tokenizer.chat_template
    gate = Gate(
        {"layer": 2, "tokens": [0, None], "threshold": 99.0, "refusal": PLAIN_REFUSAL},
        {"weight": unit(), "bias": torch.tensor(0.25)},
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_file(gate.tensors, tmp_path / "steering.safetensors")
    (tmp_path / "steering.json").write_text(json.dumps({"kind": "gate", **gate.facts}))
    (tmp_path / "use.py").write_text(gate.script)
    monkeypatch.setattr(sys, "argv", ["use.py", "list the dog ."])
    runpy.run_path(str(tmp_path / "use.py"))
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    score = gate.score(model, tokenizer, ["list the dog ."])[0]
    assert said["score"] == pytest.approx(score, abs=1e-3)


def test_scores_end_where_learned_positions_do(tiny_tokenizer):
    """Of a prompt over the context its last tokens are read, as every score of the kit does."""
    model, tail = make_model("gpt2"), template_ends(tiny_tokenizer)[1]
    gate = Gate({"layer": 2, "tokens": [-1, None]}, {"weight": unit(), "bias": torch.tensor(0.25)})
    scans = Scans({"tail": tail}, {"transitions": torch.ones(4, 32), "vectors": torch.ones(4, 32)})
    for scores in (gate.score, DecisionToken({}, {}).score, scans.harmfulness):
        assert np.isfinite(scores(model, tiny_tokenizer, ["the cat " * 200, "how ?"])).all()


def test_the_other_kinds_come_with_a_script_of_the_kit():
    for name, kind in KINDS.items():
        tree = ast.parse(kind.script)
        assert name == "gate" or any("dcr" in ast.dump(node) for node in tree.body)


@pytest.mark.parametrize("column, value", [("label", "toxic"), ("form", "question")])
def test_a_source_of_one_class_or_form_is_refused(column, value, tiny_llama, tiny_tokenizer):
    rows = pairs()
    other = pairs("bad")
    rows = pd.concat([rows, other[other[column] == value]], ignore_index=True)
    for kind in (Gate, Tied):
        with pytest.raises(DCRError, match=f"source 'bad' holds {column} '{value}' only"):
            kind.fit(tiny_llama, tiny_tokenizer, {"pairs": rows}, rows, SteeringConfig())


@pytest.mark.parametrize("harmless", ["question", "statement"])
def test_a_source_whose_classes_differ_in_form_is_refused(harmless):
    """Both classes and two forms, and yet the form gives the class away."""
    rows = pairs()
    asked = rows["form"] == "question"
    rows = rows[asked == (rows["label"] == "seemingly_toxic")].replace({"question": harmless})
    with pytest.raises(DCRError, match=f"form '{harmless}' only in its seemingly_toxic prompts"):
        check_sources(rows)
    check_sources(pairs())


def test_nominal_threshold_weighs_sets_and_forms_equally():
    """A large set of questions at low scores must not outvote a small one."""
    rows = pd.DataFrame(
        [("big", "toxic", "question", 0.1 * i) for i in range(8)]
        + [("big", "toxic", "imperative", 9.0)]
        + [("small", "toxic", "question", 8.0), ("small", "toxic", "imperative", 7.0)]
        + [("big", "toxic", "statement", 99.0), ("ok", "seemingly_toxic", "question", 7.5)],
        columns=["benchmark", "label", "form", "score"],
    )
    weights = cells(rows)
    assert weights[rows["label"] == "toxic"].sum() == pytest.approx(1.0)
    assert weights[8:11].tolist() == [0.25] * 3 and weights[11] == 0.0
    facts = nominal(rows, rows["score"].to_numpy(), SteeringConfig(target=0.75))
    assert facts["threshold"] == 7.0 and facts["validation_refused"] == 1.0
    assert balanced_auroc(rows, rows["score"].to_numpy()) == pytest.approx((0.5 + 0.5) / 2)
    with pytest.raises(DCRError, match="no toxic validation prompts"):
        nominal(rows[11:], rows["score"].to_numpy()[11:], SteeringConfig())


# ---- decision token -----------------------------------------------------------------------------


def test_decision_token_score_threshold_and_answer(planted, tiny_tokenizer):
    model, _ = planted
    texts = ["steal the trip .", "bake the trip .", "list the dog ."]
    refuse, comply = (tiny_tokenizer.convert_tokens_to_ids(w) for w in ("sorry", "sure"))
    rows = encode_prompts(tiny_tokenizer, texts)
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([r])).logits[0, -1] for r in rows])
    score = DecisionToken({}, {}).score(model, tiny_tokenizer, texts)
    np.testing.assert_allclose(score, logits[:, refuse] - logits[:, comply], atol=1e-4)
    threshold = float(np.sort(score)[1])
    token = DecisionToken({"threshold": threshold, "words": ["sorry", "sure"]}, {})
    table = pd.DataFrame({"id": list("abc"), "text": texts})
    answers = generate(model, tiny_tokenizer, table, max_new_tokens=LIMIT, steering=token)
    refused = score >= threshold
    assert refused.sum() == 2
    for answer, row, no in zip(answers["response"], rows, refused, strict=True):
        ids = [*row, refuse if no else comply]
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False)
        said = tiny_tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert answer == said.strip()
    assert not token.at(0.0).refuses(model, tiny_tokenizer, texts).any()


def test_the_sum_of_two_scores_takes_the_better_one_and_keeps_both_where_both_know():
    rng, rows = np.random.default_rng(0), pairs(things="cat dog house bike bread file story plan")
    y = (rows["label"] == "toxic").to_numpy()
    noise = rng.normal(size=(len(rows), 2))
    scores = pd.DataFrame({"a": 5 + 100 * (noise[:, 0] + 0.7 * y), "b": noise[:, 1] + 0.7 * y})
    facts = fit_combination(rows, scores)
    both = combined(scores, facts)
    assert 0.3 <= facts["weight"] <= 0.7  # alike, however different their scales
    assert balanced_auroc(rows, both.to_numpy()) > max(
        balanced_auroc(rows, scores[c].to_numpy()) for c in "ab"
    )
    useless = fit_combination(rows, scores.assign(a=noise[:, 0]))
    assert useless["weight"] >= 0.7
    np.testing.assert_allclose(both[:3], combined(scores[:3], facts))  # company does not matter


def test_token_and_gate_are_fitted_together(planted, tiny_tokenizer):
    model, _ = planted
    held = pairs("held", "story plan trip")
    both = TokenGate.fit(model, tiny_tokenizer, {"pairs": pairs()}, held, SteeringConfig(target=1))
    texts = held["text"].tolist()
    parts = both.parts(model, tiny_tokenizer, texts)
    assert list(parts) == ["token", "gate"]
    again = TokenGate.load(json.loads(json.dumps(both.facts)), both.tensors)
    score = again.score(model, tiny_tokenizer, texts)
    np.testing.assert_allclose(score, combined(parts, both.facts))
    assert balanced_auroc(held, score) == both.facts["validation_auroc"] == 1.0
    refused = both.refuses(model, tiny_tokenizer, texts)
    assert (refused == (held["label"] == "toxic")).all()


# ---- tied ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_edit_writes_along_one_direction_what_was_written_along_the_other(
    family, strength, tiny_tokenizer
):
    model, rows = make_model(family), pairs()
    toxic = (rows["label"] == "toxic").to_numpy().astype(int)
    asked = (rows["form"] == "question").to_numpy().astype(int)
    states = residuals(model, encode_prompts(tiny_tokenizer, rows["text"].tolist()), [(-1, None)])
    states, module = states[1:, :, 0], down_projection(decoder_layers(model)[2])
    inputs = torch.randn(7, module.weight.shape[0 if family == "gpt2" else 1])
    with torch.no_grad():
        before = module(inputs)
        with replaced(model, tied(model, states, (asked, 1 - toxic), [2], strength)):
            after = module(inputs)
        assert torch.equal(module(inputs), before)
    moved = torch.nn.functional.normalize(after - before, dim=-1)
    direction = moved[0]  # v_a, up to its sign
    assert (moved @ direction).abs().min() > 0.999
    from dcr.analysis.probes import fit_probe

    probes = [fit_probe(states[2].numpy(), y).weight for y in (asked, 1 - toxic)]
    a, b = (torch.tensor(p / np.linalg.norm(p), dtype=torch.float32) for p in probes)
    ratio = (states[2] @ a).std() / (states[2] @ b).std()
    expected = (1 - strength) * (before @ a) + strength * ratio * (before @ b)
    torch.testing.assert_close(after @ a, expected, rtol=1e-3, atol=1e-5)


def test_a_block_of_experts_has_no_down_projection_to_edit():
    import transformers as tf

    sizes = dict(vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=16, moe_intermediate_size=16, num_key_value_heads=2)
    for config in (tf.MixtralConfig, tf.Qwen2MoeConfig):
        model = tf.AutoModelForCausalLM.from_config(config(**sizes))
        with pytest.raises(DCRError, match="no single down-projection|no attention or MLP"):
            down_projection(decoder_layers(model)[0])


def test_tied_improves_on_validation_or_changes_nothing(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(refusal, "REFUSAL_OPENINGS", ("sorry ,", "can't"))
    model, held = make_model(seed=6), pairs("held", "story plan trip")
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    options = SteeringConfig(tied_iterations=2)
    edit = Tied.fit(model, tiny_tokenizer, {"pairs": pairs()}, held, options)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    reached = [i["validation_auroc"] for i in edit.facts["iterations"]]
    assert reached == sorted(reached) and len(reached) <= 3
    assert set(edit.tensors) <= {f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)}
    assert bool(edit.tensors) == (len(reached) > 1)
    texts = held["text"].tolist()
    with replaced(model, edit.tensors):
        score = edit.score(model, tiny_tokenizer, texts)
    assert balanced_auroc(held, score) == pytest.approx(reached[-1], abs=1e-3)


def test_fits_survive_being_kept(tmp_path):
    token = DecisionToken({"threshold": 0.5}, {})
    save_file(token.tensors, tmp_path / "t.safetensors")
    assert DecisionToken.load({"threshold": 0.5}, load_file(tmp_path / "t.safetensors")) == token
