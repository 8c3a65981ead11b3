"""Turning dense layers of a model into pattern layers and back, with the optimizer's state carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain import blocked, memory
from clicktrain.assignment import Assignment
from clicktrain.errors import InvalidArgument
from clicktrain.layers import PatternConv2d


def convert(
    model: nn.Module,
    assignments: Mapping[str, Assignment],
    optimizer: Optimizer | None = None,
    backend: str = "auto",
) -> dict[str, PatternConv2d]:
    """Replace the named dense convolutions of a model by pattern ones, in place.

    Afterwards no dense weight, gradient or momentum of these layers is alive, and between layers that compute on
    the CPU, activations stay blocked (`clicktrain.blocked`). On a GPU, see `clicktrain.record`.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    assignments : mapping
        Layer name (as in `named_modules`) -> Assignment.
    optimizer : Optimizer, optional
        Its parameter groups and state are rewritten: kept weights stay in their group, with their momentum.
    backend : str
        See `PatternConv2d`.

    Returns
    -------
    dict
        Layer name -> the new layer.

    Raises
    ------
    InvalidArgument
        If a name is not that of a dense convolution that can be pruned; the model is then unchanged.
    """
    layers = {}
    for name, assignment in assignments.items():
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise InvalidArgument(f"assignments[{name!r}]: that layer is a {type(conv).__name__}, expected a Conv2d")
        layers[name] = PatternConv2d.from_conv2d(conv, assignment, backend=backend)
    for name, layer in layers.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        model.set_submodule(name, layer)
        if optimizer is not None:
            replace_parameter(optimizer, conv.weight, layer.values, assignments[name].gather)
            if conv.bias is not None and layer.bias is not None:
                replace_parameter(optimizer, conv.bias, layer.bias, lambda state: state)
    if all(layer.values.device.type == "cpu" for layer in layers.values()):
        blocked.install(model)
    memory.release()  # the sparse steps to come need other sizes than the dense ones before
    return layers


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every pattern convolution of a model by the dense one with zeros, in place; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PatternConv2d):
            model.set_submodule(name, module.to_conv2d())
    blocked.remove(model)
    return model


def replace_parameter(optimizer: Optimizer, old: Tensor, new: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
    """Put `new` in the place of `old` in an optimizer.

    Parameters
    ----------
    optimizer : Optimizer
        Changed in place; nothing happens if it does not hold `old`.
    old, new : Parameter
        Any shapes.
    transform : callable
        Makes the state of `new` (momentum, moments) from tensors of the shape of `old`; other state is kept.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: transform(entry).clone() if isinstance(entry, Tensor) and entry.shape == old.shape else entry
            for key, entry in state.items()
        }
