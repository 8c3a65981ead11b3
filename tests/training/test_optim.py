from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from clicktrain.config import TrainConfig
from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase
from clicktrain.training.optim import build_optimizer, optimizer_state, restore_optimizer, set_lr

TRAIN = TrainConfig.model_validate({"lr": 0.5, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01})


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_phase_goes_before_the_run() -> None:
    model = network()
    own = build_optimizer(model, TRAIN, Phase("a", 1))
    assert isinstance(own, torch.optim.SGD)
    assert {key: own.defaults[key] for key in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.5,
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.01,
    }
    other = build_optimizer(model, TRAIN, Phase("b", 1, lr=0.1, weight_decay=0.0, optimizer="adam"))
    assert isinstance(other, torch.optim.Adam)
    assert {key: other.defaults[key] for key in ("lr", "betas", "weight_decay")} == {
        "lr": 0.1,
        "betas": (0.8, 0.999),
        "weight_decay": 0.0,
    }


def test_unknown_optimizer() -> None:
    with pytest.raises(InvalidArgument, match="optimizer 'sdg' of phase 'a': expected sgd or adam"):
        build_optimizer(network(), TRAIN, Phase("a", 1, optimizer="sdg"))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_rewritten_groups_are_restored_by_name(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model, TRAIN, Phase("a", 1, optimizer=name))
    group = optimizer.param_groups[0]
    bias = group["params"].pop()
    group["params"].reverse()
    optimizer.add_param_group({"params": [bias], "lr": 0.125, "weight_decay": 0.0})
    step(model, optimizer)

    twin = network()
    twin.load_state_dict(model.state_dict())
    fresh = build_optimizer(twin, TRAIN, Phase("a", 1, optimizer=name))
    restore_optimizer(fresh, twin, copy.deepcopy(optimizer_state(optimizer, model)))
    assert [len(group["params"]) for group in fresh.param_groups] == [3, 1]
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.125]
    step(model, optimizer)
    step(twin, fresh)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_parameter_outside_of_the_model_cannot_be_saved() -> None:
    model = network()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InvalidArgument, match="holds 1 parameters that are not the model's"):
        optimizer_state(optimizer, model)


def test_the_rate_goes_to_all_groups() -> None:
    model = network()
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()], lr=0.1)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 4
