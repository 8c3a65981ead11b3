"""Normalisation, addition, ReLU and pooling on blocked activations: the C functions of blocked_ops.inc.

A blocked activation of a batch of N images is a contiguous float32 tensor [ceil(N/8), C, H, W, 8], its last axis
the images of a block; lanes beyond N hold zeros, and every function here keeps them so. Results do not depend on
the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.cpu import library
from clicktrain.kernels.cpu.backend import forward_blocked, grad_input_blocked, grad_values_blocked, pack, unpack
from clicktrain.kernels.cpu.codegen import LANES
from clicktrain.kernels.cpu.memory import empty

__all__ = [
    "Window", "affine", "batch_norm_backward", "batch_statistics", "channel_sums", "forward_blocked",
    "grad_input_blocked", "grad_values_blocked", "max_pool", "max_pool_backward", "normalisation", "pack", "pools",
    "unpack",
]  # fmt: skip

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Geometry of a pooling in pixels, vertical before horizontal."""

    height: int
    width: int
    out_height: int
    out_width: int
    size: Pair
    stride: Pair
    padding: Pair

    @classmethod
    def over(cls, x: Tensor, size: Pair, stride: Pair, padding: Pair) -> Window:
        """Return the geometry of a pooling of the blocked activation `x`."""
        height, width = x.shape[2:4]
        out = [(e + 2 * p - k) // s + 1 for e, k, s, p in zip((height, width), size, stride, padding, strict=True)]
        return cls(height, width, out[0], out[1], size, stride, padding)

    @property
    def halves(self) -> bool:
        """Whether the windows are 2 x 2 pixels that no other window has."""
        return self.size == self.stride == (2, 2) and self.padding == (0, 0)

    def as_c(self) -> ctypes.Array[ctypes.c_int64]:
        """Return the numbers in the order of the C structure."""
        numbers = (self.height, self.width, self.out_height, self.out_width, *self.size, *self.stride, *self.padding)
        return (ctypes.c_int64 * len(numbers))(*numbers)


def batch_statistics(
    x: Tensor, images: int, eps: float, momentum: float, running_mean: Tensor | None, running_var: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / sqrt(variance + eps) of each channel of a batch, (C,) float32 each.

    The running statistics, if given, move towards them by `momentum`: the mean, and the unbiased variance.
    """
    mean, invstd = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    _function("batch_statistics")(
        *_shape(x, images), _pointer(x), eps, momentum,
        _pointer(running_mean), _pointer(running_var), _pointer(mean), _pointer(invstd), torch.get_num_threads(),
    )  # fmt: skip
    return mean, invstd


def normalisation(
    x: Tensor, images: int, weight: Tensor | None, bias: Tensor | None, eps: float, momentum: float,
    running_mean: Tensor | None, running_var: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `batch_statistics` does, and the scale and shift, (C,) float32 each, that normalise the batch."""
    mean, invstd = batch_statistics(x, images, eps, momentum, running_mean, running_var)
    scale = invstd if weight is None else weight * invstd
    shift = -mean * scale if bias is None else bias - mean * scale
    return mean, invstd, scale, shift


def affine(
    x: Tensor, images: int, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Return scale * x + shift (+ residual), then ReLU if asked for; scale and shift are (C,) float32."""
    y = empty(*x.shape)
    _function("affine")(
        *_shape(x, images), _pointer(x), _pointer(scale), _pointer(shift), _pointer(residual), int(relu), _pointer(y),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    images: int,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    training: bool,
    needs_input: bool = True,
    relu_output: Tensor | None = None,
    relu_affine: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, weight and bias of a batch normalisation.

    Parameters
    ----------
    dy : Tensor
        Gradient of the result, or of the ReLU behind it if that is described.
    x : Tensor
        What was normalised, with the statistics `mean` and `invstd`, (C,) float32.
    training : bool
        Whether those were the batch's own, and so depend on x.
    needs_input : bool
        Without, the first gradient is None.
    relu_output : Tensor, optional
        Result of the ReLU.
    relu_affine : (Tensor, Tensor), optional
        Or the scale and shift that its input was computed with from x, which is quicker.
    places : Tensor, optional
        With `relu_affine`: the places of the maxima in windows that halve the ReLU's result (`Window.halves`); `dy` is
        the gradient of those maxima then.
    """
    dx = empty(*x.shape) if needs_input else None
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    scale, shift = relu_affine or (None, None)
    _function("normalisation_backward")(
        *_shape(x, images), _pointer(dy), _pointer(x), _pointer(mean), _pointer(invstd), _pointer(weight), training,
        _pointer(relu_output), _pointer(scale), _pointer(shift), _pointer(places), x.shape[3],
        _pointer(dx), _pointer(dweight), _pointer(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias


def channel_sums(x: Tensor, images: int) -> Tensor:
    """Return the sum of each channel over images and pixels, (C,) float32."""
    sums = x.new_empty(x.shape[1])
    _function("channel_sums")(*_shape(x, images), _pointer(x), _pointer(sums), torch.get_num_threads())
    return sums


def pools(window: Window) -> bool:
    """Tell whether `max_pool` can compute these windows: a place in one has to fit into a byte."""
    return window.size[0] * window.size[1] <= 256


def max_pool(
    x: Tensor,
    images: int,
    size: Pair,
    stride: Pair,
    padding: Pair,
    affine: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the maximum over each window and its place in the window, row-major, as uint8 of the same shape.

    With a scale and a shift, (C,) float32 each, what is pooled is scale * x + shift, then ReLU if asked for.
    """
    window = Window.over(x, size, stride, padding)
    y = empty(*x.shape[:2], window.out_height, window.out_width, LANES)
    places = torch.empty(y.shape, dtype=torch.uint8)
    scale, shift = affine or (None, None)
    _function("max_pool")(
        window.as_c(), *_shape(x, images), _pointer(x), _pointer(scale), _pointer(shift), relu, _pointer(y),
        _pointer(places), torch.get_num_threads(),
    )  # fmt: skip
    return y, places


def max_pool_backward(dy: Tensor, places: Tensor, in_size: Pair, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Send each gradient to the place in a plane of `in_size` (height, width) from which its maximum came."""
    dx = empty(*dy.shape[:2], *in_size, LANES)
    window = Window.over(dx, size, stride, padding)
    planes = dy.shape[0] * dy.shape[1]
    _function("max_pool_backward")(
        window.as_c(), planes, _pointer(dy), _pointer(places), _pointer(dx), torch.get_num_threads()
    )
    return dx


_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "d": ctypes.c_double,
    "p": ctypes.c_void_p,
}
_ARGUMENTS = {
    "batch_statistics": "lllpddppppi",
    "affine": "lllppppipi",
    "normalisation_backward": "lllpppppipppplpppi",
    "channel_sums": "lllppi",
    "max_pool": "plllpppippi",
    "max_pool_backward": "plpppi",
}


@cache
def _function(name: str) -> Callable[..., None]:
    """Return a C function of the instruction set in use."""
    found = library.load()[f"clicktrain_{library.instruction_set()}_{name}"]
    found.argtypes = [_TYPES[letter] for letter in _ARGUMENTS[name]]
    found.restype = None
    return found


def _shape(x: Tensor, images: int) -> tuple[int, int, int]:
    return images, x.shape[1], x.shape[2] * x.shape[3]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
