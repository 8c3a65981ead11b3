from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from clicktrain import models
from clicktrain.errors import ConfigError
from clicktrain.training.session import build_method
from reproductions import preset
from reproductions.claims import BY_ID
from tests.helpers.studies import PRESET, TWO, write_preset


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
        ('role = "dense"', 'role = "rival"', 'at least one method with role = "dense"'),
        ("baselines:TrainPruneFinetune", "clicktrain", "two methods have the same configuration"),
        ("title =", "title", "not a TOML file"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        preset.load(write_preset(tmp_path / "toy.toml", PRESET.replace(old, new, 1)))
    assert "toy.toml" in str(caught.value)


def test_a_study_of_two_networks_has_two_dense_methods(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml", TWO))
    assert {dense: [row.name for row in rows] for dense, rows in loaded.groups.items()} == {
        "dense": ["dense", "ClickTrain"],
        "PAT": ["PAT"],
    }
    assert [row.name for row in loaded.compared(BY_ID["accuracy-vs-dense"])] == ["dense", "ClickTrain"]
    with pytest.raises(ConfigError, match=r"rivals.dense of 'ClickTrain': expected one of \['dense', 'PAT'\]"):
        preset.load(write_preset(tmp_path / "none.toml", TWO.replace('rivals = { dense = "dense" }', "rivals = {}")))


OFFICIAL = """
title = "Official"
data_label = "CIFAR-10"
seeds = [0]
claims = ["top1-cifar10_vgg13@9.0x"]
base = { data = { root = "data" } }
methods = [
  { name = "dense", role = "dense", config = { preset = "ADDRESS", method = { name = "baselines:Dense" } } },
  { name = "ours", role = "subject", config = { preset = "ADDRESS" } },
]
"""


@pytest.mark.parametrize("address", ["official:cifar10_vgg13", "official:cifar10_vgg13@9.0x"])
def test_a_claim_about_a_released_configuration_takes_its_run_on_its_data(tmp_path: Path, address: str) -> None:
    file = write_preset(tmp_path / "toy.toml", OFFICIAL.replace("ADDRESS", address))
    loaded = preset.load(file)
    assert [row.name for row in loaded.subjects(BY_ID["top1-cifar10_vgg13@9.0x"])] == ["ours"]
    assert loaded.run_config(loaded.methods[1]).train.epochs == 190
    with pytest.raises(ConfigError, match="cannot be checked"):
        preset.load(file, data="fashion-mnist-small")


@pytest.mark.parametrize("address", ["official:cifar10_vgg13@6.2x", "quick"])
def test_runs_of_other_configurations_say_nothing_about_it(tmp_path: Path, address: str) -> None:
    file = write_preset(tmp_path / "toy.toml", OFFICIAL.replace("ADDRESS", address))
    with pytest.raises(ConfigError, match=r"cannot be checked: it needs a run of official:cifar10_vgg13@9.0x"):
        preset.load(file)


def test_claims_about_the_fast_preset_are_about_runs_of_it(tmp_path: Path) -> None:
    loaded = preset.load(preset.find("quick"))
    assert [row.name for row in loaded.subjects(BY_ID["fast-time"])] == ["ClickTrain fast"]
    assert len(loaded.subjects(BY_ID["no-time-overhead"])) == 2


def test_a_shrunk_study_keeps_its_methods_and_is_another_one(tmp_path: Path) -> None:
    file = preset.find("quick")
    whole, shrunk = preset.load(file), preset.load(file, smoke=True)
    assert shrunk.smoke
    assert not whole.smoke
    assert [row.name for row in shrunk.methods] == [row.name for row in whole.methods]
    configs = {spec.config.config_id() for spec in whole.runs()}
    assert not configs & {spec.config.config_id() for spec in shrunk.runs()}
    assert preset.load(write_preset(tmp_path / "again.toml", shrunk.to_toml())) == shrunk


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset 'quik': expected one of .*quick"):
        preset.find("quik")


def test_pruning_during_training_means_prunetrain() -> None:
    for name in preset.names():
        loaded = preset.load(preset.find(name))
        if "accuracy-vs-pdt" in loaded.claims:
            rivals = {row.rivals["pdt"] for row in loaded.subjects(BY_ID["accuracy-vs-pdt"])}
            methods = {row.name: loaded.run_config(row).method.name for row in loaded.methods}
            assert {methods[rival] for rival in rivals} == {"baselines:PruneTrain"}


def test_every_method_of_the_rivals_study_takes_a_step() -> None:
    for spec in preset.load(preset.find("rivals")).runs():
        if spec.seed == 0:
            method = build_method(spec.config)
            model = models.create(spec.config.model.name, 10, width=spec.config.model.width, in_channels=1)
            x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
            method.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), x)
            method.on_epoch(0, [(x, y)])
            method.before_forward()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            method.after_backward()
            method.optimizer.step()
            method.after_step()
            assert all(bool(parameter.isfinite().all()) for parameter in method.model.parameters()), spec.label
