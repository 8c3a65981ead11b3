"""The pattern convolution as PyTorch operators: dispatch to a backend, autograd, fake tensors, autocast.

The operators take tensors, integers and the backend's name, so that they survive torch.compile and torch.export
into another process; plans are found again by content.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.backends import select
from clicktrain.kernels.plan import Plan, output_size, plan
from clicktrain.patterns import PatternPool

_NAME = "clicktrain::pattern_conv2d"
_SPARSITY = "Tensor assignment, Tensor pool"
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, str backend"

torch.library.define(_NAME, f"(Tensor x, Tensor values, {_SPARSITY}, {_GEOMETRY}) -> Tensor")
torch.library.define(
    f"{_NAME}_grad_input",
    f"(Tensor dy, Tensor values, {_SPARSITY}, SymInt[] input_shape, {_GEOMETRY}) -> Tensor",
)
torch.library.define(
    f"{_NAME}_grad_values",
    f"(Tensor x, Tensor dy, {_SPARSITY}, SymInt[2] values_shape, {_GEOMETRY}) -> Tensor",
)


def pattern_conv2d(x: Tensor, values: Tensor, plan: Plan, backend: str = "auto") -> Tensor:
    """Convolve with a pattern-pruned weight; differentiable in `x` and `values`.

    Parameters
    ----------
    x : Tensor, (N, C_in, H, W) float
        Input, of the plan's `input_shape`.
    values : Tensor, (kept_kernels, entries) float
        Kept weights in canonical order: kernels row-major by (o, i), entries row-major in the pattern.
    plan : Plan
        From `clicktrain.kernels.plan`.
    backend : str
        "auto" takes the fastest that supports the input; a name ("cpu", "reference") takes that one or raises.

    Returns
    -------
    Tensor, (N, C_out, H_out, W_out)

    Raises
    ------
    InvalidArgument
        If a shape is not the plan's, or the backend cannot compute on the input.
    BackendUnavailable
        If the named backend cannot run on this machine.
    """
    if tuple(x.shape) != plan.input_shape:
        raise InvalidArgument(f"x has shape {tuple(x.shape)}: the plan was made for {plan.input_shape}")
    masks = plan.pool.masks().to(x.device)
    index = plan.index.to(x.device)
    stride, padding = list(plan.stride), list(plan.padding)
    result: Tensor = torch.ops.clicktrain.pattern_conv2d(x, values, index, masks, stride, padding, backend)
    return result


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    values: Tensor,
    assignment: Tensor,
    pool: Tensor,
    stride: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    _check_operand("x", x, values)
    made = plan_of(assignment, pool, x.shape, stride, padding)
    _check_values(values, made)
    return select(backend, x).forward(x.contiguous(), values.contiguous(), made)


@torch.library.impl(f"{_NAME}_grad_input", "CompositeExplicitAutograd")
def _grad_input(
    dy: Tensor,
    values: Tensor,
    assignment: Tensor,
    pool: Tensor,
    input_shape: list[int],
    stride: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    _check_operand("dy", dy, values)
    made = plan_of(assignment, pool, input_shape, stride, padding)
    _check_values(values, made)
    _check_output_gradient(dy, made)
    return select(backend, dy).grad_input(dy.contiguous(), values.contiguous(), made)


@torch.library.impl(f"{_NAME}_grad_values", "CompositeExplicitAutograd")
def _grad_values(
    x: Tensor,
    dy: Tensor,
    assignment: Tensor,
    pool: Tensor,
    values_shape: list[int],
    stride: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    _check_operand("x", x, dy)
    made = plan_of(assignment, pool, x.shape, stride, padding)
    _check_output_gradient(dy, made)
    return select(backend, x).grad_values(x.contiguous(), dy.contiguous(), made)


@torch.library.register_fake(_NAME)
def _fake_forward(x, values, assignment, pool, stride, padding, backend):  # type: ignore[no-untyped-def]
    height, width = output_size(tuple(x.shape[2:]), pool.shape[-1], stride, padding)
    return x.new_empty(x.shape[0], assignment.shape[0], height, width)


@torch.library.register_fake(f"{_NAME}_grad_input")
def _fake_grad_input(dy, values, assignment, pool, input_shape, stride, padding, backend):  # type: ignore[no-untyped-def]
    return dy.new_empty(input_shape)


@torch.library.register_fake(f"{_NAME}_grad_values")
def _fake_grad_values(x, dy, assignment, pool, values_shape, stride, padding, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(values_shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, assignment, pool, ctx.stride, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(x, values, assignment, pool)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, values, assignment, pool = ctx.saved_tensors
    rest = (ctx.stride, ctx.padding, ctx.backend)
    ops = torch.ops.clicktrain
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = ops.pattern_conv2d_grad_input(dy, values, assignment, pool, list(x.shape), *rest)
    if ctx.needs_input_grad[1]:
        dvalues = ops.pattern_conv2d_grad_values(x, dy, assignment, pool, list(values.shape), *rest)
    return dx, dvalues, None, None, None, None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
torch.library.register_autocast(_NAME, "cpu", torch.float32)
torch.library.register_autocast(_NAME, "cuda", torch.float32)

Key = tuple[int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_plans: MutableMapping[Tensor, dict[Key, tuple[Tensor, Plan]]] = WeakIdKeyDictionary()
"""Assignment tensor -> versions, identity of the pool tensor, shape, stride, padding -> pool tensor (so that no other
has its identity) and plan."""
_pools: MutableMapping[Tensor, tuple[int, PatternPool]] = WeakIdKeyDictionary()  # pool tensor -> (version, PatternPool)


def plan_of(
    assignment: Tensor,
    pool: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Plan:
    """Find the plan of an assignment tensor: by identity and version, which is quick, else by content."""
    shapes = tuple(input_shape), tuple(stride), tuple(padding)
    key: Key = (assignment._version, id(pool), pool._version, *shapes)
    known = _plans.get(assignment)
    if known is None:
        known = _plans[assignment] = {}
    if key not in known:
        known[key] = pool, plan(assignment, _pool(pool), *shapes)  # type: ignore[arg-type]
    return known[key][1]


def _pool(masks: Tensor) -> PatternPool:
    known = _pools.get(masks)
    if known is None or known[0] != masks._version:
        known = _pools[masks] = (masks._version, PatternPool.from_masks(masks.cpu().numpy()))
    return known[1]


def _check_operand(name: str, operand: Tensor, other: Tensor) -> None:
    if not operand.is_floating_point() or operand.ndim != 4:
        raise InvalidArgument(
            f"{name} is {operand.dtype} of shape {tuple(operand.shape)}: expected a floating (N, C, H, W) tensor"
        )
    if operand.dtype != other.dtype or operand.device != other.device:
        raise InvalidArgument(
            f"{name} is {operand.dtype} on {operand.device}, the other operand {other.dtype} on {other.device}: "
            "expected one type and one device"
        )


def _check_values(values: Tensor, made: Plan) -> None:
    if tuple(values.shape) != made.values_shape:
        raise InvalidArgument(f"values has shape {tuple(values.shape)}: the assignment keeps {made.values_shape}")


def _check_output_gradient(dy: Tensor, made: Plan) -> None:
    if tuple(dy.shape) != made.output_shape:
        raise InvalidArgument(f"dy has shape {tuple(dy.shape)}: the convolution gives {made.output_shape}")
