"""Profiles, overrides and their errors."""

from __future__ import annotations

import pytest

from dcr.config import Config, load_config, methods_file, parse_overrides, profiles
from dcr.errors import DCRError


def test_every_profile_loads_and_every_method_recipe_applies():
    assert {"quick", "embedded", "smollm2-135m", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3-8b"} <= set(
        profiles()
    )
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
    assert (
        config.override({"refine.layer": load_config("quick").refine.layer}).refine.loss
        == config.refine.loss
    )
    assert Config().override("").to_dict() == Config().to_dict()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("refine.layr=1", "unknown parameter 'layr'.*known here.*layer.*Did you mean 'layer'"),
        ("refin.layer=1", "unknown parameter 'refin'"),
        ("refine.loss=3", "expected str"),
        ("refine.layer=true", "bool, expected float or int or str"),
        ("align.bf16=1", "int, expected bool"),
        ("align.batch_size=1.5", "float, expected int"),
        ("refine=3", "is a section"),
        ("seed.x=3", "is a value, not a section"),
        ("refine.lr=fast", "str, expected float"),
        ("nonsense", "has no '='"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(DCRError, match=message):
        load_config("quick", overrides=overrides)


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(DCRError, match="known: .*quick.*Did you mean 'quick'"):
        load_config("quikc")


def test_yaml_no_is_a_bool_not_text():
    assert parse_overrides("align.bf16=no") == {"align.bf16": False}
