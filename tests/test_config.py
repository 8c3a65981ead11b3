from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from clicktrain.config import RunConfig, TrainConfig, merge, parse_assignment, read_toml
from clicktrain.errors import ConfigError

DEFAULT_ID = "f73333d02bf61c783c30ae09941e6875ac14545ee52f8534674accbecbaf8335"

CHOICES: dict[str, Any] = {
    "data.root": "another",
    "data.eval_on": "test",
    "train.amp": "bf16",
    "train.channels_last": "on",
    "train.optimizer": "adam",
    "train.schedule.kind": "constant",
    "train.schedule.milestones": [1],
    "method.options": {"x": 1},
}

EXAMPLE: dict[str, Any] = {
    "data": {"name": "cifar10", "train_limit": 500, "root": "some where"},
    "model": {"name": "resnet32", "width": 0.5},
    "train": {"epochs": 7, "schedule": {"kind": "multistep", "milestones": [2, 5]}, "amp": "bf16"},
    "method": {"name": "baselines:Dense", "options": {"ratios": {"conv.1": 0.5}, "list": [1, 2], "flag": True}},
}


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig.from_dict(EXAMPLE)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    again = RunConfig.from_toml(path)
    assert again == config
    assert again.config_id() == config.config_id()
    assert again.to_toml() == config.to_toml()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert RunConfig.from_toml(tmp_path / "config.toml") == RunConfig()


def test_the_id_is_stable() -> None:
    """A new id means that stored runs no longer count as repetitions: raise SCHEMA_VERSION, or undo the change."""
    assert RunConfig().config_id() == DEFAULT_ID


def test_the_id_covers_defaults_and_ignores_how_a_value_was_given() -> None:
    explicit = RunConfig.from_dict({"train": {"lr": 0.1, "schedule": {"kind": "cosine"}}, "method": {"options": {}}})
    assert explicit.config_id() == RunConfig().config_id()
    assert (
        RunConfig.from_dict({"train": {"lr": 1}}).config_id() == RunConfig.from_dict({"train": {"lr": 1.0}}).config_id()
    )


def leaves(section: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in section:
        found += leaves(value, (*path, name)) if isinstance(value, BaseModel) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", leaves(RunConfig()), ids=".".join)
def test_the_id_changes_with_every_field(path: tuple[str, ...]) -> None:
    reference = RunConfig.from_dict({"train": {"schedule": {"kind": "multistep"}}})
    key = ".".join(path)
    value: Any = reference
    for part in path:
        value = getattr(value, part)
    nested: Any = CHOICES.get(key, another(value))
    for part in reversed(path):
        nested = {part: nested}
    changed = RunConfig.from_dict(merge({"train": {"schedule": {"kind": "multistep"}}}, nested))
    assert changed.config_id() != reference.config_id()
    difference = changed.first_difference(reference)
    assert difference is not None
    assert difference.startswith(key)


def another(value: Any) -> Any:
    """Return another value of a field that is no choice."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 + 0.25
    return "another" if isinstance(value, str) else 7


def test_every_field_is_documented() -> None:
    for section in (RunConfig(), *(value for _, value in RunConfig())):
        for name, field in type(section).model_fields.items():
            assert field.description or isinstance(getattr(section, name), BaseModel), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epoch": 3}}, "unknown key 'epoch' in [train]: did you mean epochs?"),
        ({"train": {"schedule": {"kinds": 1}}}, "unknown key 'kinds' in [train.schedule]: did you mean kind?"),
        ({"data": {"batch_size": 3}}, "unknown key 'batch_size' in [data]: it belongs in [train]"),
        ({"model": {"zzz": 3}}, "unknown key 'zzz' in [model]: known are name, width"),
        ({"trian": {}}, "unknown section [trian]: did you mean train?"),
        ({"zzz": {}}, "unknown section [zzz]: did you mean one of data, model, train, method, preset?"),
        ({"train": {"epochs": 0}}, "train.epochs = 0: input should be greater than 0"),
        ({"train": {"epochs": "3"}}, "train.epochs = '3': input should be a valid integer"),
        ({"train": {"epochs": True}}, "train.epochs = True: input should be a valid integer"),
        ({"train": {"lr": float("nan")}}, "train.lr = nan: input should be a finite number"),
        ({"train": {"amp": "fp8"}}, "train.amp = 'fp8': input should be 'none', 'bf16' or 'fp16'"),
        ({"train": 3}, "train = 3: input should be a valid dictionary"),
        ({"train": {"momentum": 0.0, "nesterov": True}}, "[train] nesterov = true needs a momentum above 0"),
        ({"train": {"schedule": {"milestones": [3]}}}, 'milestones need kind = "multistep", not "cosine"'),
        (
            {"train": {"schedule": {"kind": "multistep", "milestones": [3, 3]}}},
            "[train.schedule] milestones must be positive and increasing, not [3, 3]",
        ),
        ({"data": {"validation": 0.0}}, "data.validation = 0 leaves nothing to choose the best epoch on"),
        ({"data": {"validation": 1.0}}, "data.validation = 1.0: input should be less than 1"),
        ({"method": {"options": {"x": object()}}}, "is not a string, boolean, number, list or table"),
        ({"preset": "quik"}, "preset = 'quik': did you mean quick?"),
        ({"preset": "official:cifar10_vgg14"}, "no official configuration 'cifar10_vgg14'"),
    ],
)
def test_bad_values_are_one_line_that_names_them(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        RunConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[train]\nepoch = 3\n")
    with pytest.raises(ConfigError, match=r"my.toml: unknown key 'epoch'"):
        RunConfig.from_toml(path)
    path.write_text("train epochs")
    with pytest.raises(ConfigError, match=r"my.toml: not a TOML file: .*line 1"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"my.toml: not a TOML file"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"none.toml: cannot read the configuration: No such file"):
        read_toml(tmp_path / "none.toml")


def test_configurations_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", {"train": {"epochs": 3}}),
        ("train.lr = 1e-3", {"train": {"lr": 1e-3}}),
        ("data.name=cifar10", {"data": {"name": "cifar10"}}),
        ('data.name="cifar10"', {"data": {"name": "cifar10"}}),
        ("train.nesterov=true", {"train": {"nesterov": True}}),
        ("train.schedule.milestones=[3, 4]", {"train": {"schedule": {"milestones": [3, 4]}}}),
        ("method.options.pool=a=b", {"method": {"options": {"pool": "a=b"}}}),
    ],
)
def test_assignments(text: str, expected: dict[str, Any]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["train.epochs", "epochs=3", ".epochs=3", "train.=3", "=3", ""])
def test_bad_assignments(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section.key=value"):
        parse_assignment(text)


def test_merging_goes_by_section() -> None:
    base = {"data": {"name": "a", "root": "r"}, "train": {"lr": 1.0}}
    assert merge(base, {"data": {"name": "b"}}) == {"data": {"name": "b", "root": "r"}, "train": {"lr": 1.0}}
    assert base["data"] == {"name": "a", "root": "r"}


def test_options_do_not_outlive_their_method() -> None:
    base = {"method": {"name": "clicktrain", "options": {"target_compression": 6.0}}}
    assert merge(base, {"method": {"name": "dense"}}) == {"method": {"name": "dense"}}
    same = merge(base, {"method": {"name": "clicktrain", "options": {"patterns": 8}}})
    assert same["method"]["options"] == {"target_compression": 6.0, "patterns": 8}


def test_a_preset_gives_start_values() -> None:
    config = RunConfig.from_dict({"preset": "quick", "train": {"epochs": 2}})
    assert (config.data.name, config.model.width, config.train.epochs) == ("fashion-mnist-small", 0.25, 2)
    assert config.method.options == {"target_compression": 6.0}


def test_milestones_survive_as_a_tuple() -> None:
    config = TrainConfig.model_validate({"schedule": {"kind": "multistep", "milestones": [1, 4], "gamma": 0.5}})
    schedule = config.schedule.build()
    assert schedule.milestones == (1, 4)
    assert [schedule.factor(epoch, 6) for epoch in (0, 1, 4)] == [1, 0.5, 0.25]
