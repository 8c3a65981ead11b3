"""Group lasso on the weights that will be removed, so that removing them changes little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clicktrain.assignment import Assignment

_EPSILON = 1e-8  # under the root, as in the released code: no NaN where a group is zero


@dataclass(frozen=True, eq=False)
class PrunedGroups:
    """The two kinds of groups of one layer that the penalty shrinks.

    Attributes
    ----------
    off_pattern : Tensor, (C_out, C_in, k, k) bool
        Entries outside the pattern of their kernel, whether the kernel stays or not; one group a kernel.
    removed : Tensor, (C_out, C_in, 1, 1) bool
        Kernels that connectivity pruning will remove; one group each.
    """

    off_pattern: Tensor
    removed: Tensor

    @classmethod
    def of(cls, patterns: Assignment, kept: Assignment) -> PrunedGroups:
        """Build from the assignment that gives every kernel a pattern and the one with kernels removed."""
        mask = kept.mask()
        return cls(~patterns.mask(), ~mask.flatten(2).any(2)[:, :, None, None])

    def left(self, weight: Tensor) -> Tensor:
        """Return the squared norm of all that will be removed from a weight."""
        return (weight.detach() * (self.off_pattern | self.removed)).square().sum()


def group_lasso(weights: Sequence[Tensor], groups: Sequence[PrunedGroups]) -> Tensor:
    """Return R_p + R_k of the layers, differentiable in the weights.

    R_p = sum over kernels of sqrt(||W_oi outside its pattern||^2 + 1e-8), R_k = sum over kernels of
    sqrt(||W_oi if it will be removed||^2 + 1e-8); kernels with nothing to remove add the constant 1e-4.

    Parameters
    ----------
    weights : sequence of Tensor, each (C_out, C_in, k, k)
        Dense weights.
    groups : sequence of PrunedGroups
        What to shrink in each.

    Returns
    -------
    Tensor
        Scalar.
    """
    result: Tensor = _GroupLasso.apply(groups, *weights)  # type: ignore[no-untyped-call]
    return result


class _GroupLasso(torch.autograd.Function):
    """The penalty with its gradient in closed form: half the memory traffic of what autograd would record."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[PrunedGroups], *weights: Tensor) -> Tensor:
        total = weights[0].new_zeros(())
        gradients = []
        for weight, group in zip(weights, groups, strict=True):
            outside = weight * group.off_pattern
            outside_norm = _norm(outside)
            whole_norm = _norm(weight * group.removed)
            total += outside_norm.sum() + whole_norm.sum()
            gradients.append((outside / outside_norm).addcmul_(weight, group.removed / whole_norm))
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(grad_outputs[0] * gradient for gradient in ctx.gradients))


def _norm(groups: Tensor) -> Tensor:
    return (groups.square().sum((2, 3), keepdim=True) + _EPSILON).sqrt()
