"""Optimizers of a phase, and their state by parameter name.

A method may rewrite an optimizer's parameter groups (hard pruning replaces dense weights by packed values), so
positions in the groups mean nothing after a restart: a checkpoint names every parameter instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from clicktrain.config import TrainConfig
from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase


def build_optimizer(model: nn.Module, train: TrainConfig, phase: Phase) -> Optimizer:
    """Return the optimizer of a phase over all parameters; what the phase leaves open is the run's.

    Raises
    ------
    InvalidArgument
        The phase names an unknown optimizer.
    """
    name = phase.optimizer or train.optimizer
    lr = train.lr if phase.lr is None else phase.lr
    decay = train.weight_decay if phase.weight_decay is None else phase.weight_decay
    if name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=lr, momentum=train.momentum, nesterov=train.nesterov, weight_decay=decay
        )
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, betas=(train.momentum, 0.999), weight_decay=decay)
    raise InvalidArgument(f"optimizer {name!r} of phase {phase.name!r}: expected sgd or adam")


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return groups and state, with parameters called by their names in `model`.

    Raises
    ------
    InvalidArgument
        The optimizer holds a parameter that is not registered on the model, so it could not be found again.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        strangers = sum(parameter not in names for parameter in group["params"])
        if strangers:
            raise InvalidArgument(f"the optimizer holds {strangers} parameters that are not the model's")
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
    return {"groups": groups, "state": {names[parameter]: state for parameter, state in optimizer.state.items()}}


def restore_optimizer(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Put an optimizer into the state that `optimizer_state` described, whatever its groups hold now."""
    parameters = dict(model.named_parameters())
    optimizer.param_groups[:] = [
        {**group, "params": [parameters[name] for name in group["params"]]} for group in saved["groups"]
    ]
    optimizer.state.clear()
    for name, state in saved["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _beside(value, parameter) for key, value in state.items()}


def _beside(value: Any, parameter: Parameter) -> Any:
    """Move a tensor to its parameter's device; step counters (no dimensions) stay on the CPU."""
    return value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
