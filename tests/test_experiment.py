"""A run on a tiny local model: every stage, each once; keys that hold everything; tables and
figures by name."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model

import dcr.steering
from dcr.config import ModelConfig
from dcr.data.files import sha256_of
from dcr.data.sets import table_hash
from dcr.errors import DCRError
from dcr.evaluate import judges
from dcr.lm.chat import rendered_example
from dcr.lm.device import DTYPES, pick_device, resolve_precision
from dcr.lm.generate import generate
from dcr.run.models import Base, shared_copy
from dcr.run.store import Artifact, digest
from dcr.run.training import Point
from dcr.study import experiment as study
from dcr.study import registry
from dcr.study.experiment import Experiment
from dcr.study.verify import misfit, verify
from dcr.tables import checks
from dcr.tables.gather import followed_prompts, scored_prompts
from dcr.tables.representations import unseen

SMALL = {
    "refine.layer": 2,
    "refine.max_steps": 2,
    "refine.batch_size": 8,
    "refine.lora_rank": 2,
    "align.max_steps": 3,
    "align.lora_rank": 2,
    "align.batch_size": 8,
    "align.checkpoints": [0, 2],
    "generation.max_new_tokens": 3,
    "model.precision": "fp32",
    "data.limit": 4,
    "data.curve_limit": 12,
}


def make(folder, root, seeds=(1,), **more):
    overrides = {**SMALL, "model.name": str(folder), **more}
    return Experiment("quick", seeds=seeds, run_dir=root, overrides=overrides)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("a run")


@pytest.fixture(scope="module")
def run(folder, root):
    experiment = make(folder, root)
    assert [problem for *_, problem in experiment.complete()] == ["", "", ""]
    return experiment.runs[0]


def names(root, kind):
    return {p.name.rpartition("-")[0] for p in (root / kind).iterdir()}


def test_every_stage_once_and_nothing_a_second_time(run, folder, root):
    assert names(root, "refine") == {"DCR"} and names(root, "align") == {"STL", "DCR"}
    asked = {"base", "STL", "STL@2", "DCR", "DCR@0", "DCR@2"}  # STL before training is base
    assert names(root, "generate") == names(root, "judge") == asked
    again = make(folder, root)
    assert not any(problem for *_, problem in again.complete())
    store = again.runs[0].store
    again.runs[0].complete("DCR")
    assert store.computed == [] and len(store.reused) > 5
    stray = [p for p in root.rglob("*") if p.name.endswith((".lock", ".partial", ".tmp"))]
    assert not stray and not list(root.rglob("checkpoint-*"))


def test_points_of_a_curve(run):
    assert run.points("STL") == [Point(0), Point(2), Point(3)]
    full = run.generations("STL").set_index("prompt_id")["response"]
    last = run.generations("STL", 3)
    assert set(last["prompt_id"]) == set(run.curve_prompts["id"]) < set(full.index)
    assert (last["response"] == last["prompt_id"].map(full)).all()
    first = run.verdicts("STL", 0)
    assert set(first["method"]) == {"STL"} and set(first["seed"]) == {1}
    assert {"verdict", "response", "finish", "n_tokens"} <= set(first)
    assert run.verdicts("question-mark")["verdict"].isin(["comply", "refuse"]).all()


def test_answered_prompts_are_the_first_requests_of_every_set(folder):
    few = make(folder, folder / "few", **{"data.answered": 2}).runs[0]
    every = few.prompts.groupby("benchmark")["request"].agg(lambda r: sorted(set(r))[:2])
    asked = few.answered.groupby("benchmark")["request"].agg(lambda r: sorted(set(r)))
    assert asked.to_dict() == every.to_dict() and len(few.answered) < len(few.prompts)
    assert set(few.curve_prompts["id"]) <= set(few.answered["id"])


def test_scores_cover_validation_and_test(run):
    wanted = set(run.prompts["id"]) | set(run.validation["id"])
    for method in ("base", "DCR", "question-mark"):
        scores = run.scores(method)
        assert set(scores) == {"prompt_id", "method", "seed", "score"}
        assert set(scores["prompt_id"]) == wanted and np.isfinite(scores["score"]).all()


def test_a_model_shares_what_its_method_does_not_change(run):
    base, _ = run.base()
    before = {n: p.clone() for n, p in base.named_parameters()}
    (stl, _), (dcr, _) = run.model("STL"), run.model("DCR")
    other = dict(base.named_parameters())
    changed = {n for n, p in stl.named_parameters() if not torch.equal(p, other[n])}
    shared = {n for n, p in stl.named_parameters() if p.data_ptr() == other[n].data_ptr()}
    assert changed and all(n.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for n in changed)
    assert changed | shared == set(other) and not stl.training
    assert any(
        not torch.equal(p, dict(dcr.named_parameters())[n]) for n, p in stl.named_parameters()
    )
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert run.base()[0] is base  # loaded once


@pytest.mark.parametrize("rank", [2, 0])
def test_training_leaves_the_base_as_it_is(folder, tmp_path, rank):
    experiment = make(
        folder, tmp_path, **{"refine.lora_rank": rank, "align.lora_rank": rank, "refine.lr": 1e-2}
    )
    one = experiment.runs[0]
    before = {n: p.clone() for n, p in one.base()[0].named_parameters()}
    model, _ = one.model("DCR")
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved and all(torch.equal(p, before[n]) for n, p in one.base()[0].named_parameters())
    at, _ = one.model("DCR", 2)
    assert any(
        not torch.equal(a, b) for a, b in zip(at.parameters(), model.parameters(), strict=True)
    )


def test_shared_copy_ties_what_is_tied():
    model = make_model(tied=True)
    copy = shared_copy(model, {"model.embed_tokens.weight"})
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    whole = shared_copy(model, None)
    mine = {p.data_ptr() for p in whole.parameters()}
    assert not mine & {p.data_ptr() for p in model.parameters()}


def test_keys_hold_what_matters_and_nothing_else(run, folder, tmp_path, root):
    from transformers import AutoTokenizer

    def keys(**more):
        one = make(folder, root, **more).runs[0]
        return one.weights_key("base"), one.weights_key("STL")

    assert keys(**{"data.limit": 3, "evaluation.kernel_tokens": 9}) == keys()
    for change in ({"align.lr": 1e-4}, {"align.n_general": 16}):
        assert keys(**change)[0] == keys()[0] and keys(**change)[1] != keys()[1]
    assert keys(**{"model.precision": "bf16"})[0] != keys()[0]
    resolved = resolve_precision("auto", pick_device("auto"))
    assert keys(**{"model.precision": "auto"}) == keys(**{"model.precision": resolved})
    assert keys(**{"model.chat_template": "alpaca"})[0] != keys()[0]
    other = tmp_path / "model"
    make_model(layers=3).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> ", "<|assistant|>")
    tokenizer.save_pretrained(other)  # the same weights behind another template
    assert make(other, root).runs[0].weights_key("base") != keys()[0]


@pytest.mark.parametrize("tokens", [0, 5])
def test_verdicts_hang_on_the_judges_code_however_long_the_answers(
    run, folder, root, monkeypatch, tokens
):
    one = make(folder, root).runs[0]
    asked = one.prompts.head(2)
    one.judged("base", asked, tokens=tokens)
    for changed, computed in ((False, 0), (True, 1)):
        if changed:
            monkeypatch.setattr(judges, "identity", lambda name: {"judge": name, "code": "another"})
        again = make(folder, root).runs[0]
        again.judged("base", asked, tokens=tokens)
        assert sum(name.startswith("judge") for name in again.store.computed) == computed


def test_overrides_reach_every_prompt_that_is_asked(folder, root):
    for limit in (2, 3):
        one = make(folder, root, **{"data.limit": limit})
        scored = scored_prompts(one)
        assert scored.groupby("benchmark")["request"].nunique().max() == limit
        assert set(scored["id"]) == {*one.prompts["id"], *one.validation["id"]}
        assert set(followed_prompts(one, 2)["id"]) <= set(one.validation["id"])
        held = unseen(one.runs[0], 99)["request"]
        assert held.isin(one.prompts["request"]).all()


def test_seeds_share_what_no_seed_reaches(run, folder, root):
    two = make(folder, root, seeds="1-2")
    other = two.runs[1]
    assert two.seeds == (1, 2) and other.seed == 2
    assert other.prompts.equals(run.prompts) and other.curve_prompts.equals(run.curve_prompts)
    store = other.store
    rows = other.generations("base")
    other.scores("base")
    assert store.computed == [] and set(rows["seed"]) == {2}
    assert other.weights_key("STL") != run.weights_key("STL")


def test_methods_that_every_seed_runs(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "run_all", lambda task, cells, **_: asked.extend(cells) or ())
    some = make(folder, tmp_path, seeds="1-2", every_seed=["base", "DCR"])
    assert [r.seed for m in ("DCR", "STL") for r in some.runs_of(m)] == [1, 2, 1]
    assert list(some.complete()) == []
    assert asked == [(1, "base"), (1, "STL"), (1, "DCR"), (2, "base"), (2, "DCR")]
    with pytest.raises(DCRError, match="DRC"):
        make(folder, tmp_path, every_seed=["DRC"])


def test_what_a_run_cost_is_not_what_else_lies_beside_it(run, folder, root):
    cost = checks.cost(make(folder, root))
    other = make(folder, root, **{"align.max_steps": 2, "align.checkpoints": [0]})
    list(other.complete())  # as a grid's cell or another recipe in the same directory does
    pd.testing.assert_frame_equal(checks.cost(make(folder, root)), cost)
    mine = checks.cost(other).query("kind == 'align'")
    assert len(mine) == 2 and set(cost.query("kind == 'align'")["method"]) == {"STL", "DCR"}
    assert len(make(folder, root).artifacts()) > len(cost)


class Shift:
    """A steering method of the tests: its fit is the mean of a weight, its score the prompt's
    length."""

    ANCHORS = ("harmful", "harmless")
    made: list = []

    def __init__(self, mean, strength=1.0):
        self.facts, self.tensors = {"mean": mean}, {"mean": torch.tensor([mean])}
        self.settings = {"mean": mean, "strength": strength}

    @classmethod
    def fit(cls, model, tokenizer, anchors, validation, options, *, seed, layers_path):
        cls.made.append(set(anchors))
        return cls(float(model.model.layers[0].self_attn.q_proj.weight.detach().mean()))

    @classmethod
    def load(cls, facts, tensors, *, layers_path):
        return cls(facts["mean"])

    def at(self, strength):
        return type(self)(self.facts["mean"], strength)

    def score(self, model, tokenizer, prompts):
        return [float(len(p)) for p in prompts]


class Edit(Shift):
    """An edit of weights: the first block's query weights become zero."""

    @classmethod
    def fit(cls, model, *_args, **_kwargs):
        made = cls(0.0)
        name = "model.layers.0.self_attn.q_proj.weight"
        made.tensors = {name: torch.zeros_like(model.get_parameter(name))}
        return made


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(dcr.steering, "KINDS", {"scans": Shift, "tied": Edit}, raising=False)
    Shift.made.clear()


def test_a_steering_method_is_fitted_once_and_its_strength_is_a_field(run, kinds):
    from safetensors.torch import load_file

    artifact = run.fitted("SCANS")
    assert Shift.made[0] == {"harmful", "harmless"}
    assert run.fitted("SCANS").path == artifact.path and len(Shift.made) == 1
    assert load_file(artifact.path / "tensors.safetensors")["mean"].shape == (1,)
    assert artifact.manifest["fit"]["mean"] == run.steering("SCANS").settings["mean"]
    assert [p.strength for p in run.points("SCANS")] == [0.0, 0.5, 1.0, 2.0]
    assert run.weights_key("SCANS") == run.weights_key("STL")
    assert run.steering("SCANS", 0.5).settings["strength"] == 0.5
    off = run.generations("SCANS", strength=0.0)  # strength 0 is the model that is steered
    same = run.generations("STL", 3)
    assert off["response"].tolist() == same["response"].tolist() and set(off["method"]) == {"SCANS"}
    scores = run.scores("SCANS").set_index("prompt_id")["score"]
    assert scores[run.prompts["id"].iloc[0]] == len(run.prompts["text"].iloc[0])
    with pytest.raises(DCRError, match="STL fits nothing.*SCANS"):
        run.fitted("STL")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_fit_reads_the_model_in_the_precision_in_which_it_acts(
    folder, tmp_path, kinds, monkeypatch, precision
):
    fit, seen = Shift.fit.__func__, []
    monkeypatch.setattr(
        Shift, "fit", classmethod(lambda c, m, *a, **o: seen.append(m.dtype) or fit(c, m, *a, **o))
    )
    make(folder, tmp_path, **{"model.precision": precision}).runs[0].fitted("SCANS")
    assert seen == [DTYPES[precision]]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_guide_is_read_in_the_precision_in_which_it_decides(
    folder, tmp_path, monkeypatch, precision
):
    score, seen = Shift.score, []
    monkeypatch.setattr(dcr.steering, "KINDS", {"gate": Shift, "token": Shift})
    monkeypatch.setattr(
        Shift, "score", lambda s, m, t, p: seen.append((len(p), m.dtype)) or score(s, m, t, p)
    )
    small = {"align.n_safe": 16, "align.n_general": 16, "model.precision": precision}
    run = make(folder, tmp_path, **small).runs[0]
    run.aligned("STL-routed")
    assert seen == [(len(run.sets("STL-routed").mix), DTYPES[precision])]


def test_every_method_is_fitted_on_the_validation_prompts_of_the_run(folder, tmp_path, monkeypatch):
    asked = []

    def get(self, kind, name, key, build):
        asked.append(key.get("validation"))
        raise KeyError

    monkeypatch.setattr("dcr.run.store.Store.get", get)
    run = make(folder, tmp_path, **{"data.bundled_forms": "published"}).runs[0]
    monkeypatch.setattr(run, "weights_key", lambda *_: {})
    for method in ("SCANS", "STL-token", "DCR-token", "Gate"):
        with pytest.raises(KeyError):
            run.fitted(method)
    assert asked == [table_hash(run.validation, "benchmark")] * 4


def test_an_edit_of_weights_is_an_ordinary_model(run, kinds):
    model, _ = run.model("Tied")
    assert not model.model.layers[0].self_attn.q_proj.weight.any()
    assert run.model("STL")[0].model.layers[0].self_attn.q_proj.weight.any()
    assert run.steering("Tied") is None and run.weights_key("Tied") != run.weights_key("STL")


def test_a_manifest_needs_no_weights(run, folder, root, monkeypatch):
    """A run that a server answers, or whose artifacts are all there, loads no model to say so."""
    monkeypatch.setattr("dcr.lm.load.load", None)
    before = run.base()
    monkeypatch.setattr("dcr.run.models._loaded", None)
    content = make(folder, root).manifest()
    assert content["rendering"] == rendered_example(before[1])


def test_the_manifest_says_what_it_was(run, folder, root):
    manifest = run.aligned("DCR").manifest
    for key in (
        "config",
        "seed",
        "model",
        "rendering",
        "seconds",
        "peak_memory_mib",
        "environment",
    ):
        assert manifest[key] or key == "seed"
    assert manifest["model"]["precision"] == "fp32" and manifest["model"]["device"]
    assert {"tokenizer.json", "model.safetensors"} <= set(manifest["model"])
    assert manifest["config"]["refine"]["pairing"] == "sources" and manifest["seed"] == 1
    whole = make(folder, root).manifest()
    assert json.loads((root / "manifest.json").read_text()) == json.loads(json.dumps(whole))
    assert whole["data"]["test"]["rows"] == len(run.prompts) and "dropped" in whole
    assert {a["kind"] for a in whole["artifacts"]} >= {"refine", "align", "generate", "judge"}
    assert str(root) not in (root / "manifest.json").read_text()


@pytest.fixture
def dummy(monkeypatch):
    registry.load_all()
    monkeypatch.setattr(registry, "TABLES", dict(registry.TABLES))
    monkeypatch.setattr(registry, "FIGURES", dict(registry.FIGURES))

    @registry.table("dummy")
    def dummy(experiment):
        rows = experiment.runs[0].scores("base").rename(columns={"score": "value"})
        return rows.assign(text="NA", missing=float("nan"))[
            ["prompt_id", "value", "text", "missing"]
        ]

    @registry.figure("dummy", caption="Nothing.")
    def draw(frame):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.gca().plot(frame["value"])
        return figure


def test_tables_are_computed_written_read_and_verified(run, folder, root, dummy, tmp_path):
    import shutil

    live = make(folder, root)
    live.manifest()
    table = live.table("dummy")
    assert (root / "tables" / "dummy.csv").is_file() and live.live
    assert set(table["text"]) == {"NA"} and table["missing"].isna().all()
    assert live.figure("dummy").axes[0].lines[0].get_ydata().tolist() == table["value"].tolist()
    rows = verify(root)
    assert set(rows["status"]) == {"ok"} and "tables/dummy.csv" in set(rows["what"])
    only = tmp_path / "tables only"
    shutil.copytree(root / "tables", only / "tables")
    shutil.copy(root / "manifest.json", only)
    read = Experiment("quick", run_dir=only)
    pd.testing.assert_frame_equal(read.table("dummy"), table)
    assert not read.live and read.runs == () and read.seeds == (1,) and read.figure("dummy").axes
    assert read.config.refine.layer == 2 and read.methods == ("base", "STL", "DCR")
    (only / "tables" / "dummy.csv").unlink()
    with pytest.raises(DCRError, match=r"dummy.csv is missing.*dcr table dummy --profile quick"):
        Experiment("quick", run_dir=only).table("dummy")
    with pytest.raises(DCRError, match="holds tables only"):
        _ = read.prompts
    with pytest.raises(DCRError, match="unknown; did you mean: dummy"):
        live.table("dumy")


def test_verify_sees_a_changed_table_a_flipped_bit_and_what_is_missing(
    run, folder, root, dummy, tmp_path
):
    import shutil

    make(folder, root).table("dummy")
    make(folder, root).manifest()
    copy = tmp_path / "copied"
    shutil.copytree(root, copy)
    table = copy / "tables" / "dummy.csv"
    table.write_text(table.read_text().replace("NA", "NB", 1))

    @registry.table("a_first")  # made before the other one, from it
    def first(experiment):
        return experiment.table("dummy")[["prompt_id"]]

    (copy / "tables" / "a_first.csv").write_text("prompt_id\n")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    found = verify(copy).set_index("what")["status"]
    assert "differs" in found["tables/dummy.csv"]
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    scores = next((copy / "score").glob("base-*")) / "values.npy"
    scores.write_bytes(scores.read_bytes()[:-1] + b"x")
    found = verify(copy).set_index("what")["status"]
    assert "values.npy has changed" in found[f"score/{scores.parent.name}"]
    assert "cannot be made again: score/base-" in found["tables/dummy.csv"]
    with pytest.raises(DCRError, match="holds no finished run"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("manifest.json", '"seconds": ', '"seconds_": ', "manifest.json: seconds is null"),
        ("manifest.json", '"weights": [', '"weights": ["x", ', "manifest.json is that of"),
        ("generations.jsonl", '"finish": "', '"finish": "e', "row 1: finish is"),
        ("generations.jsonl", '"prompt_id"', '"prompt"', "row 1: prompt_id is null"),
    ],
)
def test_verify_sees_what_is_sound_by_its_checksum_and_has_another_form(
    run, root, file, old, new, said, tmp_path
):
    """As a program of another version, or an editor, would have written it: checksums are right."""
    import shutil

    run.verdicts("STL")
    path = tmp_path / "generate" / next((root / "generate").glob("STL-*")).name
    shutil.copytree(root / "generate" / path.name, path)
    artifact = Artifact(path)
    assert misfit(artifact) == "" == artifact.broken()
    text = (path / file).read_text()
    assert old in text
    (path / file).write_text(text.replace(old, new, 1))
    manifest = artifact.manifest
    manifest["outputs"] = {n: sha256_of(path / n) for n in manifest["outputs"]}
    manifest.pop("checksum")
    manifest["checksum"] = digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert artifact.broken() == "" and said in misfit(artifact)


@pytest.mark.parametrize("path", ["", "model.layers"])
def test_the_depth_is_known_without_weights(folder, path, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr("dcr.run.models._loaded", None)
    assert Base(ModelConfig(name=str(folder), layers_path=path)).depth == 3


def test_committed_tables_are_of_all_their_seeds():
    assert Experiment("reference", seeds="0-4").seeds == (0, 1, 2, 3, 4)
    with pytest.raises(DCRError, match=r"tables of seeds \[0, 1, 2, 3, 4\] together"):
        Experiment("reference", seeds=3)


def test_reference_without_its_tables_says_so(tmp_path):
    with pytest.raises(DCRError, match="figures/reference"):
        Experiment("reference", run_dir=tmp_path)


def test_bad_asks_are_one_sentence(run, folder, root, monkeypatch):
    for change, message in (
        ({"methods": ("DRC",)}, "method 'DRC' is unknown; known: base.*Did you mean 'DCR'"),
        ({"seeds": "0-x"}, "seeds='0-x'"),
        ({"profile": "quikc"}, "Did you mean 'quick'"),
    ):
        with pytest.raises(DCRError, match=message):
            Experiment(**{"profile": "quick", "run_dir": root, **change})
    with pytest.raises(DCRError, match="generation.endpoint: STL.*generation.served"):
        make(folder, root, **{"generation.endpoint": "http://localhost:1"}).runs[0].generations(
            "STL"
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DCRError, match="not under accelerate launch.*--engine ray"):
        Experiment("quick", run_dir=root)


def test_states_kernel_and_probability_of_any_prompts(run):
    few = run.validation.head(3)
    states = run.states("DCR", few, 0)
    assert states.shape[:2] == (run.depth + 1, 3) and run.layer("DCR") == 2
    assert run.layer("STL") == 2
    norms = run.kernel("base", few)
    assert norms.shape == (3, 3) and (np.diag(norms) > 0).all()
    chances = run.refusal_probability("STL", few)
    assert ((0 <= chances) & (chances <= 1)).all()
    assert (run.refusal_probability("STL", few, 0) == run.refusal_probability("base", few)).all()
    items = run.ability("base")
    assert set(items["metric"]) == {"perplexity"} and items["loss"].gt(0).all()
    longer = run.judged("STL", few, tokens=5)
    assert longer["n_tokens"].max() > 3 and set(longer["prompt_id"]) == set(few["id"])


def test_every_option_of_generation_reaches_the_decoder(folder, root, monkeypatch):
    asked = {"max_new_tokens": 2, "batch_size": 3, "temperature": 0.5, "max_tokens_per_batch": 64}
    seen = {}

    def noted(*args, **options):
        seen.update(options)
        return generate(*args, **options)

    monkeypatch.setattr("dcr.lm.generate.generate", noted)
    run = make(folder, root, **{f"generation.{k}": v for k, v in asked.items()}).runs[0]
    known = set(type(run.config.generation).model_fields) - {"endpoint", "served"}
    assert known == asked.keys(), "a new option belongs into this test"
    run.answers("base", run.validation.head(5))
    assert {k: seen[k] for k in asked} == asked and seen["precision"] == "fp32"


def test_answer_losses_are_those_of_the_base_model(run, monkeypatch):
    few = run.validation.head(2)
    said = pd.DataFrame({"prompt_id": few["id"], "response": ["sure , the cat .", ""]})
    monkeypatch.setattr(run, "generations", lambda method: said)
    losses = run.answer_losses("STL", few)
    assert losses["item"].tolist() == [few["id"].iloc[0]] and (losses["tokens"] > 3).all()
    assert next((run.store.root / "losses").iterdir()).name.startswith("base-")


@pytest.mark.parametrize(
    "method",
    ["SCANS", "Surgical", "Gate", "STL-token", "Token+Gate", "Token+Gate-base", "Tied"]
    + ["STL-routed"],
)
def test_every_method_of_the_kit_is_fitted_scored_answered_and_exported(
    method, folder, root, tmp_path
):
    from dcr.run.own import export

    small = {"steering.anchors": 8, "steering.surgical_candidates": 2, "align.n_safe": 16}
    more = {"align.n_general": 16, "data.limit": 3, "steering.tied_iterations": 1}
    experiment = make(folder, root, **small, **more)
    one = experiment.runs[0]
    scores = one.scores(method)
    assert np.isfinite(scores["score"]).all() and len(scores) > 20
    assert len(one.verdicts(method)) == len(one.prompts)
    if one.entry(method).get("steering") and method != "Tied":
        assert one.fitted(method).manifest["fit"]
    assert one.in_distribution(method)
    out = export(experiment, method, tmp_path / "out")
    assert {"model.safetensors", "README.md"} <= {p.name for p in out.iterdir()}
    assert (out / "use.py").is_file() == (method != "Tied")


def test_a_fit_is_made_anew_when_a_set_or_a_source_has_another_name(folder, root, monkeypatch):
    """Sets are weighted equally in a threshold, and sources checked in a gate."""
    from dcr.data import sets
    from dcr.run import recipes, training

    run = make(folder, root).runs[0]
    made = {run.fitted("Gate").path}

    def elsewhere(config, of=()):
        rows = sets.validation_prompts(config, of=of)
        half = rows["benchmark"].where(rows.index % 3 > 0, rows["benchmark"] + " (2)")
        return rows.assign(benchmark=half)

    def renamed(*args, **options):
        return sets.anchors(*args, **options).assign(source="mine")

    for module, name, other in (
        (training, "validation_prompts", elsewhere),
        (recipes, "anchors", renamed),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, other)
            made.add(run.fitted("Gate").path)
    assert len(made) == 3


def test_a_long_fit_goes_on_after_a_kill(folder, root, monkeypatch):
    from dcr.lm import device

    small = {"data.limit": 3, "steering.tied_iterations": 1}
    write, written = device.write_atomic, []

    def noted(path, content):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    run = make(folder, root, **small).runs[0]
    run.aligned("STL")  # so that the fit alone is killed
    monkeypatch.setattr(device, "write_atomic", noted)
    with pytest.raises(KeyboardInterrupt):
        run.fitted("Tied")
    before, written[:] = set(written), ["", *["x"] * 9]
    path = run.fitted("Tied").path
    assert not before & set(written) and len(written) > 15
    assert not (path / "batches").exists()


def test_what_a_method_was_taught_on_holds_its_guides_sources_and_trains_nothing(
    folder, tmp_path, monkeypatch
):
    from dcr.run.own import data_facts

    run = make(folder, tmp_path).runs[0]
    facts = pd.DataFrame(data_facts(run, "STL-routed"))
    assert "anchors, pairs" in set(facts["role"]) and set(facts["licence"]) == {"CC-BY-4.0"}
    sets = run.sets("STL-routed").mix
    assert facts[facts["role"].str.startswith("stage 2")]["rows"].sum() == len(sets)
    monkeypatch.setattr(run, "trained_on", lambda m: {"": {"": pd.DataFrame({"source": [m]})}})
    assert run.in_distribution("STL-routed") == {"STL-routed", "Gate", "base"}
    assert run.in_distribution("Token+Gate-base") == {"Token+Gate-base", "STL-pairs-token", "base"}
    assert not list(tmp_path.glob("*/*"))


def test_what_aligns_nothing_needs_no_rows_for_alignment(folder, tmp_path):
    run = make(folder, tmp_path, **{"align.n_safe": 10**6}).runs[0]
    with pytest.raises(DCRError, match="only .* prompts of .* are for alignment"):
        run.trained_on("STL")
    assert run.trained_on("base") == {} and run.in_distribution("question-mark") == set()
    assert run.in_distribution("Gate") == {"dcr-pairs"}


def test_what_a_method_lets_through_another_model_answers(
    folder, root, tmp_path, monkeypatch, capsys
):
    """It decides as the method with its own answers does, point by point, and answers as base."""
    from dcr.data.sets import PLAIN_REFUSAL
    from dcr.run.own import export

    small = {"align.n_safe": 16, "align.n_general": 16, "data.limit": 3}
    experiment = make(folder, root, **small)
    one, routed, own = experiment.runs[0], "Token+Gate-base", "Token+Gate"
    assert one.scores(routed)["score"].tolist() == one.scores(own)["score"].tolist()
    base = one.generations("base").set_index("prompt_id")["response"]
    decisions = []
    for point in one.points(routed):
        said = one.generations(routed, *point).set_index("prompt_id")["response"]
        own_said = one.generations(own, *point)
        prompts = one.answered if point.strength == 1 else one.curve_prompts
        steering = one.steering(own, point.strength)
        texts = prompts["text"].tolist()
        refused = (
            steering.refuses(*one.model(own), texts) if point.strength else [False] * len(texts)
        )
        wanted = np.where(refused, PLAIN_REFUSAL, base[prompts["id"]])
        assert said[prompts["id"]].tolist() == wanted.tolist() and len(own_said) == len(said)
        decisions.append(np.mean(refused))
    assert decisions == sorted(decisions) and 0 == decisions[0] < decisions[-1]
    assert one.in_distribution(routed) == one.in_distribution(own)
    assert one.weights_key(routed) == one.weights_key(own)
    assert one.fitted(routed).path == one.fitted(own).path
    made = [p.name for kind in ("fit", "score") for p in (one.store.root / kind).iterdir()]
    assert made and not [name for name in made if name.startswith(routed)]
    out = export(experiment, routed, tmp_path / "out")
    texts = one.answered["text"].tolist()
    refused = one.steering(own).refuses(*one.model(own), texts)
    assert 0 < refused.sum() < len(texts)
    for which in (refused.argmax(), refused.argmin()):
        monkeypatch.setattr(sys, "argv", ["use.py", texts[which]])
        capsys.readouterr()
        runpy.run_path(str(out / "use.py"))
        said = capsys.readouterr().out
        assert (PLAIN_REFUSAL in said) == refused[which]
