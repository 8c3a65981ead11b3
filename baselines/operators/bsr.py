"""im2col and a product with a matrix of small dense blocks, through torch: MKL on CPUs, Triton on GPUs."""

from __future__ import annotations

import warnings

from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import Problem

_SIZES = (2, 4, 8, 16)
"""Sides of blocks: MKL takes square ones only."""


class BSR(Matrices):
    """Block SpMM, with the size of blocks that stores fewest values.

    Blocks of more than one weight are what this format is for; patterns fill few of them.
    """

    library = "BSR"
    kind = "sparse"

    def obstacle(self, problem: Problem) -> str | None:
        """Return whether no block fits the matrix."""
        if sizes(problem.matrix, problem.device):
            return None
        return f"no block of side {_SIZES} divides the matrix {tuple(problem.matrix.shape)}"

    def multiply(self, matrix: Tensor) -> Multiply:
        """Put a matrix into blocks."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
            candidates = [matrix.to_sparse_bsr((size, size)) for size in sizes(matrix, matrix.device.type)]
        bsr = min(candidates, key=lambda blocks: blocks.values().numel())
        return lambda right: bsr @ right


def sizes(matrix: Tensor, device: str) -> list[int]:
    """Return the sides of blocks that divide a matrix; Triton's products need 16 at least."""
    fitting = [size for size in _SIZES if matrix.shape[0] % size == matrix.shape[1] % size == 0]
    return [size for size in fitting if device == "cpu" or size >= 16]
