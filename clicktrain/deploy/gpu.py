"""Runs a graph on a GPU: the CUDA kernels with their epilogues, torch for the rest, recorded once as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain import timing
from clicktrain.assignment import Assignment
from clicktrain.deploy.engine import apply
from clicktrain.deploy.graph import Graph, Node
from clicktrain.kernels.cuda import backend
from clicktrain.kernels.cuda.epilogue import Epilogue
from clicktrain.kernels.cuda.launch import compile_ahead
from clicktrain.kernels.plan import Plan, plan

ROUNDS = 9
_OF_PLANS = ("assignment", "masks")
Operation = Callable[..., Tensor]


class GpuEngine:
    """A graph on a device, ready to run.

    Parameters
    ----------
    graph : Graph
        Fused.
    images : int
        Of a batch.
    device : torch.device
        Where it runs. Not on "cuda" (tests) nothing is recorded.
    tune : bool
        Whether to measure how each convolution is cut up best.
    """

    def __init__(self, graph: Graph, images: int, device: torch.device, tune: bool = False) -> None:
        self._graph, self._shape, self._device = graph, (images, *graph.input_shape), device
        _make_ready(graph, images, device, tune)
        nodes = {number: _on(node, device) for number, node in graph.nodes.items()}
        self._operations = {number: _operation(node, graph, images) for number, node in nodes.items()}
        self._last_use = {source: number for number, node in graph.nodes.items() for source in node.inputs}
        self._idle: list[_Recording] = []  # append and pop are atomic
        self._recording = threading.Lock()

    def run(self, x: Tensor) -> Tensor:
        """Return the result for a contiguous batch of exactly the size that it was made for."""
        if x.device.type != "cuda":
            return self.compute(x)
        with torch.inference_mode(False):  # a recording's memory serves callers in any mode
            return self._replay(x)

    @torch.no_grad()
    def _replay(self, x: Tensor) -> Tensor:
        try:
            recording = self._idle.pop()
        except IndexError:
            with self._recording, torch.cuda.device(x.device):
                recording = _Recording(self.compute, x)
        try:
            return recording.run(x)
        finally:
            self._idle.append(recording)

    @torch.no_grad()
    def compute(self, x: Tensor) -> Tensor:
        """Compute operation after operation; a result goes when the last one that reads it is done."""
        found = {0: x}
        for number, node in self._graph.nodes.items():
            if node.op == "input":
                continue
            found[number] = self._operations[number](*(found[source] for source in node.inputs))
            for source in set(node.inputs):
                if self._last_use[source] == number and source != self._graph.output:
                    del found[source]
        return found[self._graph.output].contiguous()


class _Recording:
    """A CUDA graph with memory of its own, for one caller at a time."""

    def __init__(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x, self._graph = x.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first run loads, chooses and allocates cannot be recorded
            compute(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = compute(self._x)
        self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, x: Tensor) -> Tensor:
        """Return the result on the current stream; the caller before may have had another one."""
        self._free.wait()
        self._x.copy_(x)
        self._graph.replay()
        y = self._y.clone()
        self._free.record()
        return y


def choose(graph: Graph, images: int, device: torch.device) -> Graph:
    """Return the graph with those convolutions marked dense that torch computes faster on the device."""
    _make_ready(graph, images, device, tune=True)
    nodes = dict(graph.nodes)
    for number, node in graph.nodes.items():
        if node.op == "conv":
            dense = replace(node, attributes={**node.attributes, "dense": True})
            on_device = [_on(candidate, device) for candidate in (node, dense)]
            runs = [_operation(candidate, graph, images) for candidate in on_device]
            operands = [torch.randn(images, *_shape(graph.nodes[source]), device=device) for source in node.inputs]
            if _faster(*(partial(run, *operands) for run in runs)):
                nodes[number] = dense
    return replace(graph, nodes=nodes)


def _faster(sparse: Callable[[], Tensor], dense: Callable[[], Tensor]) -> bool:
    """Return whether the second is faster."""
    with torch.no_grad():
        contenders = {"sparse": timing.Contender(sparse, None), "dense": timing.Contender(dense, None)}
        times = timing.compare(contenders, None, warmup_seconds=0.005, rounds=ROUNDS, device="cuda")
    return times.speedup("sparse", "dense") > 1


def _operation(node: Node, graph: Graph, images: int) -> Operation:
    """Return what computes a node from its operands."""
    if node.op == "input":
        return lambda x: x
    if node.op == "conv" and not node.is_dense:
        return _convolution(node, _plan(node, graph, images))
    if node.op in _OPERATIONS:
        return partial(_OPERATIONS[node.op], node)
    return lambda *operands: apply(node, list(operands))


def _plan(node: Node, graph: Graph, images: int) -> Plan:
    stride, padding = (tuple(node.attributes[key]) for key in ("stride", "padding"))
    shape = (images, *_shape(graph.nodes[node.inputs[0]]))
    return plan(node.tensors["assignment"], node.pool, shape, stride, padding)


def _make_ready(graph: Graph, images: int, device: torch.device, tune: bool) -> None:
    """Compile the kernels of all sparse convolutions at once, and measure in which way each is fastest if `tune`."""
    if device.type != "cuda":
        return
    sparse = [node for node in graph.nodes.values() if node.op == "conv" and not node.is_dense]
    plans = [_plan(node, graph, images) for node in sparse]
    if tune:
        backend.tune(plans, functions=("forward",), fused=True)
    else:
        compile_ahead(
            text for made in plans for text in backend.units(made, candidates=1, functions=("forward",), fused=True)
        )


def _convolution(node: Node, made: Plan) -> Operation:
    values, bias = node.tensors["values"].contiguous(), node.tensors["bias"].contiguous()

    def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = None if residual is None else residual.contiguous()
        return backend.forward_fused(x, values, made, Epilogue(None, bias, residual, node.relu))

    return convolve


def _on(node: Node, device: torch.device) -> Node:
    """Return a node with its constants on the device, except what plans are made from; dense ones have a weight."""
    tensors = node.tensors
    if node.is_dense:
        weight = Assignment(tensors["assignment"], node.pool).scatter(tensors["values"])
        tensors = {"weight": weight, "bias": tensors["bias"]}
    return replace(node, tensors={name: t if name in _OF_PLANS else t.to(device) for name, t in tensors.items()})


def _shape(node: Node) -> tuple[int, ...]:
    assert node.shape is not None
    return node.shape


def _rectified(node: Node, y: Tensor) -> Tensor:
    return y.relu() if node.relu or node.op == "relu" else y


def _scale(node: Node, x: Tensor) -> Tensor:
    return _rectified(node, x * node.tensors["scale"][:, None, None] + node.tensors["shift"][:, None, None])


def _pool(node: Node, x: Tensor) -> Tensor:
    compute = F.avg_pool2d if node.attributes["average"] else F.max_pool2d
    return compute(x, node.attributes["size"], node.attributes["stride"], node.attributes["padding"])


def _mean(node: Node, x: Tensor) -> Tensor:
    return x.mean((2, 3)).view(len(x), *_shape(node))


def _adaptive_pool(node: Node, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, node.size)


def _linear(node: Node, x: Tensor) -> Tensor:
    return _rectified(node, F.linear(x, node.tensors["weight"], node.tensors["bias"]))


def _add(node: Node, x: Tensor, other: Tensor) -> Tensor:
    return _rectified(node, x + other)


def _reshape(node: Node, x: Tensor) -> Tensor:
    return x.reshape(len(x), *_shape(node))


_OPERATIONS: dict[str, Operation] = {
    "scale": _scale, "pool": _pool, "mean": _mean, "adaptive_pool": _adaptive_pool, "linear": _linear, "add": _add,
    "relu": _rectified, "reshape": _reshape,
}  # fmt: skip
