"""Dense convolution in TF32, which GPUs from Ampere on compute float32 with."""

from __future__ import annotations

import torch

from baselines.operators.dense import Dense
from baselines.operators.problem import Problem

_AMPERE = (8, 0)


class TF32(Dense):
    """cuDNN with ten bits of mantissa in the products."""

    devices = ("cuda",)
    allow_tf32 = True

    def __init__(self) -> None:
        super().__init__("NCHW")
        self.name = "dense TF32"
        self.tolerance = 2e-3

    def obstacle(self, problem: Problem) -> str | None:
        """Return whether the GPU is too old."""
        capability = torch.cuda.get_device_capability()
        return None if capability >= _AMPERE else f"needs compute capability 8.0, this GPU has {capability}"
