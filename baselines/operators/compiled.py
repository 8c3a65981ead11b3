"""Dense convolution through torch.compile, which may lay the weight out anew and choose among libraries."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import nn

from baselines.operators.operator import Operator
from baselines.operators.problem import Problem
from clicktrain.timing import Contender


class CompiledDense(Operator):
    """A compiled `torch.nn.Conv2d` whose weight is frozen into the code, from channels_last to channels_last."""

    name = "dense compiled"
    kind = "dense"

    def obstacle(self, problem: Problem) -> str | None:
        """Return which compiler is missing."""
        if problem.device == "cuda":
            return None if importlib.util.find_spec("triton") else "needs triton"
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"needs a C++ compiler, there is no {compiler}"

    def prepare(self, problem: Problem) -> Contender:
        """Compile, for this shape alone; see `Operator.prepare`."""
        filters, channels, k, _ = problem.weight.shape
        conv = nn.Conv2d(channels, filters, k, problem.stride, problem.padding, bias=False, device=problem.x.device)
        with torch.no_grad():
            conv.weight.copy_(problem.weight)
        conv.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = problem.x.contiguous(memory_format=torch.channels_last)
        torch.compiler.reset()  # it compiles a limited number of variants of one function
        compiled = torch.compile(conv, dynamic=False, options={"freezing": True})
        with torch.inference_mode():
            compiled(x)

        def run() -> object:
            with torch.inference_mode():
                return compiled(x)

        return Contender(run)
