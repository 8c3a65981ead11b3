"""Sparse or dense, layer by layer: measured on the machine that compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain import timing
from clicktrain.assignment import Assignment
from clicktrain.deploy.engine import Engine
from clicktrain.deploy.graph import Graph, Node
from clicktrain.deploy.program import build_program
from clicktrain.kernels.cpu import backend

ROUNDS = 9


def choose(graph: Graph, images: int) -> Graph:
    """Return the graph with those convolutions marked dense that torch computes faster, if the whole gains by it.

    A dense layer is charged with unpacking what it reads and packing its result. In the end both graphs are timed
    against each other, since neighbours that are dense, too, spare each other that.
    """
    sparse = _engine(graph, images)
    x = torch.randn(images, *graph.input_shape)
    ms = sparse.times_ms(x, ROUNDS)
    candidates = [number for number, node in graph.nodes.items() if node.op == "conv"]
    dense = [n for n in candidates if _dense_with_repacking_ms(graph, graph.nodes[n], images) < ms[n]]
    if not dense:
        return graph
    mixed = replace(graph, nodes={n: _marked(node) if n in dense else node for n, node in graph.nodes.items()})
    other = _engine(mixed, images)
    contenders = {"sparse": lambda: sparse.run(x), "mixed": lambda: other.run(x)}
    times = timing.compare(contenders, sparse.run(x), rounds=ROUNDS)
    return mixed if times.speedup("sparse", "mixed") > 1 else graph


def dense_ms(graph: Graph, node: Node, images: int, rounds: int = ROUNDS) -> float:
    """Return the median milliseconds of a convolution as torch computes it dense, channels_last."""
    source = graph.nodes[node.inputs[0]].shape
    assert source is not None
    last = torch.channels_last
    x = torch.randn(images, *source).contiguous(memory_format=last)
    weight: Tensor = Assignment(node.tensors["assignment"], node.pool).scatter(node.tensors["values"])
    weight, bias = weight.contiguous(memory_format=last), node.tensors["bias"]
    stride, padding = node.attributes["stride"], node.attributes["padding"]
    return _median_ms(lambda: F.conv2d(x, weight, bias, stride, padding), rounds)


def _dense_with_repacking_ms(graph: Graph, node: Node, images: int) -> float:
    shapes = [graph.nodes[source].shape for source in node.inputs] + [node.shape]
    repacking = sum(_median_ms(partial(backend.pack, x), 3) for x in (torch.empty(images, *s) for s in shapes if s))
    return dense_ms(graph, node, images, 5) + repacking


def _engine(graph: Graph, images: int) -> Engine:
    output = graph.nodes[graph.output].shape
    assert output is not None
    return Engine(build_program(graph, images, tune=True), (images, *output))


def _median_ms(run: Callable[[], object], rounds: int) -> float:
    with torch.inference_mode():
        measured = timing.compare({"it": timing.Contender(run, None)}, None, warmup_seconds=0.005, rounds=rounds)
    return measured["it"].median_ms


def _marked(node: Node) -> Node:
    return replace(node, attributes={**node.attributes, "dense": True})
