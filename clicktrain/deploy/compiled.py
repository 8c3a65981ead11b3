"""CompiledModel: what `compile` and `load` return."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.deploy import choice, gpu, storage
from clicktrain.deploy.engine import Engine
from clicktrain.deploy.fusion import fuse
from clicktrain.deploy.gpu import GpuEngine
from clicktrain.deploy.graph import Graph
from clicktrain.deploy.program import build_program
from clicktrain.deploy.trace import trace
from clicktrain.errors import BackendUnavailable, InvalidArgument, UnsupportedModel
from clicktrain.kernels.cpu import library
from clicktrain.kernels.cuda import launch

DEVICES = ("cpu", "cuda")


class CompiledModel(nn.Module):
    """A network that runs whole: fused, and without allocating memory while it runs.

    On the CPU its activations stay blocked from the first layer to the last, on planned memory; on a GPU everything is
    recorded as a CUDA graph, float32, NCHW, and layers that torch computes obey torch's own settings (TF32).

    Made by `clicktrain.deploy.compile` and `clicktrain.deploy.load`. It has no parameters and cannot be trained, and
    any number of threads may call it at once.

    Parameters
    ----------
    graph : Graph
        Fused.
    batch : int
        Images that are computed at once.
    tune : bool
        See `compile`.
    device : {"cpu", "cuda"}
        Where it runs; on the current GPU.

    Attributes
    ----------
    fallbacks : list of str
        Operators that torch computes, because there is no kernel for them here.
    """

    def __init__(self, graph: Graph, batch: int, tune: bool = False, device: str = "cpu") -> None:
        super().__init__()
        _check_device(device)
        if graph.fallbacks and batch != graph.batch:
            raise InvalidArgument(
                f"batch={batch}: the model was traced for {graph.batch} images, and torch computes a part of it "
                f"({', '.join(sorted(set(graph.fallbacks)))}), which may depend on that"
            )
        self.graph, self.batch, self.device = graph, batch, device
        self.fallbacks = graph.fallbacks
        output = graph.nodes[graph.output].shape
        assert output is not None
        self._output_shape = output
        self.engine = (
            Engine(build_program(graph, batch, tune), (batch, *output))
            if device == "cpu"
            else GpuEngine(graph, batch, torch.device("cuda", torch.cuda.current_device()), tune)
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the batch that it is made for."""
        return (self.batch, *self.graph.input_shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: kept weights of convolutions, and linear layers."""
        return sum(node.macs for node in self.graph.nodes.values())

    @property
    def arena_bytes(self) -> int | None:
        """Memory for intermediate results, for each thread that calls at the same time; None on a GPU."""
        return 4 * self.engine.program.arena_floats if isinstance(self.engine, Engine) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's result for images x.

        A batch of another size than `batch` is computed in parts, the last one filled up with zeros; a model with
        fallbacks takes its own size only.

        Raises
        ------
        InvalidArgument
            If x is not a float32 tensor of the shape and on the device that the model was compiled for.
        """
        self._check(x)
        x = x.detach().contiguous()
        if len(x) == self.batch:
            return self.engine.run(x)
        y = torch.empty(len(x), *self._output_shape, device=x.device)
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            if len(part) < self.batch:
                part = torch.cat([part, part.new_zeros(self.batch - len(part), *part.shape[1:])])
            stop = min(start + self.batch, len(x))
            y[start:stop] = self.engine.run(part)[: stop - start]
        return y

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"x is of type {type(x).__name__}: expected a tensor")
        if x.device.type != self.device or x.dtype != torch.float32:
            raise InvalidArgument(
                f"x is {x.dtype} on {x.device}: the model was compiled for torch.float32 on {self.device}"
            )
        if x.ndim != len(self.input_shape) or tuple(x.shape[1:]) != self.graph.input_shape:
            raise InvalidArgument(
                f"x has shape {tuple(x.shape)}: the model was compiled for "
                f"(N, {', '.join(map(str, self.graph.input_shape))})"
            )
        if self.fallbacks and len(x) != self.batch:
            raise InvalidArgument(f"x has {len(x)} images: a model with fallbacks computes {self.batch} at a time")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file, for `clicktrain.deploy.load`; see `clicktrain.deploy.storage`."""
        choices = self.engine.program.choices if isinstance(self.engine, Engine) else {}
        storage.write(Path(path), self.graph, self.batch, choices, self.device)

    def extra_repr(self) -> str:
        """Describe it for `repr`."""
        counts = f"operations={len(self.graph.nodes) - 1}, fallbacks={self.fallbacks}"
        return f"input_shape={self.input_shape}, device={self.device!r}, {counts}"


def compile(
    model: nn.Module,
    example_input: Tensor,
    device: str = "cpu",
    *,
    batch: int | None = None,
    strict: bool = False,
    tune: bool = False,
) -> CompiledModel:
    """Make a network that runs whole out of a trained model.

    The model is traced in evaluation mode (and not changed), normalisations are folded into weights, additions and
    ReLUs into convolutions.

    Parameters
    ----------
    model : nn.Module
        Maps a float32 batch (N, ...) to one tensor (N, ...); pattern convolutions run sparse.
    example_input : Tensor
        A batch; only its shape matters.
    device : {"cpu", "cuda"}
        Where it will run; "cuda" is the current GPU.
    batch : int, optional
        Images that are computed at once; by default as many as in `example_input`.
    strict : bool
        Whether an operator without a kernel here is an error, rather than left to torch.
    tune : bool
        Whether to measure how each convolution is cut up best (see `clicktrain.tune`), which takes seconds for each
        kind of layer, once on a machine; and which ones torch computes faster dense. The latter is saved with the
        model. Kernels of 3x3 may be computed by Winograd's transform, if that is faster: rounding errors are then about
        1e-6 of a layer's result, and NaN spreads over 4 x 4 pixels.

    Raises
    ------
    UnsupportedModel
        If the model cannot be traced, or, with `strict`, holds operators without a kernel.
    BackendUnavailable
        If the device cannot be computed on.
    InvalidArgument
        If another argument has a wrong value.
    """
    _check_device(device)
    if not isinstance(example_input, Tensor) or example_input.dtype != torch.float32:
        kind = example_input.dtype if isinstance(example_input, Tensor) else type(example_input).__name__
        raise InvalidArgument(f"example_input is {kind}: expected a torch.float32 tensor")
    if example_input.ndim < 1 or not example_input.numel() or example_input.device.type not in DEVICES:
        raise InvalidArgument(
            f"example_input has shape {tuple(example_input.shape)} on {example_input.device}: expected a batch"
        )
    batch = len(example_input) if batch is None else batch
    if batch < 1:
        raise InvalidArgument(f"batch={batch}: expected a positive number of images")
    example = example_input.detach()[:1].cpu().expand(batch, *example_input.shape[1:]).contiguous()
    graph = fuse(trace(model, example))
    if strict and graph.fallbacks:
        raise UnsupportedModel(f"model: no kernel for {', '.join(sorted(set(graph.fallbacks)))} (strict=True)")
    if tune and device == "cuda":
        graph = gpu.choose(graph, batch, torch.device("cuda", torch.cuda.current_device()))
    elif tune:
        graph = choice.choose(graph, batch)
    return CompiledModel(graph, batch, tune, device)


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise InvalidArgument(f"device={device!r}: expected 'cpu' or 'cuda'")
    reason = library.available() if device == "cpu" else launch.available()
    if reason is not True:
        raise BackendUnavailable(f"device={device!r}: the compiled kernels are not available: {reason}")


def load(
    path: str | os.PathLike[str], batch: int | None = None, *, tune: bool = False, device: str = "cpu"
) -> CompiledModel:
    """Read a model that `CompiledModel.save` wrote.

    Parameters
    ----------
    path : path-like
        The file.
    batch : int, optional
        Images that are computed at once; by default as when it was saved.
    tune : bool
        See `compile`.
    device : {"cpu", "cuda"}
        Where it will run. Which layers torch computes faster was measured on the device that it was saved for, and
        counts there only.

    Raises
    ------
    ModelFileError
        If the file is damaged, not a compiled model, or of a version that this program does not know.
    """
    graph, saved = storage.read(Path(path), device)
    if batch is not None and batch < 1:
        raise InvalidArgument(f"batch={batch}: expected a positive number of images")
    return CompiledModel(graph, saved if batch is None else batch, tune, device)
