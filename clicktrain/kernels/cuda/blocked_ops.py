"""Normalisation, addition, ReLU and pooling on CUDA tensors: the kernels of normalisation.cuh and pooling.cuh.

The functions are those of `clicktrain.kernels.cpu.blocked_ops`. On a GPU a block of images is one image: a blocked
activation of N images is a contiguous float32 tensor [N, C, H, W, 1], the memory of an NCHW tensor. Sums have a fixed
order, so results are the same bits from call to call on one device. An activation of more than `backend.INDEX_LIMIT`
elements raises InvalidArgument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu.blocked_ops import Pair, Window
from clicktrain.kernels.cuda import backend, codegen
from clicktrain.kernels.cuda.launch import Argument
from clicktrain.kernels.plan import Plan

THREADS = 256
BLOCKS = 8
"""Of `THREADS` threads, that a multiprocessor holds: as many in all add up channels."""
SHARED_BYTES = 2 * 4 * THREADS // 32


def pack(x: Tensor) -> Tensor:
    """Return a copy of x (N, C, H, W) as a blocked activation."""
    return x.clone(memory_format=torch.contiguous_format).unsqueeze(-1)


def unpack(x: Tensor, images: int) -> Tensor:
    """Return a blocked activation as (N, C, H, W), which shares its memory."""
    return x.squeeze(-1)


def forward_blocked(x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """As `backend.forward` on blocked activations."""
    return backend.forward(x.squeeze(-1), values, plan).unsqueeze(-1)


def grad_input_blocked(dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """As `backend.grad_input` on blocked activations."""
    return backend.grad_input(dy.squeeze(-1), values, plan).unsqueeze(-1)


def grad_values_blocked(x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
    """As `backend.grad_values` on blocked activations."""
    return backend.grad_values(x.squeeze(-1), dy.squeeze(-1), plan)


def normalisation(
    x: Tensor, images: int, weight: Tensor | None, bias: Tensor | None, eps: float, momentum: float,
    running_mean: Tensor | None, running_var: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return mean and 1 / sqrt(variance + eps) of each channel, and scale and shift that normalise; (C,) float32 each.

    The running statistics, if given, move towards the batch's by `momentum`: the mean, and the unbiased variance.
    """
    channels, plane = x.shape[1], x[0, 0].numel()
    found = [_empty(x, channels) for _ in range(4)]
    text, units = _unit(plane)
    sums, splits = _sums(x)
    _launch(text, "statistics", channels * splits, (x, sums, images, channels, units, splits), SHARED_BYTES)
    _launch(text, "finish_statistics", _blocks(32 * channels), (
        x, sums, weight, bias, running_mean, running_var, *found, channels, plane, splits, images * plane, float(eps),
        float(momentum),
    ))  # fmt: skip
    return found[0], found[1], found[2], found[3]


def affine(
    x: Tensor, images: int, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Return scale * x + shift (+ residual), then ReLU if asked for; scale and shift are (C,) float32."""
    y = _empty(x, *x.shape)
    text, units = _unit(x[0, 0].numel())
    count = images * x.shape[1] * units
    blocks = _blocks(count)
    _launch(
        text, "affine", blocks, (x, scale, shift, residual, y, x.shape[1], units, count, blocks, int(relu))
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
    """Return the gradients of x, weight and bias of a batch normalisation; parameters as on the CPU."""
    channels, share = x.shape[1], 1.0 / (images * x[0, 0].numel())
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    if places is None:
        prefix, behind = "", (relu_output, *(relu_affine or (None, None)))
        text, *sizes = _unit(x[0, 0].numel())
    else:
        prefix, behind = "pooled_", (places, *(relu_affine or (None, None)))
        text, *sizes = _pooling_unit(x)
    sums, splits = _sums(x)
    _launch(
        text, f"{prefix}norm_gradient_sums", channels * splits,
        (x, dy, *behind, mean, sums, images, channels, *sizes, splits), SHARED_BYTES,
    )  # fmt: skip
    _launch(text, "finish_norm_gradient", _blocks(32 * channels), (sums, invstd, dweight, dbias, channels, splits))
    if not needs_input:
        return None, dweight, dbias
    dx, of_batch = _empty(x, *x.shape), (dweight, dbias) if training else (None, None)
    count = images * channels * prod(sizes)
    blocks = _blocks(count)
    _launch(
        text, f"{prefix}norm_gradient", blocks,
        (x, dy, *behind, mean, invstd, weight, *of_batch, dx, channels, *sizes, count, blocks, share),
    )  # fmt: skip
    return dx, dweight, dbias


def channel_sums(x: Tensor, images: int) -> Tensor:
    """Return the sum of each channel over images and pixels, (C,) float32."""
    return x.sum((0, 2, 3, 4))


def pools(window: Window) -> bool:
    """Tell whether `max_pool` can compute these windows: they halve an even number of rows and columns."""
    return window.halves and window.height % 2 == window.width % 2 == 0


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
    _check_size(*x.shape)
    shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2, 1)
    y, places = _empty(x, *shape), torch.empty(shape, dtype=torch.uint8, device=x.device)
    text, *sizes = _pooling_unit(x)
    count = images * x.shape[1] * prod(sizes)
    blocks = _blocks(count)
    _launch(
        text, "max_pool", blocks,
        (x, *(affine or (None, None)), y, places, x.shape[1], *sizes, count, blocks, int(relu)),
    )  # fmt: skip
    return y, places


def max_pool_backward(dy: Tensor, places: Tensor, in_size: Pair, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Send each gradient to the place in a plane of `in_size` (height, width) from which its maximum came."""
    dx = _empty(dy, *dy.shape[:2], *in_size, 1)
    text, *sizes = _pooling_unit(dx)
    count = dy.shape[0] * dy.shape[1] * prod(sizes)
    _launch(text, "max_pool_gradient", _blocks(count), (dy, places, dx, dy.shape[1], *sizes, count))
    return dx


def _unit(plane: int) -> tuple[str, int]:
    """Return the text for planes of so many pixels, and how many packs make one."""
    vector = _vector(plane)
    return _text(vector, pooling=False), plane // vector


def _pooling_unit(x: Tensor) -> tuple[str, int, int]:
    """Return the text for pooling planes as those of x; rows of windows of a plane, and packs of a row."""
    height, width = x.shape[2:4]
    vector = _vector(width)
    return _text(vector, pooling=True), height // 2, width // vector


def _vector(pixels: int) -> int:
    """Return how many pixels are read at once."""
    return next(vector for vector in (4, 2, 1) if pixels % vector == 0)


@cache
def _text(vector: int, pooling: bool) -> str:
    parts = ["warp.cuh", "normalisation.cuh", *["pooling.cuh"] * pooling]
    return codegen.plain_unit({"THREADS": THREADS, "VECTOR": vector}, parts)


def _sums(x: Tensor) -> tuple[Tensor, int]:
    """Return memory for two sums of each channel and block, and how many blocks share a channel."""
    _check_size(*x.shape)
    channels = x.shape[1]
    blocks = BLOCKS * backend.launcher.limits(x.device).multiprocessors
    splits = max(1, min(x.shape[0], blocks // channels))
    return _empty(x, splits * channels * 2), splits


def _blocks(threads: int) -> int:
    return -(-threads // THREADS)


def _check_size(*shape: int) -> None:
    if prod(shape) > backend.INDEX_LIMIT:
        raise InvalidArgument(
            f"an activation of shape {shape[:4]} has {prod(shape)} elements: the cuda backend addresses "
            f"{backend.INDEX_LIMIT}; split the batch"
        )


def _empty(like: Tensor, *shape: int) -> Tensor:
    _check_size(*shape)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _launch(text: str, kernel: str, blocks: int, arguments: Sequence[Argument], shared: int = 0) -> None:
    backend.launcher.launch(text, kernel, blocks, THREADS, shared, arguments)
