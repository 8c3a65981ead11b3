"""What every operator promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from baselines.operators.problem import Function, Problem
from clicktrain.timing import Contender

__all__ = ["Function", "Operator"]


class Operator(ABC):
    """One way to compute a pruned convolution.

    Attributes
    ----------
    name : str
        Unique.
    kind : {"dense", "sparse", "ours"}
        Whether it multiplies by zeros too, is a library's sparse product, or ClickTrain's.
    functions : tuple of str
        What it computes.
    devices : tuple of str
        Types of devices that it computes on.
    tolerance : float
        Largest norm-wise relative error of a right result.
    """

    name: str
    kind: ClassVar[Literal["dense", "sparse", "ours"]]
    functions: ClassVar[tuple[Function, ...]] = ("forward",)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    tolerance: float = 1e-5

    def supports(self, problem: Problem) -> Literal[True] | str:
        """Return True, or why the operator cannot compute a problem here."""
        if problem.function not in self.functions:
            return f"computes {' and '.join(self.functions)}, not {problem.function}"
        if problem.device not in self.devices:
            return f"computes on {' and '.join(self.devices)}, the operands are on {problem.device}"
        return self.obstacle(problem) or True

    def obstacle(self, problem: Problem) -> str | None:
        """Return what else stands in the way on this machine or for this mask, or None."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem) -> Contender:
        """Lay everything out that does not depend on the values of activations; not timed.

        Returns
        -------
        Contender
            Its `run` is timed; its `result` makes out of what that returned, not timed, what `Problem.reference`
            returns: y or dx in NCHW, or the gradients of the kept weights in canonical order.
        """
