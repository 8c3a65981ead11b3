"""Convolutions on BlockedTensors: those with patterns, and the dense layers that every network keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clicktrain.blocked.kernels import kernels, shares_nchw
from clicktrain.blocked.operators import Affine, blocked, handles
from clicktrain.blocked.tensor import BlockedTensor
from clicktrain.kernels.plan import Plan, plan
from clicktrain.patterns import PatternPool

aten = torch.ops.aten


class _PatternConvolution(torch.autograd.Function):
    """The pattern convolution on blocked memory, past torch's operators: they cost as much as a small convolution."""

    @staticmethod
    def forward(ctx: Any, x: BlockedTensor, values: Tensor, made: Plan) -> Tensor:
        ctx.plan = made
        ctx.save_for_backward(x, values)
        return BlockedTensor.wrap(kernels(x).forward_blocked(blocked(x), values, made), made.output_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        gradient, dx, dvalues = blocked(dy), None, None
        if ctx.needs_input_grad[0]:
            dx = BlockedTensor.wrap(kernels(x).grad_input_blocked(gradient, values, ctx.plan), ctx.plan.input_shape)
        if ctx.needs_input_grad[1]:
            dvalues = kernels(x).grad_values_blocked(blocked(x), gradient, ctx.plan)
        return dx, dvalues, None


def pattern_convolution(x: BlockedTensor, values: Tensor, made: Plan) -> Tensor:
    """Return what `clicktrain.pattern_conv2d` returns, as a BlockedTensor; differentiable once in `x` and `values`."""
    y: Tensor = _PatternConvolution.apply(x, values, made)  # type: ignore[no-untyped-call]
    return y


# Dense layers (the first one, shortcuts) run on the pattern kernels too on the CPU, with the pattern that keeps
# everything: even so they are as fast as torch on NCHW, and what surrounds them is spared the unpacking and packing.
# Kinds that the kernels do not know (groups, dilation, transposed, oblong) are unpacked for torch, and packed again; on
# a GPU, where neither costs anything, all are torch's.


@handles(aten.convolution.default)
def _dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor | None:  # fmt: skip
    if not isinstance(x, BlockedTensor) or isinstance(weight, BlockedTensor) or weight.dtype != torch.float32:
        return None
    if shares_nchw(x.device) or not _is_pattern_kind(weight, dilation, transposed, groups):
        rest = (weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        y = aten.convolution(_nchw(x), *rest)
        return BlockedTensor.wrap(_own(y), tuple(y.shape))
    made = _dense_plan(tuple(weight.shape), tuple(x.shape), tuple(stride), tuple(padding))
    y = kernels(x).forward_blocked(blocked(x), weight.reshape(made.values_shape), made)
    return BlockedTensor.wrap(
        y if bias is None else Affine(y, len(x), torch.ones_like(bias), bias.clone()), made.output_shape
    )


@handles(aten.convolution_backward.default)
def _dense_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    if not isinstance(x, BlockedTensor) or isinstance(weight, BlockedTensor) or weight.dtype != torch.float32:
        return None
    dx = dweight = dbias = None
    if shares_nchw(x.device) or not _is_pattern_kind(weight, dilation, transposed, groups):
        rest = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask)
        dx, dweight, dbias = aten.convolution_backward(_nchw(dy), _nchw(x), weight, *rest)
        return None if dx is None else BlockedTensor.wrap(_own(dx), tuple(x.shape)), dweight, dbias
    made = _dense_plan(tuple(weight.shape), tuple(x.shape), tuple(stride), tuple(padding))
    gradient = blocked(dy)
    if output_mask[0]:
        values = weight.reshape(made.values_shape)
        dx = BlockedTensor.wrap(kernels(x).grad_input_blocked(gradient, values, made), made.input_shape)
    if output_mask[1]:
        dweight = kernels(x).grad_values_blocked(blocked(x), gradient, made).view(weight.shape)
    if output_mask[2]:
        dbias = kernels(x).channel_sums(gradient, len(x))
    return dx, dweight, dbias


def _is_pattern_kind(weight: Tensor, dilation: Sequence[int], transposed: bool, groups: int) -> bool:
    return not transposed and groups == 1 and set(dilation) == {1} and weight.shape[2] == weight.shape[3]


def dense_plan(conv: nn.Conv2d, input_shape: tuple[int, ...]) -> Plan | None:
    """Return the plan by which a dense convolution computes on blocked activations, or None if it cannot."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if not _is_pattern_kind(conv.weight, conv.dilation, conv.transposed, conv.groups):
        return None
    shape: tuple[int, int, int, int] = tuple(conv.weight.shape)  # type: ignore[assignment]
    return _dense_plan(shape, input_shape, conv.stride, conv.padding)


@lru_cache(maxsize=256)
def _dense_plan(
    weight_shape: tuple[int, int, int, int], input_shape: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Plan:  # fmt: skip
    """Plan a convolution that keeps everything: its weight, flattened, is in canonical order already."""
    filters, channels, k, _ = weight_shape
    everything = PatternPool.from_masks([np.ones((k, k))])
    return plan(torch.zeros(filters, channels, dtype=torch.uint8), everything, input_shape, stride, padding)  # type: ignore[arg-type]


def _own(y: Tensor) -> Tensor:
    """Return what torch has just computed as blocked memory."""
    y = y.contiguous()
    return y.unsqueeze(-1) if shares_nchw(y.device) else kernels(y).pack(y)


def _nchw(x: Tensor) -> Tensor:
    """Return the values as NCHW, not to be written to; a blocked activation stays blocked."""
    if not isinstance(x, BlockedTensor):
        return x
    return x.activation.plain() if x.activation.is_plain else kernels(x).unpack(blocked(x), len(x))
