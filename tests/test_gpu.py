"""Every device gives the CPU's numbers, and what its memory does not hold is cut up.

Each case also sets the CPU against itself, so that what a machine without a GPU skips is known to
run. Tolerances are relative and for fp32 without TF32: float sums in another order, and AdamW's
division by the root of the squared gradient, which lifts them in trained weights.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from tiny_training import ALIGN, REFINE, aligned, mix, refined, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from dcr.analysis.kernel import entk
from dcr.analysis.refusal import refusal_probability, refusal_score
from dcr.config import load_config
from dcr.errors import DCRError
from dcr.lm import device as memory
from dcr.lm.batches import token_batches
from dcr.lm.device import resolve_precision
from dcr.lm.generate import generate
from dcr.lm.load import load
from dcr.lm.states import hidden_states
from dcr.train.losses import chunk_rows

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
)
PROMPTS = [row["text"] for row in mix(6).to_dict("records")] + ["how do i bake the bread ."]
NEVER = 2**60  # bytes that no device has


def trained(result, before: dict) -> dict[str, np.ndarray]:
    """Losses and gradient norms of the steps, and how far all weights moved."""
    moved = [(p.detach().cpu() - before[n]).flatten() for n, p in result.model.named_parameters()]
    found = {
        key: np.array([float(r[key]) for r in result.history]) for key in ("loss", "grad_norm")
    }
    return found | {"moved": torch.cat(moved).numpy()}


def two_steps_of_refinement(model) -> dict[str, np.ndarray]:
    before = {n: p.cpu() for n, p in weights(model).items()}
    config = REFINE.replaced(max_steps=2, eval_steps=2, target=-0.99)
    result = refined(model, config)
    held_out = np.array([float(row["cross_similarity"]) for row in result.evaluations])
    return trained(result, before) | {"held_out": held_out}


def two_steps_of_alignment(model) -> dict[str, np.ndarray]:
    before = {n: p.cpu() for n, p in weights(model).items()}
    return trained(aligned(model, ALIGN.replaced(max_steps=2, accumulation=2)), before)


def answers(model) -> dict[str, np.ndarray]:
    rows = generate(model, make_tokenizer(), PROMPTS, max_new_tokens=8, precision="fp32")
    sampled = generate(model, make_tokenizer(), PROMPTS, max_new_tokens=8, temperature=1.0)
    said = [*rows["response"], *sampled["response"]]
    return {"words": np.array([[ord(c) for c in text.ljust(200)] for text in said])}


def states(model) -> dict[str, np.ndarray]:
    return {p: hidden_states(model, make_tokenizer(), PROMPTS, pooling=p) for p in ("last", "mean")}


def kernel(model) -> dict[str, np.ndarray]:
    found = entk(model, make_tokenizer(), PROMPTS[:1], PROMPTS[2:4], k=3)
    tokens = np.array(found.tokens)
    return {"tokens": tokens, "cross": found.cross, "own": found.norms.diagonal()[found.n_a :]}


def refusal(model) -> dict[str, np.ndarray]:
    openings = ["sorry", "i cannot", "i can't help"]
    args = model, make_tokenizer(), PROMPTS
    return {
        "odds": refusal_score(*args, openings=openings),
        "probability": refusal_probability(*args, openings=openings),
    }


PARTS = {  # and the largest relative difference (2-norms) from the CPU
    two_steps_of_refinement: 1e-2,
    two_steps_of_alignment: 1e-2,
    answers: 0.0,
    states: 1e-4,
    kernel: 2e-3,
    refusal: 1e-4,
}


def apart(part, model, other) -> float:
    """The largest relative difference of a part's numbers between two models."""
    ours, theirs = part(model), part(other)
    assert ours.keys() == theirs.keys()
    return max(float(np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k])) for k in ours)


@pytest.fixture
def without_tf32():
    """As torch has it before a model is loaded in fp32; as it was, afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_gives_the_cpus_numbers(part, device, without_tf32):
    family = "llama" if part is kernel else "gemma3"
    assert apart(part, make_model(family).to(device), make_model(family)) <= PARTS[part]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_another_model_is_noticed(part):
    """The comparison can fail: every part sees a model whose first block is up to a third off."""
    model = make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.layers[0].parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    assert apart(part, other, model) > PARTS[part]


class WithoutFloat64(TorchFunctionMode):
    """A device like Apple's: 64-bit floats only in what was brought home, or made there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        flat, _ = tree_flatten((args, kwargs or {}))
        tensors = [x for x in flat if torch.is_tensor(x)]
        result = func(*args, **(kwargs or {}))
        home = func is torch.Tensor.cpu or all(getattr(x, "at_home", False) for x in tensors)
        for x in tree_flatten(result)[0]:
            if torch.is_tensor(x):
                x.at_home = home and not (kwargs or {}).get("device")
                assert x.at_home or x.dtype != torch.float64, f"{func} makes 64-bit floats"
        return result


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_device_without_64_bit_floats_is_enough(part):
    model = make_model()
    with WithoutFloat64():
        part(model)
        with pytest.raises(AssertionError, match="64-bit"):
            next(model.parameters()).double()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_is_bf16_from_ampere_on_and_fp32_multiplies_in_tf32(folder, without_tf32):
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_precision("auto", "cuda") == ("bf16" if ampere else "fp32")
    model, _ = load(str(folder), precision="fp32", device="cuda")
    assert model.device.type == "cuda" and torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_device_without_room_gets_half_the_rows_then_one_clear_error(device, caplog):
    def run_with(limit: int) -> list[int]:
        sizes = []

        def run(batch):
            sizes.append(len(batch))
            torch.empty(NEVER if len(batch) > limit else 8, dtype=torch.uint8, device=device)

        list(memory.in_memory([[0, 1, 2, 3], [4, 5]], run))
        return sizes

    assert run_with(2) == [4, 2, 2, 1, 1] and caplog.text.count("half the size") == 1
    with pytest.raises(DCRError, match="memory does not suffice for 2 rows"):
        run_with(1)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("train, config, room", [(refined, REFINE, 60), (aligned, ALIGN, 100)])
def test_training_without_room_goes_on_in_halves(train, config, room, device, caplog, monkeypatch):
    config = config.replaced(batch_size=8, max_steps=2)
    whole = train(make_model().to(device), config).history
    forward = torch.nn.Embedding.forward

    def scarce(self, ids):
        if torch.is_grad_enabled() and ids.numel() > room:
            torch.empty(NEVER, dtype=torch.uint8, device=ids.device)
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", scarce)
    cut = train(make_model().to(device), config).history
    assert caplog.text.count("out of memory; from now on") == 1
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in whole], rel=1e-3)


# ---- large models, by their shapes alone ----

CARD, ROOM = 80 * 2**30, 60 * 2**30  # bytes of a card, and of it that may be used
SCRIPT = importlib.util.spec_from_file_location(
    "gpu_check", Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
)
gpu_check = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(gpu_check)


def kept_bytes(model, rows: int = 8, length: int = 256) -> float:
    """What a forward pass keeps a token for the backward one when every weight trains, in fp32."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / ids.numel()


@pytest.mark.parametrize("name", gpu_check.SHAPES)
def test_the_papers_models_train_in_60_gib_by_their_shapes_alone(name, monkeypatch):
    """Stage 2 as shipped: 128 rows a step, of up to 1,024 tokens, all labelled."""
    config, shape = load_config(name).align, gpu_check.SHAPES[name]
    assert (config.batch_size, config.labels, config.max_length) == (128, "all", 1024)
    assert config.gradient_checkpointing and config.max_tokens_per_batch == 0
    depth, hidden, words = (shape[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    with FakeTensorMode():  # shapes without memory
        model = gpu_check.model_of(shape | {"num_hidden_layers": 2}, "cpu", torch.float32).train()
        both = kept_bytes(model)
    numbers = sum(p.numel() for p in model.parameters())
    numbers += (depth - 2) * sum(p.numel() for p in model.model.layers[0].parameters())
    weights = 2 * numbers  # frozen, in bf16
    model.config.num_hidden_layers = depth
    monkeypatch.setattr(memory, "sizes", lambda _model: (CARD, weights))
    at_once = memory.tokens_that_fit(model, training=True, checkpointing=True)
    plain = memory.tokens_that_fit(model, training=True)
    assert plain * depth * both / 2 <= (CARD - weights) / 3, "the estimate holds for these shapes"
    chunk = 4 * 4 * words * chunk_rows(words)  # logits, their probabilities, and gradients of both
    for length in (config.max_length // 3, config.max_length):  # a middling batch, and the worst
        lengths = [length] * config.batch_size
        tokens = max(length * len(b) for b in token_batches(lengths, 0, at_once))
        blocks = tokens * (4 * depth * hidden + both / 2)  # inputs of all, all of one
        head = chunk + 3 * 4 * tokens * hidden  # output, labelled rows of it, their gradient
        assert weights + blocks + head <= ROOM
        whole = sum(lengths) * words * (2 + 4)  # logits in bf16 and fp32, as the library has them
        assert whole >= 30 * 2**30 > 25 * head


def test_the_script_for_a_gpu_runs_on_tiny_shapes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "kept.json")
    arguments = ["--shape", "tiny", "--device", "cpu", "--parts", "models"]
    rows = gpu_check.main(arguments)
    assert (rows["status"] == "ok").all() and len(rows) == 8
    assert rows["seconds"].gt(0).all() and rows["peak_gib"].gt(0).all()
    share = rows.loc[rows["part"] != "2 x 2 kernel", "share_of_matrix_rate"]
    assert share.between(0, 1, inclusive="neither").all()
    late = gpu_check.main([*arguments, "--minutes", "0"])
    assert (late["status"] == "not run: out of time").all()
    assert not list(tmp_path.iterdir()), "tiny shapes are no result"
