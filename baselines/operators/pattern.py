"""ClickTrain's kernels, which exploit that kernels keep one pattern of a small pool, or nothing."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from baselines.operators.operator import Operator
from baselines.operators.problem import FUNCTIONS, Problem
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import backends
from clicktrain.kernels.cpu import backend as cpu
from clicktrain.timing import Contender


class Pattern(Operator):
    """The kernels of the device, NCHW to NCHW: on a CPU, packing and unpacking are timed."""

    name = "pattern NCHW"
    kind = "ours"
    functions = FUNCTIONS

    def obstacle(self, problem: Problem) -> str | None:
        """Return why the kernels are not there, or why the mask is none of patterns."""
        if (reason := backends.available()[problem.device]) is not True:
            return reason
        try:
            problem.assignment  # noqa: B018  # raises where the mask is none of patterns
        except InvalidArgument as error:
            return str(error)
        return None

    def prepare(self, problem: Problem) -> Contender:
        """Plan the convolution; see `Operator.prepare`."""
        kernels = backends.BACKENDS[problem.device].kernels()
        x, dy, values, plan = problem.x, problem.dy, problem.values, problem.plan
        match problem.function:
            case "forward":
                return Contender(lambda: kernels.forward(x, values, plan))
            case "grad_input":
                return Contender(lambda: kernels.grad_input(dy, values, plan))
        return Contender(lambda: kernels.grad_values(x, dy, plan), flat)


class BlockedPattern(Pattern):
    """The same on blocked activations, as the layers of a converted network exchange them."""

    name = "pattern blocked"
    devices = ("cpu",)

    def prepare(self, problem: Problem) -> Contender:
        """Plan the convolution and pack the activations; see `Operator.prepare`."""
        values, plan = problem.values, problem.plan
        xb, dyb = cpu.pack(problem.x), cpu.pack(problem.dy)

        def unpacked(blocked: object) -> Tensor:
            return cpu.unpack(cast(Tensor, blocked), len(problem.x))

        match problem.function:
            case "forward":
                return Contender(lambda: cpu.forward_blocked(xb, values, plan), unpacked)
            case "grad_input":
                return Contender(lambda: cpu.grad_input_blocked(dyb, values, plan), unpacked)
        return Contender(lambda: cpu.grad_values_blocked(xb, dyb, plan), flat)


def flat(values: object) -> Tensor:
    """Return gradients (kept_kernels, entries) as one vector."""
    return cast(Tensor, values).flatten()
