"""im2col and a dense product of matrices: MKL on CPUs, cuBLAS on GPUs."""

from __future__ import annotations

from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import FUNCTIONS, Problem


class GEMM(Matrices):
    """The dense product, zeros included."""

    library = "GEMM"
    kind = "dense"
    functions = FUNCTIONS

    def multiply(self, matrix: Tensor) -> Multiply:
        """Return the product with a matrix."""
        return lambda right: matrix @ right

    def gradient(self, problem: Problem) -> Multiply:
        """Return the product of the rows with transposed columns: the gradient of all weights."""
        rows = problem.rows()
        return lambda columns: rows @ columns.t()
