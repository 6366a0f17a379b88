"""Profiles, overrides and their errors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr.config import (
    AlignConfig,
    Config,
    RefineConfig,
    load_config,
    methods_file,
    parse_overrides,
    parse_seeds,
    profiles,
)
from dcr.errors import DCRError


def test_every_profile_loads_and_every_method_recipe_applies():
    assert {"quick", "embedded", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3-8b"} <= set(profiles())
    for profile in profiles():
        config = load_config(profile, seed=3)
        assert config.seed == 3 and config.profile == profile
        for name in config.methods:
            assert name in methods_file()
        for recipe in methods_file().values():
            config.override(recipe.get("overrides", {}))


def test_overrides_reach_their_field_and_nothing_else():
    config = load_config(
        "quick", overrides="refine.layer=0.4, align.epochs=2,data.benchmarks=[a,b],refine.lr=1e-5"
    )
    assert (config.refine.layer, config.align.epochs, config.refine.lr) == (0.4, 2.0, 1e-5)
    assert config.data.benchmarks == ("a", "b")
    same = config.override({"refine.layer": load_config("quick").refine.layer})
    assert same.refine == load_config("quick", overrides="refine.lr=1e-5").refine
    assert Config().override("") == Config() == pickle.loads(pickle.dumps(Config()))


@pytest.mark.parametrize(
    "overrides, value",
    [
        ("align.checkpoints=[0,8]", (0, 8)),
        ("align.checkpoints=last", "last"),
        ("refine.layer=12", 12),
        ("refine.layer=auto", "auto"),
        ("refine.lr=2E-5", 2e-5),
        ("generation.served={STL: stl, DCR: dcr}", {"STL": "stl", "DCR": "dcr"}),
        ("refine.balance_forms=yes", True),
        ("model.name='123'", "123"),
    ],
)
def test_values_are_read_as_their_type(overrides, value):
    section, field = overrides.partition("=")[0].split(".")
    got = getattr(getattr(Config().override(overrides), section), field)
    assert got == value and type(got) is type(value)


WRONG = [
    ("refine.loss=foo", "refine.loss='foo': should be 'circle', 'supcon', 'infonce'"),
    ("refine.loss=cirle", "Did you mean 'circle'"),
    ("refine.layer=middle", "refine.layer='middle': should be integer or number or 'auto'"),
    ("refine.layer=0", "refine.layer=0"),
    ("refine.layer=1.5", "less than or equal to 1"),
    ("refine.layer=true", "refine.layer=True"),
    ("refine.batch_size=-3", "refine.batch_size=-3: should be greater than"),
    ("refine.toxic_share=1.2", "less than or equal to 1"),
    ("refine.lr=.inf", "finite"),
    ("refine.lr=.nan", "finite"),
    ("refine.lr=fast", "should be number"),
    ("align.schedule=triangle", "should be 'constant', 'linear' or 'cosine'"),
    ("align.labels=some", "'completion' or 'all'"),
    ("align.checkpoints=often", "'log' or 'last' or list"),
    ("align.checkpoints=[0,-1]", "greater than or equal to 0"),
    ("align.checkpoints=[0,8", "cannot be read as YAML"),
    ("align.above_layer=1", "should be boolean"),
    ("align.batch_size=1.5", "should be integer"),
    ("align.batch_size=true", "should be integer"),
    ("generation.dtype=int8", "generation.dtype: unknown parameter; known here: max_new"),
    ("model.precision=int8", "'auto', 'bf16' or 'fp32'"),
    ("model.name=3", "should be string"),
    ("data.limit=2020-01-01", "should be integer"),
    ("data.benchmarks=oktest", "should be list"),
    ("data.validation=[1]", "should be string"),
    ("seed=-1", "seed=-1"),
    ("refine.layr=1", "unknown parameter.*known here.*layer.*Did you mean 'layer'"),
    ("refin.layer=1", "'refin' is unknown.*Did you mean 'refine'"),
    ("profil=x", "Did you mean 'profile'"),
    ("refine=3", "is a section"),
    ("seed.x=3", "is a value, not a section"),
    ("nonsense", "has no '='"),
    ("align.checkpoints=" + "[" * 3000, "cannot be read as YAML"),
    ("seed=0x" + "f" * 4000, "seed=a number of thousands of digits: should be"),
    ("refine.eval_steps=-0x" + "f" * 4000, "thousands of digits: should be"),
    ("data.limit=[0x" + "f" * 4000 + "]", "thousands of digits: should be"),
    ("seed=5", "profile and seed have parameters of their own"),
    ("profile=zzz", "profile and seed have parameters of their own"),
    ("align.lr=!!python/name:os.system", "cannot be read as YAML"),
    ("model.name=[a, b]", "should be string"),
    ("generation.served=[a]", "should be"),
    ("generation.served={a: 1}", "should be string"),
    ("refine.lr=", "should be number"),
    ("=1", "unknown"),
    ("refine.=1", "is a section"),
    (".lr=1", "unknown"),
    ("refine.lr.x=1", "unknown parameter"),
    ("model=a", "is a section"),
    ("methods=base", "should be list"),
    ("profile=3", "should be string"),
]


@pytest.mark.parametrize("overrides, message", WRONG)
def test_wrong_overrides_are_refused_with_what_is_known(overrides, message):
    with pytest.raises(DCRError, match=message):
        load_config("quick", overrides=overrides)


def test_a_section_made_by_hand_is_checked_too():
    with pytest.raises(DCRError, match="refine.loss='x'"):
        RefineConfig(loss="x")
    with pytest.raises(DCRError, match="align.epochs"):
        AlignConfig().replaced(epochs=0)


def test_of_several_wrong_sections_the_same_is_told_in_every_process():
    code = (
        "from dcr.config import load_config\ntry: load_config('quick', "
        "overrides='align.lr=x,refine.lr=x,data.limit=x,model.name=3')\n"
        "except Exception as error: print(error)"
    )
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONHASHSEED": "1"}
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert told.stdout == "model.name=3: should be string.\n"


def test_overrides_of_another_type_are_refused():
    with pytest.raises(DCRError, match="text or a mapping, not int"):
        load_config("quick", overrides=123)
    with pytest.raises(DCRError, match="refine is a section; set one of its fields"):
        load_config("quick", overrides={"refine": {1: 2}})


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(DCRError, match="known: .*quick.*Did you mean 'quick'"):
        load_config("quikc")


override_texts = st.text(alphabet="refineal.=,[]{}:'\"0189-!&*%@\n\\ \t", max_size=40)


@settings(max_examples=150, deadline=None)
@given(override_texts)
def test_any_text_as_overrides_raises_nothing_but_ours(text):
    for overrides in (text, f"refine.loss={text}", f"align.checkpoints={text}"):
        try:
            parsed = parse_overrides(overrides)
            Config().override(parsed)
        except DCRError:
            pass


@pytest.mark.parametrize("seeds", ["0,5-3", b"0", "9" * 5000, "", [], "0-999999999"])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(DCRError, match="give e.g. 0, 0-4"):
        parse_seeds(seeds)


def test_commas_in_brackets_braces_and_quotes_part_nothing():
    text = "refine={lr: 1, lora_targets: [q, k]},model.name='a,b',data.benchmarks=[a, b],seed=1"
    assert parse_overrides(text) == {
        "refine": {"lr": 1, "lora_targets": ["q", "k"]},
        "model.name": "a,b",
        "data.benchmarks": ["a", "b"],
        "seed": 1,
    }
