"""Fewer, larger operations: normalisations go into weights, additions and ReLUs into what comes before them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from clicktrain.deploy.graph import Graph, Node
from clicktrain.patterns import PRUNED

_WITH_RELU = ("conv", "scale", "linear", "add")


def fuse(graph: Graph) -> Graph:
    """Return an equal graph without what a convolution can do on the way."""
    uses, nodes = graph.uses(), dict[int, Node]()
    place: dict[int, int] = {}  # where the result of a node now is
    for number, given in graph.nodes.items():
        node = replace(given, inputs=tuple(place[source] for source in given.inputs))
        merged = next(
            (
                (source, fused)
                for source, original in zip(node.inputs, given.inputs, strict=True)
                if uses[original] == 1 and (fused := _merge(nodes[source], node, source)) is not None
            ),
            None,
        )
        if merged is None:
            nodes[number] = node
        else:
            del nodes[merged[0]]
            nodes[number] = merged[1]
        place[number] = number
    return replace(graph, nodes=nodes)


def _merge(first: Node, second: Node, number: int) -> Node | None:
    """Return `second` and its operand `first`, the node of that number, as one node; None if there is none."""
    if second.op == "relu" and first.op in _WITH_RELU and not first.relu:
        return replace(first, attributes={**first.attributes, "relu": True})
    if first.op != "conv" or first.relu or len(first.inputs) > 1:
        return None
    if second.op == "scale" and not second.relu:
        return replace(first, tensors=_scaled(first.tensors, second.tensors["scale"], second.tensors["shift"]))
    if second.op == "add" and second.inputs[0] != second.inputs[1]:
        other = second.inputs[1] if second.inputs[0] == number else second.inputs[0]
        return replace(first, inputs=(*first.inputs, other), attributes={**first.attributes, **second.attributes})
    return None


def _scaled(tensors: dict[str, Tensor], scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Put scale * y + shift into the weights of a convolution."""
    filters = (tensors["assignment"] != PRUNED).nonzero()[:, 0]
    return {
        **tensors,
        "values": tensors["values"] * scale[filters, None],
        "bias": tensors["bias"] * scale + shift,
    }
