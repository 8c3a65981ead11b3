"""What a network costs: MACs by layer, three compression ratios, and FLOPs integrated over a training run.

1 MAC is 2 FLOPs. Only convolutions and linear layers count; BatchNorm, activations and pooling are free, as
in the published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clicktrain.errors import InvalidArgument
from clicktrain.layers import PatternConv2d, is_shortcut

FLOPS_PER_MAC = 2

Definition = Literal["paper", "all_convs", "released_counter"]
"""What a compression ratio counts.

``paper``: weights of all convolutions but residual shortcuts, the first one included (what the comments in
the released configurations mean). ``all_convs``: shortcuts too. ``released_counter``: every parameter with
``conv`` or ``feature`` in its name, hence also BatchNorm inside VGG's features.
"""
DEFINITIONS: tuple[Definition, ...] = get_args(Definition)

Densities = Mapping[str, tuple[float, float, float]]
"""Layer name -> share (0..1) of its MACs done in the forward, grad-input and grad-weight pass."""

_UNCOUNTED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCost:
    """Size and work of one layer, for one image.

    Attributes
    ----------
    name : str
        Dotted name in the model.
    kind : {"conv", "linear", "other"}
        ``other`` is any other module with parameters of its own, such as BatchNorm: it has no MACs.
    weights, kept : int
        Elements of the dense weight, and how many of them exist. (``other``: all parameters.)
    bias : int
        Elements of the bias.
    positions : int
        Output pixels, each of which takes every weight once (times the number of calls).
    kernel_size : (int, int)
        (1, 1) where there is no such thing.
    out_shape : tuple of int
        Shape of the output without the batch dimension.
    is_first : bool
        The first convolution that runs: it sees the image, which needs no gradient.
    is_shortcut : bool
        1x1 convolution of a residual shortcut.
    """

    name: str
    kind: Literal["conv", "linear", "other"]
    weights: int
    kept: int
    bias: int
    positions: int
    kernel_size: tuple[int, int]
    out_shape: tuple[int, ...]
    is_first: bool = False
    is_shortcut: bool = False

    @property
    def macs(self) -> int:
        """MACs of the dense layer."""
        return self.weights * self.positions

    @property
    def sparse_macs(self) -> int:
        """MACs of the kept weights."""
        return self.kept * self.positions

    def is_counted(self, definition: Definition) -> bool:
        """Tell whether the layer takes part in a compression ratio."""
        if definition == "released_counter":
            return "conv" in self.name or "feature" in self.name
        return self.kind == "conv" and not (definition == "paper" and self.is_shortcut)


def layer_costs(model: nn.Module, input_shape: Sequence[int]) -> list[LayerCost]:
    """Return the cost of every layer with parameters, in the order in which they run.

    Parameters
    ----------
    model : nn.Module
        Convolutions may be `nn.Conv2d` or `PatternConv2d`. It is run once, on one image of zeros, in
        evaluation mode and without gradient; its state stays as it was.
    input_shape : (int, int, int)
        Channels, height and width of the image.

    Raises
    ------
    InvalidArgument
        If the model has 1-d, 3-d or transposed convolutions, which this model does not cover.
    """
    named = {name: m for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    for name, module in named.items():
        if isinstance(module, _UNCOUNTED):
            raise InvalidArgument(f"model: layer {name} is a {type(module).__name__}, expected 2-d convolutions only")
    layers: dict[str, LayerCost] = {}
    dry_run(model, input_shape, {name: partial(_record, layers, name) for name in named})
    return _mark_first(layers.values())


def dry_run(model: nn.Module, input_shape: Sequence[int], hooks: Mapping[str, Callable[..., None]]) -> None:
    """Run a model once, on one image of zeros, in evaluation mode and without gradient; its state stays as it was.

    Parameters
    ----------
    model : nn.Module
        Its pattern convolutions run on the reference backend, which has nothing to compile.
    input_shape : (int, int, int)
        Channels, height and width of the image.
    hooks : mapping
        Module name -> forward hook (module, inputs, output) for this run.
    """
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), _evaluating(model):
            model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()


def _record(layers: dict[str, LayerCost], name: str, module: nn.Module, _inputs: object, output: Tensor) -> None:
    cost = _measure(name, module, output)
    earlier = layers[name].positions if name in layers else 0  # of a module that runs several times
    layers[name] = replace(cost, positions=cost.positions + earlier)


def _measure(name: str, module: nn.Module, output: Tensor) -> LayerCost:
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    shape = tuple(output.shape[1:])
    if isinstance(module, PatternConv2d):
        kept, weights = module.values.numel(), module.assignment.numel() * module.pool_masks[0].numel()
        height, width = module.kernel_size
    elif isinstance(module, nn.Conv2d):
        kept = weights = module.weight.numel()
        height, width = module.kernel_size
    elif isinstance(module, nn.Linear):
        weights = module.weight.numel()
        positions = output.numel() // module.out_features
        return LayerCost(name, "linear", weights, weights, parameters - weights, positions, (1, 1), shape)
    else:
        return LayerCost(name, "other", parameters, parameters, 0, 0, (1, 1), shape)
    return LayerCost(
        name,
        "conv",
        weights,
        kept,
        bias=parameters - kept,
        positions=shape[1] * shape[2],
        kernel_size=(height, width),
        out_shape=shape,
        is_shortcut=is_shortcut(name, module),
    )


def _mark_first(layers: Iterable[LayerCost]) -> list[LayerCost]:
    marked = list(layers)
    first = next((i for i, layer in enumerate(marked) if layer.kind == "conv"), None)
    if first is not None:
        marked[first] = replace(marked[first], is_first=True)
    return marked


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, on the reference backend; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    patterns = [(module, module.backend) for module in model.modules() if isinstance(module, PatternConv2d)]
    model.eval()
    for layer, _ in patterns:
        layer.backend = "reference"
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, backend in patterns:
            layer.backend = backend


def pruned(layers: Iterable[LayerCost], kept: Mapping[str, int]) -> list[LayerCost]:
    """Return the layers with other numbers of kept weights.

    Parameters
    ----------
    layers : iterable of LayerCost
        From `layer_costs`.
    kept : mapping
        Layer name -> kept weights; layers left out stay as they are.

    Raises
    ------
    InvalidArgument
        If a name is unknown or a number is not between 0 and the layer's weights.
    """
    by_name = {layer.name: layer for layer in layers}
    for name, count in kept.items():
        layer = by_name.get(name)
        if layer is None:
            raise InvalidArgument(f"kept: the model has no layer {name!r}")
        if not 0 <= count <= layer.weights:
            raise InvalidArgument(f"kept[{name!r}]: expected 0 to {layer.weights} weights, got {count}")
        by_name[name] = replace(layer, kept=int(count))
    return list(by_name.values())


def compression(
    layers: Iterable[LayerCost], kept: Mapping[str, int] | None = None, definition: Definition = "paper"
) -> float:
    """Return parameters / kept parameters under one of the three definitions.

    Parameters
    ----------
    layers : iterable of LayerCost
        From `layer_costs`.
    kept : mapping, optional
        Layer name -> kept weights, as in `pruned`.
    definition : {"paper", "all_convs", "released_counter"}
        What is counted, see `Definition`.
    """
    if definition not in DEFINITIONS:
        raise InvalidArgument(f"definition: expected one of {', '.join(DEFINITIONS)}, got {definition!r}")
    counted = [layer for layer in pruned(layers, kept or {}) if layer.is_counted(definition)]
    bias = sum(layer.bias for layer in counted) if definition == "released_counter" else 0
    remaining = sum(layer.kept for layer in counted) + bias
    total = sum(layer.weights for layer in counted) + bias
    return total / remaining if remaining else float("inf")


def compressions(layers: Iterable[LayerCost], kept: Mapping[str, int] | None = None) -> dict[str, float]:
    """Return the compression ratio under each definition, by name."""
    layers = list(layers)
    return {definition: compression(layers, kept, definition) for definition in DEFINITIONS}


def conv_macs(layers: Iterable[LayerCost], kept: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the MACs of all convolutions for one image: ``dense``, and ``sparse`` over kept weights only."""
    convs = [layer for layer in pruned(layers, kept or {}) if layer.kind == "conv"]
    return {"dense": sum(c.macs for c in convs), "sparse": sum(c.sparse_macs for c in convs)}


def accountings(
    layers: Iterable[LayerCost],
    kept: Mapping[str, int] | None = None,
    *,
    epochs: int,
    select_at: int,
    prune_at: int,
) -> dict[str, float]:
    """Return four what-ifs of ClickTrain's training cost, each as percent of dense training FLOPs saved.

    Training costs three times inference in every layer (forward 1, backward 2; the first one's grad-input is
    charged too), linear layers included and always dense. ``A``: sparse from the hard prune on. ``B``: sparse
    from the selection on, in all three passes. ``C``: as B, in two of the three passes. ``D``: density falls
    linearly from the selection to the hard prune. ClickTrain's regularised stage really runs dense, so B, C
    and D describe no run; `TrainingCost` integrates what one did.

    Parameters
    ----------
    layers, kept
        As in `compression`.
    epochs, select_at, prune_at : int
        Length of the run, and the epochs of selection and hard prune.
    """
    costed = pruned(layers, kept or {})
    dense = sum(layer.macs for layer in costed)
    saved = 100 * (dense - sum(layer.sparse_macs for layer in costed)) / dense
    after_selection = (epochs - select_at) / epochs
    after_prune = (epochs - prune_at) / epochs
    return {
        "A": saved * after_prune,
        "B": saved * after_selection,
        "C": saved * after_selection * 2 / 3,
        "D": saved * (after_selection + after_prune) / 2,
    }


class TrainingCost:
    """FLOPs of a training run, integrated step by step from the densities that a method reports.

    A layer costs its MACs once in each of three passes: forward, grad-input (not for the first convolution:
    images need no gradient) and grad-weight. Optimizer, penalties and everything without MACs are free.

    Parameters
    ----------
    layers : iterable of LayerCost
        Of the dense model.

    Attributes
    ----------
    flops : float
        Spent so far.
    dense_flops : float
        What the same steps cost without any sparsity.
    """

    def __init__(self, layers: Iterable[LayerCost]) -> None:
        self._passes: dict[str, tuple[int, int, int]] = {}
        for layer in layers:
            flops = FLOPS_PER_MAC * layer.macs
            self._passes[layer.name] = (flops, 0 if layer.is_first else flops, flops)
        self._dense_per_image = sum(sum(passes) for passes in self._passes.values())
        self.flops = 0.0
        self.dense_flops = 0.0

    def add_step(self, densities: Densities, batch_size: int, steps: int = 1) -> None:
        """Count optimiser steps.

        Parameters
        ----------
        densities : mapping
            Layer name -> densities of the three passes; layers left out run dense.
        batch_size : int
            Images in a step.
        steps : int
            Number of such steps.

        Raises
        ------
        InvalidArgument
            If a name is no layer of the dense model.
        """
        saved = 0.0
        for name, shares in densities.items():
            if name not in self._passes:
                raise InvalidArgument(f"densities: the dense model has no layer {name!r}")
            saved += sum((1 - share) * flops for share, flops in zip(shares, self._passes[name], strict=True))
        images = batch_size * steps
        self.flops += images * (self._dense_per_image - saved)
        self.dense_flops += images * self._dense_per_image

    def extra(self, flops: float) -> None:
        """Count FLOPs spent outside of steps, such as measuring importance."""
        self.flops += flops

    @property
    def saved_percent(self) -> float:
        """Percent of the dense FLOPs saved so far (negative if more was spent); 0 before the first step."""
        return 100 * (1 - self.flops / self.dense_flops) if self.dense_flops else 0.0

    def state_dict(self) -> dict[str, float]:
        """Return the counters."""
        return {"flops": self.flops, "dense_flops": self.dense_flops}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the counters to those of `state_dict`."""
        self.flops, self.dense_flops = state["flops"], state["dense_flops"]


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return what `fvcore.nn.FlopCountAnalysis.set_op_handle` takes, so that fvcore counts our operator.

    As all of fvcore's figures, these are MACs in spite of the name "flops": kept weights x output pixels.
    """
    return {"clicktrain::pattern_conv2d": _pattern_conv2d_macs}


def _pattern_conv2d_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the MACs of one traced call; inputs are (x, values, assignment, ...), outputs (y,)."""
    kept_kernels, entries = inputs[1].type().sizes()
    images, _, height, width = outputs[0].type().sizes()
    return int(kept_kernels * entries * images * height * width)
