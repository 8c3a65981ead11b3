from __future__ import annotations

from typing import Any

import pytest
import torch

from clicktrain.algorithm import ClickTrain
from clicktrain.errors import ClickTrainError, ConfigError, InvalidArgument
from clicktrain.training.session import build, build_method, choose_device
from tests.helpers import toy

SHORT: dict[str, dict[str, Any]] = {"clicktrain": toy.OPTIONS, "dense": {}}


def test_equal_seeds_give_equal_starts_to_different_methods() -> None:
    dense, clicktrain = build(toy.config(), 3), build(toy.clicktrain_config(), 3)
    for one, other in zip(dense.model.parameters(), clicktrain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    phase = dense.method.phases[0]
    for (x, y), (u, v) in zip(dense.train_loader(phase), clicktrain.train_loader(phase), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_other_seeds_share_the_validation_split_and_nothing_else() -> None:
    one, other = build(toy.config(), 1), build(toy.config(), 2)
    assert one.validation is not None
    assert other.validation is not None
    assert torch.equal(one.validation.labels, other.validation.labels)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


def test_sizes_of_the_splits() -> None:
    session = build(toy.config(), 0)
    assert [len(split) for split in (session.train, session.validation or (), session.test)] == [24, 6, 12]
    everything = toy.config().model_dump() | {"data": {"name": "toy", "validation": 0.0, "eval_on": "test"}}
    session = build(type(toy.config()).from_dict(everything), 0)
    assert session.validation is None
    assert len(session.train) == toy.TRAIN_IMAGES


def test_options_reach_the_method() -> None:
    method = build_method(toy.clicktrain_config())
    assert isinstance(method, ClickTrain)
    assert (method.stages.select_at, method.stages.prune_at, method.stages.epochs) == (1, 2, 3)


def test_short_names() -> None:
    assert {name: build_method(toy.config(name, options)).name for name, options in SHORT.items()} == {
        "clicktrain": "clicktrain",
        "dense": "dense",
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clicktrian", {}, "method.name = 'clicktrian': expected clicktrain, dense or module:Class"),
        ("no_such_module:Class", {}, "method.name = 'no_such_module:Class': No module named 'no_such_module'"),
        ("tests.helpers.toy:Missing", {}, "has no attribute 'Missing'"),
        ("tests.helpers.toy:ToyNet", {}, "ToyNet is no clicktrain.Method"),
        (toy.DENSE, {"epoch": 3}, r"unknown key 'epoch' in \[method.options\] of plain: known are none"),
        ("clicktrain", {"taget_compression": 3.0}, "did you mean target_compression?"),
        ("clicktrain", {"target_compression": "six"}, "method.options of clicktrain: "),
        ("clicktrain", {"target_compression": 3.0, "select_at": 2, "prune_at": 1}, "select_at=2, prune_at=1"),
    ],
)
def test_bad_methods(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClickTrainError, match=message):
        build_method(toy.config(name, options))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta:x"])
def test_absent_devices(device: str) -> None:
    with pytest.raises(ConfigError, match=f"train.device = '{device}' is not available here"):
        choose_device(toy.config(device=device).train)


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r'train.amp = "fp16" needs a CUDA device, not cpu'):
        choose_device(toy.config(amp="fp16").train)


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(InvalidArgument, match="seed=-1: expected at least 0"):
        build(toy.config(), -1)


def test_a_batch_larger_than_the_data() -> None:
    session = build(toy.config(batch_size=25), 0)
    with pytest.raises(InvalidArgument, match="batch_size=25: the training split holds only 24 images"):
        session.train_loader(session.method.phases[0])
