"""Dense convolution as torch computes it: oneDNN on CPUs, cuDNN on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from baselines.operators.operator import Operator
from baselines.operators.problem import FUNCTIONS, Problem
from clicktrain.timing import Contender

Variant = Literal["NCHW", "channels_last", "bf16"]

_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last, "bf16": torch.channels_last}


class Dense(Operator):
    """`torch.nn.functional.conv2d` and its backward passes, on a weight with zeros.

    Parameters
    ----------
    variant : {"NCHW", "channels_last", "bf16"}
        float32 in a memory format, or bfloat16 in channels_last.
    """

    kind = "dense"
    functions = FUNCTIONS
    allow_tf32: ClassVar[bool] = False

    def __init__(self, variant: Variant) -> None:
        self.name = f"dense {variant}"
        self.layout = _FORMATS[variant]
        self.dtype = torch.bfloat16 if variant == "bf16" else torch.float32
        self.tolerance = 1.6e-2 if variant == "bf16" else 1e-5

    def obstacle(self, problem: Problem) -> str | None:
        """Return whether bfloat16 would only be emulated."""
        if self.dtype == torch.float32 or problem.device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return "this CPU has no instructions for bfloat16"

    def prepare(self, problem: Problem) -> Contender:
        """Bring the operands into type and memory format; see `Operator.prepare`."""
        x, dy, weight = (
            tensor.to(self.dtype).contiguous(memory_format=self.layout)
            for tensor in (problem.x, problem.dy, problem.weight)
        )
        return Contender(self.in_full(problem, lambda: problem.dense(x, dy, weight)), _result(problem))

    def in_full(self, problem: Problem, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return `run` so that cuDNN chooses its fastest algorithm, without TF32."""
        if problem.device != "cuda":
            return run

        def with_cudnn() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.allow_tf32):
                return run()

        return with_cudnn


def _result(problem: Problem) -> Callable[[object], object]:
    if problem.function == "grad_values":
        return lambda gradient: problem.kept(cast(Tensor, gradient))
    return lambda returned: returned
