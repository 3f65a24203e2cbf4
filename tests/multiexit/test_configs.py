from __future__ import annotations

from dataclasses import fields

import pytest

from gradalign.multiexit.configs import ImageConfig, TextConfig, config_of

TEXT = {"task": "SST2", "backbone": "bert-base-uncased"}


@pytest.mark.parametrize("config", [ImageConfig(exits=(1, 2), depth=8), TextConfig(**TEXT, folds=3, fold=2)])
def test_a_configuration_comes_back_from_its_values(config):
    assert config_of(config.to_dict(), "here") == config
    assert config_of(config.to_dict(), "here").to_dict() == config.to_dict()


def test_what_is_left_out_is_the_methods_own():
    assert TextConfig(**TEXT, method="dbt").alpha == 0.5
    assert TextConfig(**TEXT, method="dbt", alpha=0.2).alpha == 0.2
    assert TextConfig(**TEXT).alpha == 0.3
    assert TextConfig(**TEXT, method="ml") == TextConfig(**TEXT, method="ml", alpha=0.3)


def test_a_task_has_one_name():
    assert TextConfig(**TEXT).task == "sst-2"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "sst-3"}, r"`task` must be one of .* got 'sst-3'; did you mean 'sst-2'"),
        ({"exit": "pool"}, r"`exit` must be one of .* got 'pool'; did you mean 'pooler'"),
        ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
        ({"max_train": 0}, "`max_train` must be at least 1, got 0"),
        ({"folds": 0}, "`folds` must be at least 1, got 0"),
        ({"folds": 3, "fold": 3}, r"`fold` must be in 0\.\.2, one of the folds, got 3"),
        ({"fold": 1}, r"`fold` must be in 0\.\.0, one of the folds, got 1"),
        ({"clip": 0.0}, "`clip` must be positive, got 0.0; leave it out to clip nothing"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"warm_up": -1.0}, "`warm_up` must be"),
        ({"granularity": "row"}, "`granularity` must be one of 'global', 'layer', 'tensor', got 'row'"),
        ({"scope": "heads"}, "`scope` must be one of 'all', 'trunk', got 'heads'"),
        ({"precision": "float16"}, "`precision` must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"method": "gaml"}, "`method` must be one of"),
    ],
)
def test_what_makes_no_sense_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**{**TEXT, **changed})


def test_flags_are_true_or_false():
    for name in ("buckets", "pretrained"):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False, got 1"):
            TextConfig(**TEXT, **{name: 1})


def test_a_method_for_text_is_none_for_images():
    with pytest.raises(ValueError, match="`method` must be one for images, got 'bert-6l', which is for text"):
        ImageConfig(method="bert-6l")


def test_a_file_of_other_settings_is_named():
    values = TextConfig(**TEXT).to_dict()
    with pytest.raises(ValueError, match=r"`config` must be of kind images or text, got None in 'here'"):
        config_of({name: value for name, value in values.items() if name != "kind"}, "here")
    with pytest.raises(ValueError, match=r"got 'here' that differs in \['alpha', 'gamma'\]"):
        config_of({**{name: value for name, value in values.items() if name != "alpha"}, "gamma": 1}, "here")


def test_every_setting_is_documented():
    for kind in (ImageConfig, TextConfig):
        said = "".join(base.__doc__ or "" for base in kind.__mro__)
        assert [field.name for field in fields(kind) if f"{field.name}: " not in said] == []


@pytest.mark.parametrize(
    ("method", "exit"),
    [("fastbert", "fastbert"), ("fastbert-ga", "fastbert"), ("deebert", "deebert"), ("ml", "pooler")],
)
def test_exits_are_of_the_methods_own_kind_unless_said(method, exit):
    assert TextConfig(task="rte", backbone="some", method=method).exit == exit
    assert TextConfig(task="rte", backbone="some", method=method, exit="mean").exit == "mean"


def test_another_methods_own_settings_take_the_place_of_what_was_left_open():
    config = TextConfig(task="rte", backbone="some", method="joint", temperature=3.0)
    assert (config.alpha, config.exit) == (0.3, "pooler")
    other = config.with_method("distilbert", seed=4)
    assert (other.method, other.seed, other.alpha, other.temperature) == ("distilbert", 4, 0.5, 3.0)
    assert other.with_method("fastbert", seed=4).exit == "fastbert"
    assert other.with_method("joint", seed=0) == config
