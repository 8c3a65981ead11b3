"""The borders of a blocked network: hooks that pack a model's input and make its output plain again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from clicktrain.blocked.kernels import name_of
from clicktrain.blocked.tensor import BlockedTensor, pack, plain


def install(model: nn.Module) -> None:
    """Keep activations blocked inside a model whose pattern convolutions hand them on so.

    The model's parameters, state and pickles stay as they are, but for two hooks. Traced or compiled, in another type,
    with a small batch on the CPU, or where the kernels are not available, it computes as before.
    On a GPU, fusing operators costs the host more than launching them one by one: it pays for large images, and where
    passes are recorded, as by `clicktrain.record`.

    Parameters
    ----------
    model : nn.Module
        Called with a batch (N, C, H, W) as the first argument. Installing twice changes nothing.
    """
    device = _keep_blocked(model, True)
    if device != _installed_on(model):
        _drop_hooks(model)
        if device is not None:
            model.register_forward_pre_hook(partial(_enter, device=device))
            model.register_forward_hook(_leave)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    _keep_blocked(model, False)
    _drop_hooks(model)


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Keep activations blocked on the model's present device inside the block; afterwards all is as it was before."""
    layers = [(layer, layer.blocked_on) for layer in _layers(model)]
    hooks = [(hooks, dict(hooks)) for hooks in (model._forward_pre_hooks, model._forward_hooks)]
    install(model)
    try:
        yield
    finally:
        for layer, device in layers:
            layer.blocked_on = device
        for now, before in hooks:
            now.clear()
            now.update(before)


def _layers(model: nn.Module) -> list[Any]:
    """Return the pattern convolutions."""
    return [layer for layer in model.modules() if hasattr(layer, "blocked_on")]


def _keep_blocked(model: nn.Module, keep: bool) -> str | None:
    """Tell the pattern convolutions; return the type of the device on which any keeps activations blocked."""
    layers = _layers(model)
    for layer in layers:
        name = name_of(layer.values)
        keeps = keep and name is not None and layer.backend in ("auto", name)
        layer.blocked_on = layer.values.device.type if keeps else None
    return next((layer.blocked_on for layer in layers if layer.blocked_on is not None), None)


def _installed_on(model: nn.Module) -> str | None:
    """Return the type of the device for which hooks are installed."""
    hooks = (hook for hook in model._forward_pre_hooks.values() if _function(hook) is _enter)
    return next((hook.keywords["device"] if isinstance(hook, partial) else "cpu" for hook in hooks), None)


def _drop_hooks(model: nn.Module) -> None:
    for hooks, ours in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if _function(hook) is ours]:
            del hooks[key]


def _function(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook.func if isinstance(hook, partial) else hook


def _enter(module: nn.Module, args: tuple[Any, ...], device: str = "cpu") -> tuple[Any, ...]:
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != device:
        return args
    return (pack(args[0]), *args[1:])


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output if torch.compiler.is_compiling() else tree_map_only(BlockedTensor, plain, output)
