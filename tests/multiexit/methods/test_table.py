from __future__ import annotations

import pytest

from gradalign.multiexit import methods
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.methods import Settings, Stage
from gradalign.rules import Sum


def test_the_table():
    assert methods.names() == [
        "joint", "ml", "gaml-soft", "gaml-hard", "single", "fastbert", "deebert", "shallow-deep-frozen", "fastbert-ga",
        "dbt", "shallow-deep", "berxit", "gradient-equilibrium", "pml-direct", "pml-joint", "pml-kd-early",
        "pml-kd-late", "pml-mutual", "bert-6l", "distilbert", "bert-pkd", "layerdrop", "theseus", "head-pruning",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"`method` must be one of .* got 'gaml_soft'; did you mean 'gaml-soft'"):
        methods.get("gaml_soft")


def test_compression_is_for_text_alone():
    compressing = [method.name for method in methods.compression.METHODS]
    assert methods.names("text") == methods.names()
    assert methods.names("images") == [name for name in methods.names() if name not in compressing]


@pytest.mark.parametrize("name", [*methods.names("images"), *methods.rule_names()])
def test_every_name_is_its_methods_and_a_configuration_takes_it(name):
    method = methods.get(name)
    assert method.name == name
    assert method.summary
    assert ImageConfig(method=name).settings == method.defaults


@pytest.mark.parametrize(("judged", "expected"), [("mean", 0.4), ("last", 0.8), ("early", 0.1), ("pair", 0.45)])
def test_what_a_stage_is_judged_by(judged, expected):
    stage = Stage(lambda step: {}, lambda settings: Sum(), judged=judged)
    assert stage.judge([0.3, 0.1, 0.8], Settings(pair_exit=2)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pair_exit": 0}, ValueError, "`pair_exit` must be at least 1, got 0"),
        ({"pair_exit": 1.0}, TypeError, r"`pair_exit` must be an integer, got 1\.0"),
        ({"full_step": 1}, TypeError, "`full_step` must be True or False, got 1"),
        ({"clamp": "no"}, TypeError, "`clamp` must be True or False, got 'no'"),
    ],
)
def test_settings_refuse(changed, error, message):
    with pytest.raises(error, match=message):
        Settings(**changed)
    with pytest.raises(error, match=message):
        ImageConfig(**changed)
