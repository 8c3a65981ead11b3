from pathlib import Path

import pytest

from clicktrain.errors import ConfigError
from reproductions import preset
from tests.helpers.studies import PRESET, write_preset


@pytest.mark.parametrize("name", preset.names())
def test_presets_of_the_suite_are_sound(name: str) -> None:
    loaded = preset.load(preset.find(name))
    assert len(loaded.runs()) == len(loaded.methods) * len(loaded.seeds)


def test_seeds_are_outermost_and_configurations_differ_by_method_only(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    labels = [spec.label for spec in loaded.runs()]
    assert labels[:4] == ["dense/0", "PAT/0", "ClickTrain/0", "dense/1"]
    configs = {spec.method: spec.config for spec in loaded.runs()}
    assert len({(config.data, config.model, config.train) for config in configs.values()}) == 1
    assert len({config.config_id() for config in configs.values()}) == 3


def test_data_can_be_replaced_and_is_kept_in_what_is_written(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"), data="imagefolder:data/mine")
    assert {spec.config.data.name for spec in loaded.runs()} == {"imagefolder:data/mine"}
    assert preset.load(write_preset(tmp_path / "again.toml", loaded.to_toml())) == loaded


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title =", "titel =", "titel: unknown key"),
        ("epochs = 2", "epoch = 2", "unknown key 'epoch' in \\[train\\]"),
        ('role = "subject"', 'role = "hero"', "methods.2.role"),
        ('pat = "PAT"', 'pat = "PTA"', "rival 'PTA' of 'ClickTrain' is no method"),
        ('"accuracy-vs-pat"', '"accuracy-vs-pot"', "unknown claim 'accuracy-vs-pot'"),
        ('"accuracy-vs-pat"', '"accuracy-vs-pdt"', "claim 'accuracy-vs-pdt' cannot be checked: it needs PruneTrain"),
        ('name = "PAT"', 'name = "dense"', "two methods have the same name"),
        ("seeds = [0, 1, 2]", "seeds = []", "seeds"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", "seeds"),
        ('role = "rival"', 'role = "dense"', 'exactly one method with role = "dense"'),
        ("baselines:TrainPruneFinetune", "clicktrain", "two methods have the same configuration"),
        ("title =", "title", "not a TOML file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        preset.load(write_preset(tmp_path / "toy.toml", PRESET.replace(old, new, 1)))
    assert "toy.toml" in str(caught.value)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset 'quik': expected one of .*quick"):
        preset.find("quik")
