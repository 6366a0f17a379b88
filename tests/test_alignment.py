"""Stage 2: labels, stop token, logits in chunks, decision, routing, recorded steps, bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer
from tiny_training import ALIGN, REFINE, aligned, mix, refined, weights

from dcr.errors import DCRError
from dcr.lm.batches import common_prefix
from dcr.lm.chat import ALPACA_TEMPLATE, encode_prompts
from dcr.train import align as alignment
from dcr.train.adapters import reopen
from dcr.train.align import AnswerModel, load_step, recorded_steps
from dcr.train.examples import Examples, decision_tokens
from dcr.train.sampling import length_grouped_batches


def labels_of(examples: Examples, row: int) -> list[int]:
    """The labelled tokens of one row, each behind the token that predicts it."""
    batch = examples.collate([row, (row + 1) % 2])
    mine = batch["row"] == 0
    after = batch["ids"][batch["row"][mine], batch["column"][mine] + 1]
    assert torch.equal(after, batch["labels"][mine])
    return batch["labels"][mine].tolist()


def test_labels_of_a_row_are_its_answer_and_one_stop_token(tiny_tokenizer):
    rows = mix(4)
    rows.loc[1, "response"] += "<|end|>"  # it already ends in the stop token: not taught twice
    examples = Examples(rows, tiny_tokenizer, ALIGN)
    for row in (0, 1):
        learnt = labels_of(examples, row)
        text = tiny_tokenizer.decode(learnt).replace(" ", "")
        assert text == mix(4)["response"][row].replace(" ", "") + "<|end|>"
        assert learnt.count(tiny_tokenizer.eos_token_id) == 1


def test_all_token_labels_leave_out_the_first_and_the_padding(tiny_tokenizer):
    examples = Examples(mix(4), tiny_tokenizer, ALIGN.replaced(labels="all"))
    assert labels_of(examples, 0) == examples.ids[0][1:]
    assert labels_of(examples, 1) == examples.ids[1][1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_librarys_in_chunks_with_the_same_gradient(family, monkeypatch):
    """No more logits at once than the chunk, whatever the family does behind its head."""
    model = make_model(family)
    examples = Examples(mix(4), make_tokenizer(), ALIGN)
    batch = examples.collate([0, 1, 2])
    labels = torch.full_like(batch["ids"], -100)
    labels[batch["row"], batch["column"] + 1] = batch["labels"]
    model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=labels).loss.backward()
    expected = {n: p.grad.clone() for n, p in blocks(model)}
    model.zero_grad()
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, out: seen.append(out.numel() // out.shape[-1]))
    monkeypatch.setattr(alignment, "chunk_rows", lambda vocabulary: 4)
    loss, _ = AnswerModel(model)(batch, shared=0)
    (loss / len(batch["labels"])).backward()
    assert max(seen) == 4 and sum(seen) == len(batch["labels"])
    for name, parameter in blocks(model):
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def blocks(model):
    """Parameters of the decoder blocks: all that training ever moves."""
    return [(n, p) for n, p in model.named_parameters() if ".layers." in n or ".h." in n]


def test_soft_caps_and_scaling_are_part_of_the_loss():
    import transformers as tf

    options = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    options |= dict(intermediate_size=64, num_key_value_heads=2, pad_token_id=1, bos_token_id=2)
    torch.manual_seed(0)
    capped = tf.Gemma2Config(**options, head_dim=8, final_logit_softcapping=2.0, eos_token_id=2)
    scaled = tf.GraniteConfig(**options, logits_scaling=8.0, eos_token_id=2)
    batch = Examples(mix(4), make_tokenizer(), ALIGN).collate([0, 1, 2])
    labels = torch.full_like(batch["ids"], -100)
    labels[batch["row"], batch["column"] + 1] = batch["labels"]
    for config in (capped, scaled):
        model = tf.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            ours, _ = AnswerModel(model)(batch, shared=0)
            theirs = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=labels).loss
        torch.testing.assert_close(ours / len(batch["labels"]), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_shared_prefix_leaves_loss_and_gradient_alone(family):
    model = make_model(family).double()
    examples = Examples(mix(8), make_tokenizer(), ALIGN)
    for rows, start in ((examples.ids, 10), (examples.heads, None)):
        rows[:] = [[3] * 10 + r for r in rows] if start else [h + 10 for h in rows]
    examples.starts, examples.lengths = examples.heads, [len(r) for r in examples.ids]
    batch = examples.collate(range(8))
    shared = common_prefix([r[:h] for r, h in zip(examples.ids, examples.heads, strict=True)])
    assert shared >= 10
    found = []
    for prefix in (0, shared):
        model.zero_grad()
        loss, first = AnswerModel(model)(batch, prefix, decide=True)
        (loss + first.pow(2).sum()).backward()
        found.append((loss, first, torch.cat([p.grad.flatten() for _, p in blocks(model)])))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


def test_it_learns_the_answer_and_to_stop(tiny_tokenizer):
    config = ALIGN.replaced(max_steps=70, lr=2e-2, lora_rank=0, lora_targets=())
    model = aligned(config=config).model
    ids = torch.tensor(encode_prompts(tiny_tokenizer, ["how do i kill the cat ?"]))
    out = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert out[-1] == tiny_tokenizer.eos_token_id and len(out) < 15
    assert "sorry" in tiny_tokenizer.decode(out)


def test_the_alpaca_prompt_teaches_the_answer_and_its_stop_token():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALPACA_TEMPLATE
    learnt = labels_of(Examples(mix(2), tokenizer, ALIGN), 1)
    assert tokenizer.decode(learnt).replace(" ", "") == "sorry,icannothelpwiththat.<|end|>"


def test_the_decision_comes_first_and_adds_one_token(tiny_tokenizer):
    decision = decision_tokens(tiny_tokenizer)
    assert decision.words == ("sorry", "sure")
    plain = Examples(mix(4), tiny_tokenizer, ALIGN)
    decided = Examples(mix(4), tiny_tokenizer, ALIGN.replaced(decision="words"))
    for row, token in enumerate([decision.comply, decision.refuse] * 2):
        start = plain.starts[row]
        assert decided.ids[row] == plain.ids[row][:start] + [token] + plain.ids[row][start:]
        assert labels_of(decided, row)[0] == token
    model = aligned(config=ALIGN.replaced(decision="words", max_steps=100, lr=1e-2)).model
    ids = encode_prompts(tiny_tokenizer, ["how do i kill the cat ?", "list the dog in 8 ."])
    said = [model(torch.tensor([r])).logits[0, -1].argmax().item() for r in ids]
    assert said == [decision.refuse, decision.comply]


def odds(model, prompts) -> list[float]:
    decision = decision_tokens(make_tokenizer())
    logits = [
        model(torch.tensor([r])).logits[0, -1] for r in encode_prompts(make_tokenizer(), prompts)
    ]
    return [(x[decision.refuse] - x[decision.comply]).item() for x in logits]


def test_routing_ties_the_decision_to_the_probe_against_the_label():
    """Refusals whose probe says harmless: the label pulls one way, enough weight the other."""
    rows = mix().assign(target=[-2.0, -2.0] * 8)
    rows.loc[::4, "target"] = np.nan  # no target: these rows are taught as ever
    config = ALIGN.replaced(decision="words", max_steps=40, lr=4e-2)
    plain, tied = (
        odds(aligned(config=config.replaced(routing=w), rows=rows).model, [mix()["text"][1]])[0]
        for w in (0.0, 50.0)
    )
    assert plain > 0 and tied < -0.5


def test_a_routed_step_does_not_depend_on_its_micro_batches():
    rows = mix().assign(target=[1.0, np.nan, -1.0, 0.5] * 4)
    config = ALIGN.replaced(decision="words", routing=0.5, batch_size=8, max_steps=3)
    one, cut = (
        aligned(config=config.replaced(max_tokens_per_batch=n), rows=rows).history for n in (0, 40)
    )
    for a, b in zip(one, cut, strict=True):
        for name in ("loss", "routing", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_recording_steps_changes_nothing_and_steps_reload(tmp_path):
    plain = weights(aligned().model)
    recorded = aligned(work_dir=tmp_path, merge=False)
    assert recorded.steps == [0, 1, 2, 4, 6]
    last = {n: p for n, p in weights(recorded.model).items() if "lora" in n}
    recorded.model.save_pretrained(tmp_path / "model")
    again = reopen(make_model(), tmp_path / "model")
    load_step(again, tmp_path, 6)
    assert all(torch.equal(last[n], w) for n, w in weights(again).items() if "lora" in n)
    load_step(again, tmp_path, 0)
    assert any(not torch.equal(last[n], w) for n, w in weights(again).items() if "lora" in n)
    merged = weights(recorded.model.merge_and_unload())
    assert all(torch.equal(plain[n], merged[n]) for n in plain)
    with pytest.raises(DCRError, match=r"step 3 was not recorded; recorded: \[0, 1, 2, 4, 6\]"):
        load_step(again, tmp_path, 3)


def test_without_a_folder_no_step_is_said_to_be_recorded():
    assert aligned(config=ALIGN.replaced(max_steps=1)).steps == []


def test_adapters_only_above_the_layer():
    before = weights(make_model())
    after = weights(aligned(config=ALIGN.replaced(above_layer=True), layer=2).model)
    assert {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])} == {"2", "3"}
    with pytest.raises(DCRError, match="no layer"):
        aligned(config=ALIGN.replaced(above_layer=True))
    for rank in (0, 4):
        with pytest.raises(DCRError, match="no block stands above layer 4"):
            aligned(config=ALIGN.replaced(above_layer=True, lora_rank=rank), layer=4)


def test_a_column_named_target_is_text_where_nothing_is_routed():
    rows = mix().assign(target="Sure, here is the cat")
    assert len(aligned(config=ALIGN.replaced(max_steps=1), rows=rows).history) == 1


def test_stage_two_follows_stage_one():
    model = refined().model
    before = weights(model)
    after = weights(aligned(model).model)
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_an_adapter_does_not_train_on_top_of_another():
    """What `refine(merge=False)` returns: one clear error, whatever the next stage is."""
    config = REFINE.replaced(max_steps=1)
    for train in (aligned, refined):
        with pytest.raises(DCRError, match="holds an adapter that is not merged.*merge_and_unload"):
            train(refined(config=config, merge=False).model)


def test_every_row_is_seen_once_a_pass():
    batches, again, other = (
        length_grouped_batches(list(range(20)), 4, 10, seed=s) for s in (0, 0, 1)
    )
    assert sorted(sum(batches[:5], [])) == sorted(sum(batches[5:], [])) == list(range(20))
    assert batches == again != other


def test_epochs_count_whole_passes_where_rows_do_not_divide():
    config = ALIGN.replaced(max_steps=0, epochs=3, batch_size=6)
    assert len(aligned(config=config, rows=mix(16)).history) == 3 * 3


@pytest.mark.parametrize(
    "rule, steps", [("log", [0, 1, 2, 4, 8, 10]), ("last", [10]), ((0, 5), [0, 5, 10])]
)
def test_recorded_steps(rule, steps):
    assert recorded_steps(rule, 10) == steps


@pytest.mark.parametrize(
    "rows, config, message",
    [
        (mix(0), {}, "mix: no rows"),
        (pd.DataFrame({"text": ["a", "b"], "response": ["x", " "]}), {}, "row 1 .*no response"),
        (mix().assign(response=[None, *["x"] * 15]), {}, "row 0 .*no response"),
        (mix().assign(response=[*["x"] * 3, np.nan, *["x"] * 12]), {}, "row 3 .*no response"),
        (mix(), {"checkpoints": (0, 99)}, r"0\.\.6"),
        (mix(), {"lora_targets": ("c_attn",)}, "match no linear layer.*q_proj"),
        (mix(), {"max_length": 5}, "align.max_length=5 cuts off every answer.*Raise it"),
        (mix().drop(columns="label"), {"decision": "words"}, "rows labelled toxic"),
        (mix(), {"routing": 1.0}, "needs align.decision"),
        (mix(), {"routing": 1.0, "decision": "words"}, 'column "target"'),
        (mix().assign(target="Sure"), {"routing": 1.0, "decision": "words"}, 'column "target"'),
        (mix(), {"lora_targets": ("q_proj", "v_prj")}, "v_prj match no.*known: .*q_proj"),
    ],
)
def test_bad_input_is_one_clear_error(rows, config, message):
    with pytest.raises(DCRError, match=message):
        aligned(config=ALIGN.replaced(**config), rows=rows)


def test_a_tokenizer_without_such_words_is_refused(monkeypatch):
    monkeypatch.setattr("dcr.train.examples.WORDS", (("No", "Yes"),))  # not in its vocabulary
    with pytest.raises(DCRError, match="has none of No/Yes"):
        decision_tokens(make_tokenizer())


def test_answers_over_the_limit_are_cut_or_dropped_and_counted(caplog):
    rows = mix()
    rows.loc[2, "text"] = "list the cat in " + "the house " * 20
    result = aligned(config=ALIGN.replaced(max_length=16, max_steps=8), rows=rows)
    assert 0 < result.truncated < 15 and result.dropped == 1
    assert "were cut" in caplog.text and "1 were dropped" in caplog.text
    assert all(np.isfinite(r["loss"]) for r in result.history)
