"""Whether a graph holds together: compiled code trusts shapes, so nothing that came from a file may run unchecked."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clicktrain.deploy.graph import TORCH, Graph, Node
from clicktrain.kernels.plan import output_size
from clicktrain.patterns import PRUNED

Shape = tuple[int, ...]


def check(graph: Graph) -> None:
    """Raise ValueError, naming the node, if a shape, an attribute or a constant does not fit the others."""
    for number, node in graph.nodes.items():
        sources = [graph.nodes[source].shape for source in node.inputs]
        if node.op == TORCH:
            continue
        known = [shape for shape in sources if shape is not None]
        if node.shape is None or len(known) != len(sources) or not all(_is_shape(s) for s in [node.shape, *known]):
            raise ValueError(f"node {number}: shape {node.shape} from {sources}")
        if not _CHECKS[node.op](node, known):
            raise ValueError(f"node {number}: {node.op} of shape {node.shape} from {sources} does not fit together")


def _is_shape(shape: Shape) -> bool:
    return all(isinstance(size, int) and 0 < size < 1 << 31 for size in shape)


def _is(tensor: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> bool:
    return tensor.dtype == dtype and tuple(tensor.shape) == shape


def _pair(node: Node, name: str, least: int) -> tuple[int, int]:
    first, second = node.attributes[name]
    if not all(isinstance(value, int) and least <= value < 1 << 16 for value in (first, second)):
        raise ValueError(f"{name} {first}, {second}")
    return first, second


def _input(node: Node, sources: list[Shape]) -> bool:
    return not sources


def _conv(node: Node, sources: list[Shape]) -> bool:
    t, (source, *residual), shape = node.tensors, sources, node.shape
    assert shape is not None
    masks = t["masks"]
    if len(source) != 3 or len(shape) != 3 or residual not in ([], [shape]):
        return False
    patterns, k, _ = masks.shape
    size = output_size((source[1], source[2]), k, _pair(node, "stride", 1), _pair(node, "padding", 0))
    index, entries = t["assignment"], node.pool.entries
    return (
        size == shape[1:]
        and _is(masks, patterns, k, k, dtype=torch.bool)
        and _is(index, shape[0], source[0], dtype=torch.uint8)
        and bool(((index < patterns) | (index == PRUNED)).all())
        and _is(t["values"], int((index != PRUNED).sum()), entries)
        and _is(t["bias"], shape[0])
    )


def _scale(node: Node, sources: list[Shape]) -> bool:
    shape = node.shape or ()
    channels = shape[0] if len(shape) == 3 else -1
    return sources == [shape] and _is(node.tensors["scale"], channels) and _is(node.tensors["shift"], channels)


def _pool(node: Node, sources: list[Shape]) -> bool:
    (source,) = sources
    window, stride, padding = _pair(node, "size", 1), _pair(node, "stride", 1), _pair(node, "padding", 0)
    if len(source) != 3 or not isinstance(node.attributes["average"], bool):
        return False
    if any(2 * p > k for k, p in zip(window, padding, strict=True)):
        return False
    out = tuple(
        output_size((size, size), k, (s, s), (p, p))[0]
        for size, k, s, p in zip(source[1:], window, stride, padding, strict=True)
    )
    return node.shape == (source[0], *out)


def _mean(node: Node, sources: list[Shape]) -> bool:
    (source,) = sources
    return len(source) == 3 and node.shape in ((source[0],), (source[0], 1, 1))


def _adaptive_pool(node: Node, sources: list[Shape]) -> bool:
    (source,), shape = sources, node.shape or ()
    return len(source) == len(shape) == 3 and source[0] == shape[0]


def _linear(node: Node, sources: list[Shape]) -> bool:
    (source,), shape = sources, node.shape or ()
    if len(source) != 1 or len(shape) != 1:
        return False
    return _is(node.tensors["weight"], shape[0], source[0]) and _is(node.tensors["bias"], shape[0])


def _add(node: Node, sources: list[Shape]) -> bool:
    return sources == [node.shape] * 2


def _relu(node: Node, sources: list[Shape]) -> bool:
    return sources == [node.shape]


def _reshape(node: Node, sources: list[Shape]) -> bool:
    (source,) = sources
    return math.prod(source) == math.prod(node.shape or ())


_CHECKS: dict[str, Callable[[Node, list[Shape]], bool]] = {
    "input": _input,
    "conv": _conv,
    "scale": _scale,
    "pool": _pool,
    "mean": _mean,
    "adaptive_pool": _adaptive_pool,
    "linear": _linear,
    "add": _add,
    "relu": _relu,
    "reshape": _reshape,
}
OPERATIONS = (*_CHECKS, TORCH)
