"""Deployment on a GPU: its operations on the CPU, where the CUDA kernels' text runs too; recording on a GPU only."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clicktrain import deploy
from clicktrain.deploy import gpu, storage
from clicktrain.deploy.fusion import fuse
from clicktrain.deploy.gpu import GpuEngine
from clicktrain.deploy.graph import Graph
from clicktrain.deploy.trace import trace
from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.kernels.cuda import launch
from tests.deploy.models import alive, dense, error, prune, pruned
from tests.kernels.cuda.host import HostLauncher, on_host

TOLERANCE = 1e-4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return HostLauncher(tmp_path_factory.mktemp("units"))


class Everything(nn.Module):
    """Every operation of a graph: residual additions before and after a ReLU, pools, scaling, and one left to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.third, self.strided = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.linear = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.relu(self.norms[0](self.second(x)) + x)
        y = F.relu(self.norms[1](y)) + F.gelu(self.third(y))
        y = F.max_pool2d(self.strided(y), 2)
        y = F.avg_pool2d(y, 3, 1, 1) + y.mean((2, 3), keepdim=True)
        return F.relu(self.linear(F.adaptive_avg_pool2d(y, (2, 2)).flatten(1)))


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = Everything()
    prune(model)
    return alive(model, torch.randn(6, 3, 12, 12))


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    return fuse(trace(model, x))


@torch.no_grad()
def test_every_operation_gives_what_the_model_gives(launcher: HostLauncher) -> None:
    model, x = everything(), torch.randn(2, 3, 12, 12)
    graph = graph_of(model, x)
    assert {"conv", "scale", "pool", "mean", "adaptive_pool", "linear", "add", "reshape", "torch"} <= {
        node.op for node in graph.nodes.values()
    }
    with on_host(launcher):
        engine = GpuEngine(graph, 2, CPU)
        assert launcher.launches == 0, "nothing is computed before it is asked for"
        for _ in range(2):
            x = torch.randn_like(x)
            assert error(engine.run(x), dense(model)(x)) < TOLERANCE
    assert any("constexpr int FUSED = 1;" in text for text in launcher.texts)


class Turned(nn.Module):
    """What is added to a convolution's result lies elsewhere in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x.transpose(2, 3))


@torch.no_grad()
def test_an_operand_of_the_epilogue_may_lie_anywhere(launcher: HostLauncher) -> None:
    model, x = Turned(), torch.randn(2, 4, 6, 6)
    graph = graph_of(model, x)
    assert [node.op for node in graph.nodes.values()].count("add") == 0
    with on_host(launcher):
        assert error(GpuEngine(graph, 2, CPU).run(x), model(x)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "resnet32"])
def test_networks_of_the_zoo_run_whole(name: str, launcher: HostLauncher) -> None:
    model, x = pruned(name, width=0.05, input_size=16), torch.randn(2, 3, 16, 16)
    graph = graph_of(model, x)
    assert graph.fallbacks == []
    with on_host(launcher):
        assert error(GpuEngine(graph, 2, CPU).run(x), dense(model)(x)) < TOLERANCE


@torch.no_grad()
def test_dense_layers_among_sparse_ones_give_the_same_results(launcher: HostLauncher) -> None:
    model, x = everything(), torch.randn(2, 3, 12, 12)
    graph = graph_of(model, x)
    numbers = [number for number, node in graph.nodes.items() if node.op == "conv"]
    nodes = {
        number: replace(node, attributes={**node.attributes, "dense": number in numbers[::2]}) if number in numbers
        else node for number, node in graph.nodes.items()
    }  # fmt: skip
    with on_host(launcher):
        assert error(GpuEngine(replace(graph, nodes=nodes), 2, CPU).run(x), dense(model)(x)) < TOLERANCE


def test_constants_go_to_the_device_and_plans_are_made_from_what_stays() -> None:
    """Memory of the device "meta" cannot be read, as that of a GPU cannot be by numpy."""
    graph, meta = graph_of(everything(), torch.randn(2, 3, 12, 12)), torch.device("meta")
    for node in graph.nodes.values():
        there = gpu._on(node, meta)
        assert {name for name, t in there.tensors.items() if t.device != meta} <= {"assignment", "masks"}
        if node.op == "conv":
            assert gpu._plan(there, graph, 2).values_shape == tuple(node.tensors["values"].shape)


def test_sparse_or_dense_is_what_was_measured_to_be_faster(
    launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = everything(), torch.randn(2, 3, 12, 12)
    graph, asked = graph_of(model, x), []

    def faster(sparse, dense):  # type: ignore[no-untyped-def]
        assert error(dense(), sparse()) < TOLERANCE, "both compute the same"
        asked.append(len(asked))
        return len(asked) % 2 == 0

    monkeypatch.setattr(gpu, "_faster", faster)
    with on_host(launcher):
        chosen = gpu.choose(graph, 2, CPU)
    convolutions = [node for node in chosen.nodes.values() if node.op == "conv"]
    assert [node.is_dense for node in convolutions] == [False, True] * (len(convolutions) // 2)
    assert len(asked) == len(convolutions) == 4


def test_results_go_when_nothing_reads_them_any_more(launcher: HostLauncher) -> None:
    model, x = everything(), torch.randn(2, 3, 12, 12)
    graph = graph_of(model, x)
    order = list(graph.nodes)
    made: dict[int, weakref.ref[Tensor]] = {}

    def watched(number: int, operation: gpu.Operation) -> gpu.Operation:
        def compute(*operands: Tensor) -> Tensor:
            to_come = [graph.nodes[n] for n in order[order.index(number) :]]
            needed = {source for node in to_come for source in node.inputs}
            large = {n for n in made if graph.nodes[n].shape == (6, 12, 12)}
            assert [n for n in large - needed if made[n]() is not None] == []
            y = operation(*operands)
            made[number] = weakref.ref(y)
            return y

        return compute

    with on_host(launcher):
        engine = GpuEngine(graph, 2, CPU)
        engine._operations = {number: watched(number, run) for number, run in engine._operations.items()}
        engine.run(x)
    assert len(made) == len(graph.nodes) - 1


def test_what_was_faster_dense_elsewhere_is_sparse_again(tmp_path: Path) -> None:
    graph = graph_of(everything(), torch.randn(2, 3, 12, 12))
    nodes = {
        n: replace(node, attributes={**node.attributes, "dense": True}) if node.op == "conv" else node
        for n, node in graph.nodes.items()
    }
    storage.write(tmp_path / "model", replace(graph, nodes=nodes), 2, {}, "cuda")
    for device, expected in (("cuda", True), ("cpu", False)):
        loaded, batch = storage.read(tmp_path / "model", device)
        assert batch == 2
        assert {node.is_dense for node in loaded.nodes.values() if node.op == "conv"} == {expected}


def test_without_a_gpu_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)
    deploy.compile(model, x).save(tmp_path / "model")
    monkeypatch.setattr(launch, "available", lambda: "no GPU in this test")
    for make in (
        lambda: deploy.compile(model, x, device="cuda"), lambda: deploy.load(tmp_path / "model", device="cuda"),
    ):  # fmt: skip
        with pytest.raises(BackendUnavailable, match=r"device='cuda': .*no GPU in this test"):
            make()
    with pytest.raises(InvalidArgument, match="device='tpu': expected 'cpu' or 'cuda'"):
        deploy.load(tmp_path / "model", device="tpu")


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.available() is not True, reason=f"not run on this hardware: {launch.available()}"),
]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=on_gpu), pytest.param(32, marks=on_gpu)])
@torch.no_grad()
def test_recorded_networks_give_what_the_model_gives_to_any_thread(batch: int, tmp_path: Path) -> None:
    model, want = pruned("vgg11", width=0.5), []
    inputs = [torch.randn(batch, 3, 32, 32) for _ in range(12)]
    want = [dense(model)(x) for x in inputs]
    compiled = deploy.compile(model.cuda(), inputs[0], device="cuda")
    compiled.save(tmp_path / "model")
    got: list[Tensor | None] = [None] * len(inputs)

    def work(numbers: range) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for number in numbers:
                got[number] = compiled(inputs[number].cuda()).cpu()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with torch.inference_mode():
            assert error(compiled(inputs[0].cuda()).cpu(), want[0]) < TOLERANCE
        threads = [threading.Thread(target=work, args=(range(first, 12, 3),)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loaded = deploy.load(tmp_path / "model", device="cuda")
        assert error(loaded(inputs[0].cuda()).cpu(), want[0]) < TOLERANCE
    for result, expected in zip(got, want, strict=True):
        assert result is not None
        assert error(result, expected) < TOLERANCE
