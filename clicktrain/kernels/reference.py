"""Reference backend: pattern convolution as a masked dense one; the truth when given float64.

Pruned positions do not exist, so a NaN or an infinity that only a pruned tap would touch must not spread. A
masked dense convolution would multiply it by zero and get NaN; where an operand is not finite, the functions
below therefore sum kept kernels one by one. That is slow, exact, and rare.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from clicktrain.kernels.plan import Plan


def forward(x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Convolve x (N, C_in, H, W) with values (kept_kernels, entries); returns (N, C_out, H_out, W_out)."""
    if _all_finite(x, values):
        return F.conv2d(x, _dense(values, plan), None, plan.stride, plan.padding)
    y = x.new_zeros(plan.output_shape)
    padded = F.pad(x, (plan.padding[1],) * 2 + (plan.padding[0],) * 2)
    for o, i, row, column, value in _taps(values, plan):
        y[:, o] += value * padded[:, i][_window(plan, row, column)]
    return y


def grad_input(dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (N, C_in, H, W) of the input for dy (N, C_out, H_out, W_out)."""
    if _all_finite(dy, values):
        shape, weight = list(plan.input_shape), _dense(values, plan)
        dx: Tensor = conv2d_input(shape, weight, dy, plan.stride, plan.padding)  # type: ignore[no-untyped-call]
        return dx
    n, c, h, w = plan.input_shape
    padded = dy.new_zeros(n, c, h + 2 * plan.padding[0], w + 2 * plan.padding[1])
    for o, i, row, column, value in _taps(values, plan):
        padded[:, i][_window(plan, row, column)] += value * dy[:, o]
    return padded[:, :, plan.padding[0] : plan.padding[0] + h, plan.padding[1] : plan.padding[1] + w].contiguous()


def grad_values(x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (kept_kernels, entries) of the values."""
    # Each entry sees only its own input and output channel, so nothing of a pruned one can reach it.
    shape = list(plan.weight_shape)
    dense: Tensor = conv2d_weight(x, shape, dy, plan.stride, plan.padding)  # type: ignore[no-untyped-call]
    return dense.flatten()[plan.positions.to(dense.device)]


def _dense(values: Tensor, plan: Plan) -> Tensor:
    """Return the dense (C_out, C_in, k, k) weight with zeros where pruned."""
    o, i, k, _ = plan.weight_shape
    dense = values.new_zeros(o * i * k * k)
    dense[plan.positions.flatten().to(values.device)] = values.flatten()
    return dense.view(plan.weight_shape)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _taps(values: Tensor, plan: Plan) -> list[tuple[int, int, int, int, Tensor]]:
    """List every kept weight as (filter, channel, row, column, value)."""
    _, channels, k, _ = plan.weight_shape
    taps = []
    for position, value in zip(plan.positions.flatten().tolist(), values.flatten(), strict=True):
        kernel, inside = divmod(position, k * k)
        taps.append((*divmod(kernel, channels), *divmod(inside, k), value))
    return taps


def _window(plan: Plan, row: int, column: int) -> tuple[slice, slice, slice]:
    """Return the places of one padded channel (N, H, W) that a tap multiplies, one for each output pixel."""
    height, width = plan.output_shape[2:]
    rows = slice(row, row + height * plan.stride[0], plan.stride[0])
    columns = slice(column, column + width * plan.stride[1], plan.stride[1])
    return (slice(None), rows, columns)
