"""The functions on blocked memory, by device."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from clicktrain.kernels.cpu.blocked_ops import Pair, Window
from clicktrain.kernels.plan import Plan

GPU = "cuda"
"""Type of the devices that the CUDA kernels compute on; the tests run those on the CPU."""

Name = Literal["cpu", "cuda"]


class Kernels(Protocol):
    """What a device's `blocked_ops` provides; activations are float32 [ceil(N/B), C, H, W, B], B images a block."""

    def pack(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) as a blocked activation in memory of its own."""
        ...

    def unpack(self, x: Tensor, images: int) -> Tensor:
        """Return a blocked activation as (N, C, H, W); it may share memory."""
        ...

    def forward_blocked(self, x: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Convolve."""
        ...

    def grad_input_blocked(self, dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Return the gradient of the convolution's input."""
        ...

    def grad_values_blocked(self, x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
        """Return the gradient (kept_kernels, entries) of the values."""
        ...

    def normalisation(
        self, x: Tensor, images: int, weight: Tensor | None, bias: Tensor | None, eps: float, momentum: float,
        running_mean: Tensor | None, running_var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Return mean, 1 / deviation, and the scale and shift that normalise a batch; update running statistics."""
        ...

    def affine(
        self, x: Tensor, images: int, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Return scale * x + shift (+ residual), then ReLU if asked for."""
        ...

    def batch_norm_backward(
        self, dy: Tensor, x: Tensor, images: int, mean: Tensor, invstd: Tensor, weight: Tensor | None, training: bool,
        needs_input: bool = True, relu_output: Tensor | None = None,
        relu_affine: tuple[Tensor, Tensor] | None = None, places: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        """Return the gradients of x, weight and bias."""
        ...

    def channel_sums(self, x: Tensor, images: int) -> Tensor:
        """Return the sum of each channel."""
        ...

    def pools(self, window: Window) -> bool:
        """Tell whether `max_pool` can compute these windows."""
        ...

    def max_pool(
        self, x: Tensor, images: int, size: Pair, stride: Pair, padding: Pair,
        affine: tuple[Tensor, Tensor] | None = None, relu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return maxima and their places."""
        ...

    def max_pool_backward(
        self, dy: Tensor, places: Tensor, in_size: Pair, size: Pair, stride: Pair, padding: Pair
    ) -> Tensor:
        """Return the gradient of what was pooled."""
        ...


def name_of(x: Tensor) -> Name | None:
    """Return which kernels compute on a tensor's device, if any do."""
    if x.device.type == GPU:
        return "cuda"
    return "cpu" if x.device.type == "cpu" else None


def shares_nchw(device: torch.device) -> bool:
    """Tell whether a block is one image on a device: blocked memory is that of the NCHW tensor then."""
    return device.type == GPU


def kernels(x: Tensor) -> Kernels:
    """Return the functions for a tensor's device."""
    return _load("cuda" if x.device.type == GPU else "cpu")


@cache
def _load(name: Name) -> Kernels:
    return cast(Kernels, import_module(f"clicktrain.kernels.{name}.blocked_ops"))
