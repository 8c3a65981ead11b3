"""Convolution as a product of matrices, the weight and the im2col columns: what libraries of matrices offer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

from torch import Tensor

from baselines.operators.operator import Operator
from baselines.operators.problem import Problem
from clicktrain.timing import Contender

Timed = Literal["all", "product"]
Multiply = Callable[[Tensor], Tensor]
"""From one tensor to another: the matrix on the right, and the product."""


class Matrices(Operator):
    """A product of matrices; a subclass says which.

    Results stay in the order of the product (channels, images, pixels): nothing is timed for putting images first.

    Parameters
    ----------
    timed : {"all", "product"}
        Whether im2col (col2im for the input gradient) is timed as well, or columns are given: the second favours the
        library, for no network has its activations so.
    """

    library: str

    def __init__(self, timed: Timed) -> None:
        self.timed = timed
        self.name = self.library + (" im2col" if timed == "all" else " product")

    @abstractmethod
    def multiply(self, matrix: Tensor) -> Multiply:
        """Lay out a matrix with zeros, and return the product with it."""

    def prepare(self, problem: Problem) -> Contender:
        """Lay out the weight, its transpose, or where its gradient is wanted; see `Operator.prepare`."""
        operand = problem.columns
        after: Multiply = _as_it_is
        result: Multiply = _as_it_is
        match problem.function:
            case "forward":
                product, after = self.multiply(problem.matrix), problem.as_images
            case "grad_input":
                product, operand, after = self.multiply(problem.matrix.t()), problem.rows, problem.folded
            case "grad_values":
                product, result = self.gradient(problem), partial(self.kept, problem)
        if self.timed == "all":
            return Contender(lambda: after(product(operand())), lambda returned: result(cast(Tensor, returned)))
        given = operand().contiguous()
        return Contender(lambda: product(given), lambda returned: result(after(cast(Tensor, returned))))

    def gradient(self, problem: Problem) -> Multiply:
        """Return the function from columns to the gradient of the weight."""
        raise NotImplementedError(f"{self.name} does not list grad_values among its functions")

    def kept(self, problem: Problem, gradient: Tensor) -> Tensor:
        """Return the kept entries of what `gradient` made; never timed."""
        return problem.kept(gradient.view(problem.weight.shape))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
