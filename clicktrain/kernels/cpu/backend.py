"""The CPU backend's three functions, on NCHW tensors and on blocked activations.

A blocked activation is `[ceil(N/8), C, H, W, 8]` float32, contiguous, its last axis eight images; lanes beyond N
are zero. The functions ending in `_blocked` keep that layout from layer to layer; the others pack and unpack. With
few images they make the lanes strips of one image instead, where that wastes less.

Results do not depend on the number of threads (`torch.get_num_threads()`), and, of the tuned choices, only on the
channel blocks.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu import memory
from clicktrain.kernels.cpu.codegen import LANES
from clicktrain.kernels.cpu.library import Lanes, available, function
from clicktrain.kernels.cpu.passes import Prepared
from clicktrain.kernels.cpu.runtime import Packing, preparations, runtime_of, tune, use_choices, whole_images
from clicktrain.kernels.cpu.tuning import export_choices as choices
from clicktrain.kernels.plan import Plan

__all__ = [
    "LANES", "available", "choices", "forward", "forward_blocked", "grad_input", "grad_input_blocked", "grad_values",
    "grad_values_blocked", "pack", "preparations", "tune", "unpack", "use_choices",
]  # fmt: skip


def forward(x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Convolve x (N, C_in, H, W) with values (kept_kernels, entries); returns (N, C_out, H_out, W_out).

    Raises
    ------
    InvalidArgument
        If an operand is not a float32 CPU tensor of the plan's shape.
    """
    x, values = _checked("x", x, plan.input_shape), _checked("values", values, plan.values_shape)
    if _empty(plan):
        return x.new_zeros(plan.output_shape)
    runtime = runtime_of(plan)
    return _convolve_packed(x, values, plan.output_shape, runtime.forward_packing, runtime.forward_strips)


def grad_input(dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (N, C_in, H, W) of the input for dy (N, C_out, H_out, W_out); raises as `forward`."""
    dy, values = _checked("dy", dy, plan.output_shape), _checked("values", values, plan.values_shape)
    if _empty(plan):
        return dy.new_zeros(plan.input_shape)
    runtime = runtime_of(plan)
    return _convolve_packed(dy, values, plan.input_shape, runtime.grad_input_packing, runtime.grad_input_strips)


def grad_values(x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (kept_kernels, entries) of the values; raises as `forward`."""
    x, dy = _checked("x", x, plan.input_shape), _checked("dy", dy, plan.output_shape)
    if _empty(plan):
        return x.new_zeros(plan.values_shape)
    dvalues, runtime = memory.empty(*plan.values_shape), runtime_of(plan)
    packing = runtime.forward_packing
    _run("gradient", runtime.gradient_strips, _pack(x, packing.source), _pack(dy, packing.target), dvalues)
    return dvalues


def forward_blocked(xb: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """As `forward` on blocked activations."""
    xb, values = _checked("xb", xb, _blocked(plan.input_shape)), _checked("values", values, plan.values_shape)
    return _convolve(xb, values, _blocked(plan.output_shape), plan, "forward")


def grad_input_blocked(dyb: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """As `grad_input` on blocked activations."""
    dyb, values = _checked("dyb", dyb, _blocked(plan.output_shape)), _checked("values", values, plan.values_shape)
    return _convolve(dyb, values, _blocked(plan.input_shape), plan, "grad_input")


def grad_values_blocked(xb: Tensor, dyb: Tensor, plan: Plan) -> Tensor:
    """As `grad_values` on blocked activations."""
    xb, dyb = _checked("xb", xb, _blocked(plan.input_shape)), _checked("dyb", dyb, _blocked(plan.output_shape))
    if _empty(plan):
        return xb.new_zeros(plan.values_shape)
    dvalues = memory.empty(*plan.values_shape)
    _run("gradient", runtime_of(plan).gradient, xb, dyb, dvalues)
    return dvalues


def pack(x: Tensor) -> Tensor:
    """Return x (N, C, H, W) as a blocked activation."""
    x = _checked("x", x, tuple(x.shape))
    n, c, h, w = x.shape
    xb = memory.empty(*_blocked((n, c, h, w)))
    if xb.numel():
        lanes = whole_images(n, c, (h, w))
        function("pack")(ctypes.addressof(lanes), x.data_ptr(), xb.data_ptr(), torch.get_num_threads())
    return xb


def unpack(xb: Tensor, n: int) -> Tensor:
    """Return the first n images of a blocked activation as (n, C, H, W)."""
    xb = _checked("xb", xb, tuple(xb.shape))
    blocks, c, h, w, _ = xb.shape
    if -(-n // LANES) != blocks:
        raise InvalidArgument(f"n={n}: xb holds {blocks} blocks of {LANES} images")
    x = memory.empty(n, c, h, w)
    if x.numel():
        lanes = whole_images(n, c, (h, w))
        function("unpack")(ctypes.addressof(lanes), xb.data_ptr(), x.data_ptr(), torch.get_num_threads())
    return x


def _blocked(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (-(-shape[0] // LANES), *shape[1:], LANES)


def _empty(plan: Plan) -> bool:
    """Whether there is nothing to compute: no image or no kept kernel."""
    return not plan.input_shape[0] or not plan.values_shape[0]


def _convolve(xb: Tensor, values: Tensor, shape: tuple[int, ...], plan: Plan, direction: str) -> Tensor:
    if _empty(plan):
        return xb.new_zeros(shape)
    y = memory.empty(*shape)
    runtime = runtime_of(plan)
    _run("convolve", runtime.forward if direction == "forward" else runtime.grad_input, xb, values, y)
    return y


def _convolve_packed(x: Tensor, values: Tensor, shape: tuple[int, ...], packing: Packing, prepared: Prepared) -> Tensor:
    lanes = packing.target
    yb = memory.empty(lanes.blocks, lanes.channels, lanes.lane_h, lanes.lane_w, LANES)
    _run("convolve", prepared, _pack(x, packing.source), values, yb)
    y = memory.empty(*shape)
    function("unpack")(ctypes.addressof(lanes), yb.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def _pack(x: Tensor, lanes: Lanes) -> Tensor:
    xb = memory.empty(lanes.blocks, lanes.channels, lanes.lane_h, lanes.lane_w, LANES)
    function("pack")(ctypes.addressof(lanes), x.data_ptr(), xb.data_ptr(), torch.get_num_threads())
    return xb


def _run(name: str, prepared: Prepared, first: Tensor, second: Tensor, result: Tensor) -> None:
    function(name)(prepared.address, first.data_ptr(), second.data_ptr(), result.data_ptr(), torch.get_num_threads())


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the operand, contiguous."""
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"{name} is on {tensor.device}: the cpu backend computes on cpu tensors")
    if tensor.dtype != torch.float32:
        raise InvalidArgument(f"{name} is {tensor.dtype}: the cpu backend computes in torch.float32")
    if tuple(tensor.shape) != shape:
        raise InvalidArgument(f"{name} has shape {tuple(tensor.shape)}: the plan expects {shape}")
    return tensor.contiguous()
