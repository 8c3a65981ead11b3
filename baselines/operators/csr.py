"""im2col and a product with a sparse matrix in compressed rows, through torch: MKL on CPUs, cuSPARSE on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import FUNCTIONS, Problem


class CSR(Matrices):
    """SpMM, and sampled dense-dense products for the gradient of the weight."""

    library = "CSR"
    kind = "sparse"
    functions = FUNCTIONS

    def multiply(self, matrix: Tensor) -> Multiply:
        """Compress a matrix."""
        csr = matrix.to_sparse_csr()
        return lambda right: csr @ right

    def gradient(self, problem: Problem) -> Multiply:
        """Return the product of the rows with transposed columns at the kept places, compressed."""
        rows, places = problem.rows(), problem.mask.flatten(1).to(problem.weight.dtype).to_sparse_csr()
        return lambda columns: torch.sparse.sampled_addmm(places, rows, columns.t(), beta=0.0)

    def kept(self, problem: Problem, gradient: Tensor) -> Tensor:
        """Return the values: they are in canonical order already."""
        return gradient.values()
