"""im2col and cuSPARSE's product with compressed rows, through CuPy."""

from __future__ import annotations

import importlib.util

import torch
import torch.utils.dlpack
from torch import Tensor

from baselines.operators.matrices import Matrices, Multiply
from baselines.operators.problem import Problem


class CupyxCSR(Matrices):
    """`cupyx.scipy.sparse.csr_matrix @ array`, on torch's stream."""

    library = "cupyx CSR"
    kind = "sparse"
    devices = ("cuda",)

    def obstacle(self, problem: Problem) -> str | None:
        """Return whether CuPy is missing."""
        return None if importlib.util.find_spec("cupyx") else "needs cupy"

    def multiply(self, matrix: Tensor) -> Multiply:
        """Compress a matrix."""
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        csr = csr_matrix(cupy.from_dlpack(matrix.contiguous()))

        def product(right: Tensor) -> Tensor:
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
            with stream:
                return torch.utils.dlpack.from_dlpack(csr @ cupy.from_dlpack(right))

        return product
