"""The file of a compiled model: safetensors, with everything but tensors as JSON in its header.

Kept values are stored as they are, the patterns of kernels in as few bits as the pool needs. Nothing in the file is
code: operators that torch computes are named, and only those of ATen that work on tensors are accepted. A SHA-256 over
all of it is verified before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.deploy.engine import resolve
from clicktrain.deploy.graph import TORCH, Graph, Node
from clicktrain.deploy.validation import OPERATIONS, check
from clicktrain.errors import ModelFileError
from clicktrain.files import write_atomic
from clicktrain.kernels.cpu.tiles import Choice
from clicktrain.kernels.cpu.tuning import export_choices, import_choices
from clicktrain.patterns import PRUNED

FORMAT, VERSION = "clicktrain-compiled", 1

_KEY = "clicktrain"


def write(path: Path, graph: Graph, batch: int, choices: Mapping[str, Choice], device: str) -> None:
    """Write a graph, the batch and device that it is made for, and how its convolutions are cut up for that."""
    from safetensors.torch import save

    tensors = {f"{number}.{name}": t for number, node in graph.nodes.items() for name, t in _packed(node).items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "batch": batch,
        "device": device,
        "traced_batch": graph.batch,
        "output": graph.output,
        "choices": {key: asdict(choice) for key, choice in sorted(choices.items())},
        "nodes": [
            {"number": number, "op": node.op, "inputs": node.inputs, "shape": node.shape, "attributes": node.attributes}
            for number, node in graph.nodes.items()
        ],
    }
    text = json.dumps(header, separators=(",", ":"))
    write_atomic(path, save(tensors, {_KEY: text, "sha256": _digest(text, tensors)}))


def read(path: Path, device: str) -> tuple[Graph, int]:
    """Return a graph for a device and the batch it was saved with; raises ModelFileError.

    Its choices become those of this process, unless it has chosen for such layers already.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise ModelFileError(f"{path}: not a compiled model (a safetensors file without its header)")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelFileError(f"{path}: damaged, or not a compiled model: {error}") from error
    header = _header(path, metadata[_KEY])
    if metadata.get("sha256") != _digest(metadata[_KEY], tensors):
        raise ModelFileError(f"{path}: damaged: the content does not have the checksum that it was written with")
    try:
        graph, batch = _graph(header, tensors), int(header["batch"])
        if header.get("device", "cpu") != device:
            graph = replace(graph, nodes={number: _undecided(node) for number, node in graph.nodes.items()})
        known = export_choices()
        import_choices({key: choice for key, choice in header["choices"].items() if key not in known})
        if batch < 1:
            raise ValueError(f"batch {batch}")
        return graph, batch
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise ModelFileError(f"{path}: its content makes no model: {error}") from error


def _undecided(node: Node) -> Node:
    """Forget that a convolution is faster dense: that was measured elsewhere."""
    return replace(node, attributes={key: value for key, value in node.attributes.items() if key != "dense"})


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ModelFileError(f"{path}: damaged: its header is no JSON") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ModelFileError(f"{path}: not a compiled model")
    if header.get("version") != VERSION:
        raise ModelFileError(
            f"{path}: version {header.get('version')} of the format; this program reads version {VERSION}"
        )
    return header


def _graph(header: dict[str, Any], tensors: dict[str, Tensor]) -> Graph:
    nodes: dict[int, Node] = {}
    for entry in header["nodes"]:
        number, op, inputs, shape = (entry[key] for key in ("number", "op", "inputs", "shape"))
        if op not in OPERATIONS or any(source not in nodes for source in inputs):
            raise ValueError(f"node {number}: operation {op!r} on {inputs}")
        own = {
            name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(number)
        }
        attributes = entry["attributes"]
        if op == TORCH:
            _check_operator(attributes["target"])
        nodes[number] = Node(op, tuple(inputs), None if shape is None else tuple(shape), attributes, own)
        if op == "conv":
            nodes[number] = _unpacked(nodes[number], nodes[inputs[0]])
    if header["output"] not in nodes or nodes[0].op != "input":
        raise ValueError("no input or no output")
    graph = Graph(nodes, header["output"], int(header["traced_batch"]))
    check(graph)
    return graph


def _check_operator(target: str) -> None:
    """Refuse what is no pure function of tensors: a file must not be able to do more than compute."""
    if target == "getitem":
        return
    if not target.startswith("aten."):
        raise ValueError(f"operator {target}: expected one of ATen")
    schema = resolve(target)._schema
    if schema.is_mutable or not schema.arguments or "Tensor" not in str(schema.arguments[0].type):
        raise ValueError(f"operator {target}: expected a pure function of tensors")


def _packed(node: Node) -> dict[str, Tensor]:
    """Return the tensors of a node as they are stored."""
    if node.op != "conv":
        return node.tensors
    patterns = len(node.tensors["masks"])
    index = node.tensors["assignment"].numpy()
    bits = _bits(patterns)
    codes = np.where(index == PRUNED, patterns, index).astype(np.uint8).reshape(-1, 1)
    packed = np.packbits(np.unpackbits(codes, axis=1)[:, 8 - bits :])
    return {**node.tensors, "assignment": torch.from_numpy(packed)}


def _unpacked(node: Node, source: Node) -> Node:
    """Undo `_packed`."""
    assert node.shape is not None
    assert source.shape is not None
    filters, channels = node.shape[0], source.shape[0]
    patterns = len(node.tensors["masks"])
    bits, kernels = _bits(patterns), filters * channels
    packed = node.tensors["assignment"].numpy()
    if len(packed) != math.ceil(kernels * bits / 8):
        raise ValueError(f"assignment of {len(packed)} bytes for {kernels} kernels")
    index = torch.from_numpy(_codes(packed, bits, patterns)[:kernels].reshape(filters, channels))
    return Node(node.op, node.inputs, node.shape, node.attributes, {**node.tensors, "assignment": index})


def _codes(packed: NDArray[np.uint8], bits: int, patterns: int) -> NDArray[np.uint8]:
    """Return the codes in packed bytes, of so many bits each, with that of removal as `PRUNED`; some too many."""
    groups = -(-len(packed) // bits)  # of eight codes, which fill whole bytes
    data = np.zeros((groups, bits), np.uint8)
    data.reshape(-1)[: len(packed)] = packed
    words: NDArray[Any] = np.zeros(groups, np.uint32 if bits <= 4 else np.uint64)
    for byte in data.T:
        words = words << 8 | byte
    codes = np.empty((groups, 8), np.uint8)
    for place in range(8):
        codes[:, place] = words >> bits * (7 - place) & (1 << bits) - 1
    codes[codes == patterns] = PRUNED
    return codes.reshape(-1)


def _bits(patterns: int) -> int:
    """Return the bits that tell the patterns and removal apart."""
    return patterns.bit_length()


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().view(-1).numpy().data if tensor.numel() else b"")
    return content.hexdigest()
