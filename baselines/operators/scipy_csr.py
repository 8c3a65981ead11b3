"""im2col and scipy's product with compressed rows: one thread and plain loops, the naive reference."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import Problem


class ScipyCSR(Matrices):
    """`scipy.sparse.csr_matrix @ array`."""

    library = "scipy CSR"
    kind = "sparse"
    devices = ("cpu",)

    def obstacle(self, problem: Problem) -> str | None:
        """Return whether scipy is missing."""
        return None if importlib.util.find_spec("scipy") else "needs scipy"

    def multiply(self, matrix: Tensor) -> Multiply:
        """Compress a matrix."""
        from scipy.sparse import csr_matrix

        csr = csr_matrix(matrix.numpy())
        return lambda right: torch.from_numpy(csr @ right.numpy())
