"""The network between tracing and running: a list of operations on batches of images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clicktrain.patterns import PatternPool

TORCH = "torch"
"""The operation that stands for whatever has no kernel here: torch computes it."""


@dataclass(frozen=True, eq=False)
class Node:
    """An operation.

    Attributes
    ----------
    op : str
        input, conv, scale, pool, mean, adaptive_pool, linear, add, relu, reshape, or torch.
    inputs : tuple of int
        Numbers of the nodes that it reads; a convolution's second one is what is added to its result.
    shape : tuple of int or None
        Shape of the result for one image. None: it is no float32 tensor with one entry an image, so only
        torch can read it.
    attributes : dict
        Plain data (what JSON can hold).
    tensors : dict
        Constants.
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def relu(self) -> bool:
        """Whether a ReLU follows."""
        return bool(self.attributes.get("relu"))

    @property
    def is_dense(self) -> bool:
        """Whether torch computes this convolution, dense, because that was measured to be faster."""
        return bool(self.attributes.get("dense"))

    @property
    def halves(self) -> bool:
        """Whether this is a maximum over 2 x 2, which a convolution may take on the way."""
        if self.op != "pool" or self.attributes["average"]:
            return False
        window = [tuple(self.attributes[key]) for key in ("size", "stride", "padding")]
        return window == [(2, 2), (2, 2), (0, 0)]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        assert self.shape is not None
        return self.shape[1], self.shape[2]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        if self.op == "linear":
            return self.tensors["weight"].numel()
        return self.tensors["values"].numel() * self.size[0] * self.size[1] if self.op == "conv" else 0

    @property
    def pool(self) -> PatternPool:
        """Patterns of a convolution."""
        return PatternPool.from_masks(self.tensors["masks"].numpy())


@dataclass(frozen=True, eq=False)
class Graph:
    """A network.

    Attributes
    ----------
    nodes : dict
        Number -> Node, each after those that it reads; number 0 is the input.
    output : int
        Number of the node that is the result.
    batch : int
        Images of the batch that it was traced with.
    """

    nodes: dict[int, Node]
    output: int
    batch: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        shape = self.nodes[0].shape
        assert shape is not None
        return shape

    @property
    def fallbacks(self) -> list[str]:
        """The operators that torch computes."""
        return [node.attributes["target"] for node in self.nodes.values() if node.op == TORCH]

    def uses(self) -> Counter[int]:
        """Count how often each node is read; the result is read once by the caller."""
        return Counter([self.output, *(source for node in self.nodes.values() for source in node.inputs)])
