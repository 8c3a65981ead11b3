"""A network's passes as CUDA graphs: the host starts one graph where it would launch hundreds of kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clicktrain import blocked
from clicktrain.blocked import kernels
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import reference
from clicktrain.kernels.backends import select
from clicktrain.layers import PatternConv2d

DISABLED = "CLICKTRAIN_DISABLE_CUDA_GRAPHS"
"""Environment variable that lets trainers call networks as they are."""


def record(model: nn.Module, x: Tensor) -> nn.Module:
    """Record the forward and backward pass of a network on a GPU, and return a module that replays them.

    A step of a network on small images is some hundred kernels of a few microseconds: launched one by one, they take as
    long as the host needs to launch them, whatever they compute. In a pruned network normalisation, addition, ReLU and
    pooling are fused besides (`clicktrain.blocked`).

    What is replayed are the passes of now: on the same parameters and buffers, which may change their values but not
    their memory, and without what Python code would do anew in each call. Record again after `convert`. Inputs of
    another shape have to go to the model itself.

    Parameters
    ----------
    model : nn.Module
        On a CUDA device, in training mode or not; the record holds for that mode. It stays as it is.
    x : Tensor, (N, C, H, W) float32
        Any batch of the shape to come; no gradient is computed for inputs.

    Returns
    -------
    nn.Module
        Has the model as its only child, and hence the same parameters.

    Raises
    ------
    InvalidArgument
        If `x` is not on a CUDA device, or a layer computes in a way that waits for the device.
    """
    if x.device.type != kernels.GPU:
        raise InvalidArgument(f"x is on {x.device}: expected a CUDA device, whose work can be recorded")
    if (layer := _waiting_layer(model)) is not None:
        raise InvalidArgument(f"model: {layer} computes by the reference backend, which waits for the device")
    # torch records no module with hooks of its own, which a network has while its operators are fused.
    graphs = _Network(model).train(model.training)
    with _unchanged(model, x.device), blocked.installed(model), warnings.catch_warnings():
        # of gradients on another stream: those that torch records are on two of its own, and are thrown away
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        torch.cuda.make_graphed_callables(graphs, (x.detach().clone(),), allow_unused_input=True)
    graphs.forget()
    return graphs


class _Network(nn.Sequential):
    """A model that, while it is recorded, knows what it has returned last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._last: list[Tensor] | None = []

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model does."""
        y: Tensor = self[0](x)
        if self._last is not None:
            self._last = [y]
        return y

    def forget(self) -> None:
        """Free the autograd graph of what was recorded, which torch keeps with the record and never uses.

        It would keep gradients on the stream of the record: each backward pass would wait for them, and torch warn.
        """
        for y in self._last or []:
            if not y._is_view():
                y.detach_()
        self._last = None


def _waiting_layer(model: nn.Module) -> str | None:
    """Return the name of a layer that cannot be recorded."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PatternConv2d))
    return next((name for name, layer in layers if select(layer.backend, layer.values) is reference), None)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what running a model does to its statistics, and to the generators of random numbers."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device]):
        yield
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)


class Recorder:
    """Calls a network by graphs where they serve, recorded for a shape that comes twice in a row.

    They are recorded again whenever parameters or buffers are other tensors, as after the hard prune, or two batches
    of another shape come: the last batch of an epoch is computed by the model itself.
    """

    def __init__(self) -> None:
        self._graphs: nn.Module | None = None
        self._recorded: tuple[torch.Size, list[tuple[Tensor, int]]] | None = None
        self._last = torch.Size()

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return what the model does."""
        y: Tensor = self._network(model, x)(x)
        return y

    def _network(self, model: nn.Module, x: Tensor) -> nn.Module:
        comes_again, self._last = x.shape == self._last, x.shape
        if x.device.type != kernels.GPU or not model.training or DISABLED in os.environ:
            return model
        now = [(tensor, tensor.data_ptr()) for tensor in (*model.parameters(), *model.buffers())]
        if self._graphs is not None and self._recorded is not None:
            shape, then = self._recorded
            if shape == x.shape and _same(now, then):
                return self._graphs
        if not comes_again or _waiting_layer(model) is not None:
            return model
        self._graphs = None  # first: its memory must be free
        self._graphs, self._recorded = record(model, x), (x.shape, now)
        return self._graphs


def _same(now: list[tuple[Tensor, int]], then: list[tuple[Tensor, int]]) -> bool:
    """Tell whether tensors, each with its address, are those of then."""
    return len(now) == len(then) and all(a is b and p == q for (a, p), (b, q) in zip(now, then, strict=True))
