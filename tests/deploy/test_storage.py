"""The file of a compiled model: identical after a round trip, small, and refused where it is not whole and ours."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import clicktrain
from clicktrain import deploy, models
from clicktrain.assignment import assign
from clicktrain.deploy import storage
from clicktrain.deploy.compiled import CompiledModel
from clicktrain.errors import InvalidArgument, ModelFileError
from clicktrain.kernels.cpu import library, tuning
from tests.deploy.models import error, prune, pruned
from tests.deploy.test_compile import Mixed

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


@pytest.fixture(scope="module")
def small() -> CompiledModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU()
    )
    prune(model, 0.5)
    return deploy.compile(model, torch.zeros(2, 3, 9, 8))


@pytest.mark.parametrize("name", ["vgg11", "resnet50"])
def test_a_round_trip_changes_no_bit(name: str, tmp_path: Path) -> None:
    compiled = deploy.compile(pruned(name, width=0.1), torch.empty(8, 3, 32, 32))
    compiled.save(tmp_path / "model")
    loaded = deploy.load(tmp_path / "model")
    x = torch.randn(8, 3, 32, 32)
    assert loaded.batch == 8
    assert torch.equal(loaded(x), compiled(x))
    assert deploy.load(tmp_path / "model", batch=3)(x[:5]).shape == (5, 10)


def test_how_convolutions_are_cut_up_comes_back(small: CompiledModel, tmp_path: Path) -> None:
    small.save(tmp_path / "model")
    choices = small.engine.program.choices
    assert len(choices) == 2
    changed = {key: replace(choice, group=choice.group + 1) for key, choice in choices.items()}

    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["choices"] = {key: asdict(choice) for key, choice in changed.items()}

    rewritten(tmp_path / "model", change)
    assert deploy.load(tmp_path / "model").engine.program.choices == choices, "this process has chosen already"
    tuning.forget()
    assert deploy.load(tmp_path / "model").engine.program.choices == changed


def test_dense_layers_stay_dense(small: CompiledModel, tmp_path: Path) -> None:
    nodes = {n: replace(node, attributes={**node.attributes, "dense": True}) if node.op == "conv" else node
             for n, node in small.graph.nodes.items()}  # fmt: skip
    dense = CompiledModel(replace(small.graph, nodes=nodes), 2)
    assert dense.fallbacks == []
    dense.save(tmp_path / "model")
    loaded, x = deploy.load(tmp_path / "model"), torch.randn(2, 3, 9, 8)
    assert all(node.is_dense for node in loaded.graph.nodes.values() if node.op == "conv")
    assert torch.equal(loaded(x), dense(x))
    assert error(loaded(x), small(x)) < 1e-5


def test_operators_of_torch_come_back_too(tmp_path: Path) -> None:
    compiled = deploy.compile(Mixed(), torch.randn(4, 3, 9, 7))
    compiled.save(tmp_path / "model")
    loaded = deploy.load(tmp_path / "model")
    x = torch.randn(4, 3, 9, 7)
    assert loaded.fallbacks == compiled.fallbacks
    assert torch.equal(loaded(x), compiled(x))
    with pytest.raises(InvalidArgument, match="traced for 4 images"):
        deploy.load(tmp_path / "model", batch=5)


@pytest.mark.parametrize("patterns", [1, 3, 4, 126, 255])
def test_assignments_survive_in_few_bits(patterns: int) -> None:
    kept = islice(combinations(range(16), 4), patterns)
    pool = clicktrain.PatternPool(tuple(clicktrain.Pattern(4, positions) for positions in kept))
    generator = torch.Generator().manual_seed(patterns)
    index = torch.randint(0, patterns + 1, (13, 7), generator=generator)
    index = torch.where(index == patterns, 255, index).to(torch.uint8)
    tensors = {"values": torch.zeros(int((index != 255).sum()), 4), "assignment": index, "masks": pool.masks()}
    source, node = (storage.Node("conv", (0,), (c, 2, 2), {}, tensors) for c in (7, 13))
    packed = storage._packed(node)
    assert packed["assignment"].numel() == -(-13 * 7 * patterns.bit_length() // 8)
    again = storage._unpacked(storage.Node("conv", (0,), node.shape, {}, packed), source)
    assert torch.equal(again.tensors["assignment"], index)


def test_vgg13_at_9x_takes_less_than_6_8_megabytes(tmp_path: Path) -> None:
    model = models.create("vgg13", 10)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    pool = clicktrain.official_pool(4)
    clicktrain.convert(model, {
        name: assign(conv.weight.detach().abs(), pool, conv.weight[:, :, 0, 0].numel() * (100 - percent) // 100)
        for (name, conv), percent in zip(convolutions, (40, 50, 55, 60, 65, 70, 75, 75, 85), strict=True)
    })  # fmt: skip
    deploy.compile(model, torch.empty(1, 3, 32, 32)).save(tmp_path / "model")
    assert (tmp_path / "model").stat().st_size <= 6.8e6


def test_a_file_cut_anywhere_is_refused(small: CompiledModel, tmp_path: Path) -> None:
    small.save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in [*range(0, len(content), 1024), 1, 7, 8, 9, len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ModelFileError, match="cut: "):
            deploy.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content + b"more")
    with pytest.raises(ModelFileError, match="cut: "):
        deploy.load(tmp_path / "cut")


def test_a_changed_byte_is_found(small: CompiledModel, tmp_path: Path) -> None:
    small.save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 4
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(ModelFileError):
            deploy.load(tmp_path / "changed")


def rewritten(path: Path, change: Any) -> None:
    """Change a file's header and give it the checksum that belongs to that."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["clicktrain"])
    change(header, tensors)
    text = json.dumps(header)
    save_file(tensors, path, {"clicktrain": text, "sha256": storage._digest(text, tensors)})


def _future(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["version"] = 99


def _foreign(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["format"] = "other"


def _operation(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["nodes"][1]["op"] = "__init__"


def _order(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["nodes"][1]["inputs"] = [2]


def _missing(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors["2.masks" if "2.masks" in tensors else next(name for name in tensors if name.endswith("masks"))]


def _values(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("values"))
    tensors[name] = tensors[name][:-1].contiguous()


def _pattern(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("assignment")]:
        tensors[name] = torch.full_like(tensors[name], 0b10111011)


def _bias(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("bias")]:
        tensors[name] = tensors[name][:3].contiguous()


def _shape(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["nodes"][-1]["shape"][1] += 1


def _choice(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    header["choices"] = {"new": {"sweep": "patterns", "tile": [1, 0, 4], "band": 1, "channel_block": 64, "group": 4}}


def _type(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("values")]:
        tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_future, "version 99 of the format; this program reads version 1"),
        (_foreign, "not a compiled model"),
        (_operation, "makes no model"),
        (_order, "makes no model"),
        (_missing, "makes no model"),
        (_values, "makes no model"),
        (_pattern, "makes no model"),
        (_bias, "makes no model"),
        (_shape, "makes no model"),
        (_type, "makes no model"),
        (_choice, "makes no model"),
    ],
)
def test_content_that_makes_no_model_is_refused(
    small: CompiledModel, tmp_path: Path, change: Any, message: str
) -> None:
    small.save(tmp_path / "model")
    rewritten(tmp_path / "model", change)
    with pytest.raises(ModelFileError, match=message):
        deploy.load(tmp_path / "model")


@pytest.mark.parametrize("target", ["aten.relu_.default", "aten.from_file.default", "profiler.x.y", "aten.nothing.x"])
def test_a_file_can_name_pure_operators_of_aten_only(target: str, tmp_path: Path) -> None:
    deploy.compile(nn.GELU(), torch.randn(2, 3)).save(tmp_path / "model")

    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["nodes"][1]["attributes"]["target"] = target

    rewritten(tmp_path / "model", change)
    with pytest.raises(ModelFileError, match="makes no model"):
        deploy.load(tmp_path / "model")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ModelFileError, match="not a compiled model"):
        deploy.load(tmp_path / "weights")
    torch.save({"x": torch.zeros(3)}, tmp_path / "pickle")
    with pytest.raises(ModelFileError, match="not a compiled model"):
        deploy.load(tmp_path / "pickle")
    (tmp_path / "huge").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelFileError):
        deploy.load(tmp_path / "huge")
    with pytest.raises(ModelFileError, match="No such file"):
        deploy.load(tmp_path / "absent")
