"""From a model to a graph: torch.export gives operators, and the known ones become nodes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain import blocked
from clicktrain.deploy.graph import TORCH, Graph, Node
from clicktrain.errors import UnsupportedModel
from clicktrain.patterns import full_pool

aten = torch.ops.aten


def trace(model: nn.Module, example: Tensor) -> Graph:
    """Trace a model in evaluation mode; the model itself is not changed.

    Raises
    ------
    UnsupportedModel
        If torch.export cannot trace it, or it is none that maps one tensor to one with an entry for each image.
    """
    model = copy.deepcopy(model).cpu().eval()
    blocked.remove(model)
    wrong = {str(t.dtype) for t in model.parameters() if t.dtype != torch.float32}
    if wrong:
        raise UnsupportedModel(f"model: expected parameters of torch.float32, got {', '.join(sorted(wrong))}")
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,)).run_decompositions({})
    except Exception as error:  # torch raises of many kinds, none of them documented
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(f"model: torch.export cannot trace it: {first}") from error
    return _Tracer(program, example).graph()


class _Tracer:
    """Converts the operators of a program one by one."""

    def __init__(self, program: torch.export.ExportedProgram, example: Tensor) -> None:
        self.batch = len(example)
        self.nodes: dict[int, Node] = {0: Node("input", (), tuple(example.shape[1:]))}
        self.numbers: dict[fx.Node, int] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self._program = program

    def graph(self) -> Graph:
        signature, state = self._program.graph_signature, {**self._program.state_dict, **self._program.constants}
        owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        owners |= dict(signature.inputs_to_lifted_tensor_constants)
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                if node.name in owners:
                    self.constants[node] = state[owners[node.name]].detach()
                else:
                    self.numbers[node] = 0
            elif node.op == "call_function":
                self._convert(node)
            elif node.op == "output":
                return self._finish(node.args[0])
            else:
                raise UnsupportedModel(f"model: it contains {node.op} {node.target}")
        raise AssertionError("a program ends with its output")

    def _finish(self, outputs: Sequence[Any]) -> Graph:
        if len(outputs) != 1 or outputs[0] not in self.numbers:
            raise UnsupportedModel(f"model: expected one tensor as the result, got {len(outputs)}")
        output = self.numbers[outputs[0]]
        if self.nodes[output].shape is None:
            raise UnsupportedModel("model: its result is no float32 tensor with an entry for each image")
        return Graph(self.nodes, output, self.batch)

    def _convert(self, node: fx.Node) -> None:
        if getattr(node.target, "__name__", "") == "getitem":
            source, index = node.args
            if index == 0 and self.nodes[self.numbers[source]].op != TORCH:  # type: ignore[index]
                self.numbers[node] = self.numbers[source]  # type: ignore[index]
                return
        if node.all_input_nodes and all(source in self.constants for source in node.all_input_nodes):
            arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda source: self.constants[source])
            self.constants[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
            return
        converter = _CONVERTERS.get(node.target)
        made = converter(self, node, _arguments(node)) if converter is not None and self._all_known(node) else None
        if isinstance(made, int):
            self.numbers[node] = made
        else:
            self._append(node, made if made is not None else self._torch(node))

    def _append(self, node: fx.Node, made: Node) -> None:
        number = len(self.nodes)
        self.nodes[number] = made
        self.numbers[node] = number

    def _all_known(self, node: fx.Node) -> bool:
        """Whether all tensors that the node reads are per image, or constants."""
        return all(
            source in self.constants or self.nodes[self.numbers[source]].shape is not None
            for source in node.all_input_nodes
        )

    def shape_of(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape for one image; None if there is none."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, tuple) and _is_batch_norm(node) else value
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim < 1:
            return None
        return tuple(int(size) for size in value.shape[1:]) if value.shape[0] == self.batch else None

    def constant(self, argument: Any) -> Tensor | None:
        """Return the tensor of a parameter or buffer."""
        return self.constants.get(argument) if isinstance(argument, fx.Node) else None

    def number(self, argument: Any) -> int | None:
        """Return the number of a computed operand."""
        return self.numbers.get(argument) if isinstance(argument, fx.Node) else None

    def _torch(self, node: fx.Node) -> Node:
        """Return the node by which torch computes an operator."""
        inputs: list[int] = []
        tensors: dict[str, Tensor] = {}

        def encoded(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                if argument in self.constants:
                    name = str(len(tensors))
                    tensors[name] = self.constants[argument].clone()
                    return {"tensor": name}
                inputs.append(self.numbers[argument])
                return {"input": len(inputs) - 1}
            if isinstance(argument, (list, tuple)):
                return [encoded(entry) for entry in argument]
            if isinstance(argument, (torch.dtype, torch.memory_format, torch.layout)):
                return {"torch": str(argument).removeprefix("torch.")}
            if argument is None or isinstance(argument, (bool, int, float, str)):
                return argument
            raise UnsupportedModel(f"model: operator {node.target} has an argument of type {type(argument).__name__}")

        arguments = [encoded(argument) for argument in node.args]
        keywords = {key: encoded(argument) for key, argument in node.kwargs.items() if key != "device"}
        name = "getitem" if getattr(node.target, "__name__", "") == "getitem" else str(node.target)
        attributes = {"target": name, "arguments": arguments, "keywords": keywords}
        return Node(TORCH, tuple(inputs), self.shape_of(node), attributes, tensors)


Arguments = dict[str, Any]
Converter = Callable[[_Tracer, fx.Node, Arguments], "Node | int | None"]


def _arguments(node: fx.Node) -> Arguments:
    """Return an operator's arguments by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _is_batch_norm(node: fx.Node) -> bool:
    return node.target is aten._native_batch_norm_legit_no_training.default


def _pair(value: Sequence[int] | int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(values[0]), int(values[-1])]


# Each converter returns a node, the number of the node that is the result already, or None: torch computes it.


def _conv(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    weight, bias, x, shape = t.constant(a["weight"]), t.constant(a["bias"]), t.number(a["input"]), t.shape_of(node)
    if weight is None or x is None or shape is None or weight.ndim != 4 or (a["bias"] is not None and bias is None):
        return None
    filters, channels, k, k2 = weight.shape
    if k != k2 or a["groups"] != 1 or set(_pair(a["dilation"])) != {1}:
        return None
    tensors = {
        "values": weight.reshape(filters * channels, k * k).clone(),
        "assignment": torch.zeros(filters, channels, dtype=torch.uint8),
        "masks": full_pool(k).masks(),
        "bias": torch.zeros(filters) if bias is None else bias.clone(),
    }
    return Node("conv", (x,), shape, {"stride": _pair(a["stride"]), "padding": _pair(a["padding"])}, tensors)


def _pattern_conv(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    values, assignment, masks = (t.constant(a[name]) for name in ("values", "assignment", "pool"))
    x, shape = t.number(a["x"]), t.shape_of(node)
    if values is None or assignment is None or masks is None or x is None or shape is None:
        return None
    tensors = {
        "values": values.clone(),
        "assignment": assignment.clone(),
        "masks": masks.clone(),
        "bias": torch.zeros(len(assignment)),
    }
    return Node("conv", (x,), shape, {"stride": _pair(a["stride"]), "padding": _pair(a["padding"])}, tensors)


def _batch_norm(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    x, shape = t.number(a["input"]), t.shape_of(node)
    mean, var = t.constant(a["running_mean"]), t.constant(a["running_var"])
    if x is None or shape is None or len(shape) != 3 or mean is None or var is None:
        return None
    scale = (var.double() + a["eps"]).rsqrt()
    weight, bias = t.constant(a["weight"]), t.constant(a["bias"])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return Node("scale", (x,), shape, {}, {"scale": scale.float(), "shift": shift.float()})


def _relu(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    x, shape = t.number(a["self"]), t.shape_of(node)
    return None if x is None or shape is None else Node("relu", (x,), shape)


def _add(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    x, y, shape = t.number(a["self"]), t.number(a["other"]), t.shape_of(node)
    if a["alpha"] != 1 or shape is None:
        return None
    if x is None or y is None:
        return _by_channel(t, node, a, multiply=False)
    return Node("add", (x, y), shape) if t.nodes[x].shape == t.nodes[y].shape == shape else None


def _mul(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    return _by_channel(t, node, a, multiply=True)


def _by_channel(t: _Tracer, node: fx.Node, a: Arguments, multiply: bool) -> Node | None:
    """Add a constant for each channel, or multiply by it."""
    shape = t.shape_of(node)
    for one, two in (("self", "other"), ("other", "self")):
        x, constant = t.number(a[one]), t.constant(a[two])
        if x is None or constant is None or shape is None or len(shape) != 3 or t.nodes[x].shape != shape:
            continue
        if constant.dtype == torch.float32 and constant.shape[-3:] == (shape[0], 1, 1) and constant.numel() == shape[0]:
            flat, rest = constant.flatten().clone(), torch.zeros(shape[0])
            return Node("scale", (x,), shape, {}, {"scale": flat, "shift": rest} if multiply else
                        {"scale": rest + 1, "shift": flat})  # fmt: skip
    return None


def _max_pool(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    if a["ceil_mode"] or set(_pair(a["dilation"])) != {1}:
        return None
    return _pool(t, node, a, average=False)


def _avg_pool(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    padded = any(_pair(a["padding"])) and not a["count_include_pad"]
    if a["ceil_mode"] or padded or a["divisor_override"] is not None:
        return None
    return _pool(t, node, a, average=True)


def _pool(t: _Tracer, node: fx.Node, a: Arguments, average: bool) -> Node | None:
    x, shape = t.number(a["self"]), t.shape_of(node)
    if x is None or shape is None or len(shape) != 3:
        return None
    size = _pair(a["kernel_size"])
    geometry = {"size": size, "stride": _pair(a["stride"] or size), "padding": _pair(a["padding"])}
    return Node("pool", (x,), shape, {**geometry, "average": average})


def _adaptive_pool(t: _Tracer, node: fx.Node, a: Arguments) -> Node | int | None:
    x, shape = t.number(a["self"]), t.shape_of(node)
    if x is None or shape is None or len(shape) != 3:
        return None
    if t.nodes[x].shape == shape:
        return x
    return Node("mean" if shape[1:] == (1, 1) else "adaptive_pool", (x,), shape)


def _mean(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    x, shape = t.number(a["self"]), t.shape_of(node)
    given = None if x is None else t.nodes[x].shape
    if x is None or given is None or len(given) != 3 or shape is None or a["dtype"] is not None:
        return None
    return Node("mean", (x,), shape) if {d % 4 for d in a["dim"] or ()} == {2, 3} else None


def _linear(t: _Tracer, node: fx.Node, a: Arguments) -> Node | None:
    x, shape = t.number(a["input"]), t.shape_of(node)
    weight, bias = t.constant(a["weight"]), t.constant(a["bias"])
    if x is None or shape is None or len(shape) != 1 or weight is None or (a["bias"] is not None and bias is None):
        return None
    return Node(
        "linear", (x,), shape, {},
        {"weight": weight.clone(), "bias": torch.zeros(len(weight)) if bias is None else bias.clone()},
    )  # fmt: skip


def _same(t: _Tracer, node: fx.Node, a: Arguments) -> int | None:
    x, shape = t.number(next(iter(a.values()))), t.shape_of(node)
    return x if x is not None and shape is not None and t.nodes[x].shape == shape else None


def _reshape(t: _Tracer, node: fx.Node, a: Arguments) -> Node | int | None:
    """Row-major memory stays as it is, and so does its cut into images."""
    x, shape = t.number(next(iter(a.values()))), t.shape_of(node)
    given = None if x is None else t.nodes[x].shape
    if x is None or shape is None or given is None or math.prod(shape) != math.prod(given):
        return None
    return x if shape == given else Node("reshape", (x,), shape)


def _dropout(t: _Tracer, node: fx.Node, a: Arguments) -> int | None:
    return None if a["train"] else _same(t, node, a)


_CONVERTERS: dict[Any, Converter] = {
    aten.conv2d.default: _conv,
    torch.ops.clicktrain.pattern_conv2d.default: _pattern_conv,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.relu.default: _relu,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.mean.dim: _mean,
    aten.linear.default: _linear,
    aten.dropout.default: _dropout,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _reshape,
}
