"""im2col and the product of matrices with at most two of four neighbours, on sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import Problem

_AMPERE = (8, 0)
_ROWS, _COLUMNS, _RIGHT = 32, 64, 8
"""What the sides of the operands must be multiples of."""


class TwoOfFour(Matrices):
    """`torch.sparse.to_sparse_semi_structured`, in bfloat16; for masks of that kind only."""

    library = "2:4 bf16"
    kind = "sparse"
    devices = ("cuda",)
    tolerance = 1.6e-2

    def obstacle(self, problem: Problem) -> str | None:
        """Return what of mask, shape or GPU does not fit."""
        rows, columns = problem.matrix.shape
        right = problem.dy.numel() // problem.dy.shape[1]
        if rows % _ROWS or columns % _COLUMNS or right % _RIGHT:
            return f"needs multiples of {_ROWS}, {_COLUMNS} and {_RIGHT}, the product is of {rows}, {columns}, {right}"
        if int(problem.mask.flatten(1).view(-1, 4).sum(1).max()) > 2:
            return "the mask keeps more than two of four neighbours"
        capability = torch.cuda.get_device_capability()
        return None if capability >= _AMPERE else f"needs compute capability 8.0, this GPU has {capability}"

    def multiply(self, matrix: Tensor) -> Multiply:
        """Compress a matrix."""
        compressed = torch.sparse.to_sparse_semi_structured(matrix.bfloat16())
        return lambda right: torch.mm(compressed, right.bfloat16())
