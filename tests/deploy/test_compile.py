"""`clicktrain.deploy.compile`: the same results as the eager model, whatever its shape; clear errors for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clicktrain import PRUNED, Assignment, PatternConv2d, deploy, models, official_pool, timing
from clicktrain.deploy import choice
from clicktrain.deploy.compiled import CompiledModel
from clicktrain.deploy.graph import TORCH, Graph, Node
from clicktrain.errors import BackendUnavailable, InvalidArgument, UnsupportedModel
from clicktrain.kernels.cpu import library
from tests.deploy.models import alive, dense, error, prune, pruned

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", models.names())
@torch.no_grad()
def test_networks_of_the_zoo_run_whole(name: str) -> None:
    model = pruned(name)
    compiled = deploy.compile(model, torch.empty(1, 3, 32, 32), strict=True)
    assert compiled.fallbacks == []
    model = dense(model).double()  # float32 is 5e-5 away from it in the deepest network, in torch as here
    for planned in [compiled] if name == "imagenet_resnet50" else [compiled, CompiledModel(compiled.graph, 8)]:
        x = torch.randn(planned.input_shape)
        want = model(x.double())
        assert len(x) == 1 or float((want - want.mean(0)).norm()) > 0.05 * float(want.norm()), "results are bias only"
        assert error(planned(x), want) < TOLERANCE, planned.batch


class Random(nn.Module):
    """A network of what convolutional networks are made of, in an order drawn at random."""

    def __init__(self, draw: st.DrawFn, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(("conv", "conv", "residual", "bottleneck", "pool", "average", "norm")))
            c_out = draw(st.integers(1, 20))
            block = _block(kind, channels, c_out, draw)
            self.blocks.append(block)
            channels = c_out if kind in ("conv", "residual", "bottleneck") else channels
        self.head = draw(st.sampled_from(("mean", "adaptive", "flatten", "none")))
        self.fc = nn.Identity() if self.head == "none" else nn.LazyLinear(draw(st.integers(1, 20)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.head == "none":
            return x
        if self.head == "mean":
            x = x.mean((2, 3))
        return self.fc((F.adaptive_avg_pool2d(x, (3, 2)) if self.head == "adaptive" else x).flatten(1))


class Residual(nn.Module):
    """Two branches that are added, in either order, with or without a ReLU."""

    def __init__(self, main: nn.Module, side: nn.Module, swapped: bool, relu: bool) -> None:
        super().__init__()
        self.main, self.side, self.swapped, self.relu = main, side, swapped, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.side(x) + self.main(x) if self.swapped else self.main(x) + self.side(x)
        return F.relu(y) if self.relu else y


def _block(kind: str, channels: int, c_out: int, draw: st.DrawFn) -> nn.Module:
    if kind == "pool":
        k, stride = draw(st.sampled_from(((2, 2), (3, 2), (3, 1))))
        return nn.MaxPool2d(k, stride, draw(st.integers(0, 1)))
    if kind == "average":
        return nn.AvgPool2d(2, draw(st.integers(1, 2)), draw(st.integers(0, 1)))
    if kind == "norm":
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    k = draw(st.sampled_from((1, 3, 3, 5, 7)))
    stride = draw(st.sampled_from((1, 1, 2)))
    conv = nn.Conv2d(channels, c_out, k, stride, k // 2, bias=draw(st.booleans()))
    if kind == "conv":
        conv.padding = (draw(st.integers(0, k)), draw(st.integers(k // 2, k)))
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)) if draw(st.booleans()) else conv
    main = nn.Sequential(conv, nn.BatchNorm2d(c_out))
    if kind == "bottleneck":
        main = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), main, nn.Conv2d(c_out, c_out, 3, 1, 1))
    side = nn.Identity() if stride == 1 and channels == c_out else nn.Conv2d(channels, c_out, 1, stride)
    return Residual(main, side, draw(st.booleans()), draw(st.booleans()))


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A network and a batch for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels, batch = draw(st.integers(1, 6)), draw(st.integers(1, 17))
    x = torch.randn(batch, channels, draw(st.integers(6, 23)), draw(st.integers(6, 23)))
    model = Random(draw, channels)
    try:
        model.eval()(x)  # the last layer takes its size from this
    except RuntimeError:  # nothing is left of the image
        assume(False)
    prune(model, draw(st.sampled_from((0.0, 0.3, 1.0))))
    return alive(model, torch.randn(3, *x.shape[1:])), x


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(networks())
@torch.no_grad()
def test_random_networks_give_the_same_results(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    compiled = deploy.compile(model, x)
    assert compiled.fallbacks == []
    assert error(compiled(x), dense(model)(x)) < TOLERANCE


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 5, 7]), st.data())
@torch.no_grad()
def test_strips_of_one_image_find_their_neighbours(h: int, w: int, stride: int, k: int, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, k)), data.draw(st.integers(0, k))
    h, w = max(h, k - 2 * padding[0]), max(w, k - 2 * padding[1])
    x, weight, bias = torch.randn(1, 2, h, w), torch.randn(3, 2, k, k), torch.randn(3)
    want = F.conv2d(x, weight, bias, stride, padding)
    tensors = {
        "values": weight.view(6, k * k),
        "assignment": torch.zeros(3, 2, dtype=torch.uint8),
        "masks": torch.ones(1, k, k, dtype=torch.bool),
        "bias": bias,
    }
    attributes = {"stride": [stride] * 2, "padding": list(padding)}
    conv = Node("conv", (0,), tuple(want.shape[1:]), attributes, tensors)
    graph = Graph({0: Node("input", (), tuple(x.shape[1:])), 1: conv}, output=1, batch=1)
    assert error(CompiledModel(graph, 1)(x), want) < 1e-5


def test_layers_without_a_kept_kernel_give_their_bias() -> None:
    conv, index = nn.Conv2d(4, 5, 3, padding=1), torch.full((5, 4), PRUNED, dtype=torch.uint8)
    pruned_away = PatternConv2d.from_conv2d(conv, Assignment(index, official_pool(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), pruned_away, nn.ReLU())
    for batch in (1, 8):
        y = deploy.compile(model, torch.randn(batch, 3, 6, 7))(torch.randn(batch, 3, 6, 7))
        assert conv.bias is not None
        assert torch.equal(y, conv.bias.detach().relu()[:, None, None].expand(batch, 5, 6, 7))


@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_dense_layers_among_sparse_ones_give_the_same_results(batch: int) -> None:
    model = pruned("resnet32", width=0.1)
    graph = deploy.compile(model, torch.empty(batch, 3, 32, 32)).graph
    numbers = [number for number, node in graph.nodes.items() if node.op == "conv"]
    dense_ones = {*numbers[1::3], numbers[-1]}
    nodes = {n: replace(node, attributes={**node.attributes, "dense": n in dense_ones}) if n in numbers else node
             for n, node in graph.nodes.items()}  # fmt: skip
    x = torch.randn(batch, 3, 32, 32)
    assert error(CompiledModel(replace(graph, nodes=nodes), batch)(x), dense(model)(x)) < TOLERANCE


def test_sparse_or_dense_is_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned("vgg11", width=0.1), torch.randn(8, 3, 32, 32)
    graph = deploy.compile(model, x).graph
    numbers = [number for number, node in graph.nodes.items() if node.op == "conv"]
    monkeypatch.setattr(choice, "_engine", lambda graph, images: CompiledModel(graph, images).engine)
    monkeypatch.setattr(choice, "_dense_with_repacking_ms", lambda g, node, n: 1e9 if node.shape[1] > 4 else 0.0)
    monkeypatch.setattr(timing.Comparison, "speedup", lambda *_: 1.01)
    chosen = choice.choose(graph, 8)
    assert [n for n, node in chosen.nodes.items() if node.is_dense] == [
        n for n in numbers if graph.nodes[n].size[0] <= 4
    ]
    monkeypatch.setattr(timing.Comparison, "speedup", lambda *_: 0.99)
    assert choice.choose(graph, 8) is graph, "the whole would lose by it"


class Mixed(nn.Module):
    """Known operators between unknown ones, views, several results of one operator, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.three = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.one(x), approximate="tanh")
        a, b = self.two(y).chunk(2, 1)
        y = torch.cat([b, a], 1).transpose(2, 3).contiguous()
        y = F.relu(self.three(y))
        return torch.softmax(y.permute(0, 2, 3, 1) + y.amax(), -1)


@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_what_has_no_kernel_is_left_to_torch_and_listed(batch: int) -> None:
    model, x = Mixed().eval(), torch.randn(batch, 3, 9, 7)
    compiled = deploy.compile(model, x)
    assert {"aten.gelu.default", "aten.conv2d.default", "aten.permute.default"} <= set(compiled.fallbacks)
    kinds = [node.op for node in compiled.graph.nodes.values()]
    assert kinds.count("conv") == 2
    assert kinds.count(TORCH) == len(compiled.fallbacks)
    for _ in range(3):
        x = torch.randn_like(x)
        assert error(compiled(x), model(x)) < TOLERANCE
    with pytest.raises(UnsupportedModel, match=r"aten\.gelu\.default.*strict"):
        deploy.compile(model, x, strict=True)
    with pytest.raises(InvalidArgument, match=r"computes \d at a time"):
        compiled(torch.randn(batch + 1, 3, 9, 7))
    with pytest.raises(InvalidArgument, match=f"batch={batch + 1}: the model was traced for {batch}"):
        CompiledModel(compiled.graph, batch + 1)


@torch.no_grad()
def test_batches_of_any_size_are_computed_in_parts() -> None:
    model = pruned("vgg11", width=0.1)
    compiled = deploy.compile(model, torch.empty(8, 3, 32, 32))
    for batch in (0, 1, 7, 8, 9, 21):
        x = torch.randn(batch, 3, 32, 32)
        y = compiled(x)
        assert y.shape == (batch, 10)
        assert batch == 0 or error(y, model(x)) < TOLERANCE


@torch.no_grad()
def test_threads_may_share_a_compiled_model() -> None:
    model = pruned("resnet32", width=0.1)
    compiled = deploy.compile(model, torch.empty(8, 3, 32, 32))
    inputs = [torch.randn(8, 3, 32, 32) for _ in range(24)]
    want = [compiled(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        assert all(torch.equal(one, two) for one, two in zip(pool.map(compiled, inputs), want, strict=True))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("batch", [1, 8])
def test_results_do_not_depend_on_the_number_of_threads(batch: int) -> None:
    compiled = deploy.compile(pruned("resnet50", width=0.1), torch.empty(batch, 3, 45, 50))
    x = torch.randn(batch, 3, 45, 50)
    torch.set_num_threads(1)
    one = compiled(x)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(compiled(x), one)


@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_every_instruction_set_of_this_machine_agrees(
    instruction_set: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instruction_set != "portable" and not library.load()[f"clicktrain_has_{instruction_set}"]():
        pytest.skip(f"this machine has no {instruction_set}")
    model = pruned("vgg11", width=0.1)
    x = torch.randn(batch, 3, 37, 33)
    monkeypatch.setattr(library, "instruction_set", lambda: instruction_set)
    cached = (library.function, library.run_steps, library.sweep_taps)
    for cache in cached:
        cache.cache_clear()
    try:
        assert error(deploy.compile(model, x)(x), model(x)) < TOLERANCE
    finally:
        for cache in cached:
            cache.cache_clear()


def test_the_model_stays_as_it_was() -> None:
    model = pruned("vgg11", width=0.1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = deploy.compile(model, torch.randn(8, 3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(compiled(torch.randn(8, 3, 32, 32)).norm()) > 0, "the compiled model shares no memory with it"


class ByValue(nn.Module):
    """Cannot be traced: which way it goes depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ByValue(), "torch.export cannot trace it"),
        (Two(), "expected one tensor as the result, got 2"),
        (nn.Conv2d(3, 4, 3).double(), r"expected parameters of torch\.float32, got torch\.float64"),
    ],
)
def test_what_cannot_be_compiled_is_a_clear_error(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        deploy.compile(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"device": "tpu"}, InvalidArgument, "device='tpu': expected 'cpu'"),
        ({"batch": 0}, InvalidArgument, "batch=0: expected a positive number"),
        ({"example_input": "picture"}, InvalidArgument, "example_input is str"),
        ({"example_input": torch.zeros(1, 3, 8, 8).half()}, InvalidArgument, r"example_input is torch\.float16"),
        ({"example_input": torch.zeros(0, 3, 8, 8)}, InvalidArgument, "example_input has shape"),
    ],
)
def test_wrong_arguments_are_clear_errors(change: dict[str, object], kind: type[Exception], message: str) -> None:
    arguments = {"model": nn.Conv2d(3, 4, 3), "example_input": torch.zeros(1, 3, 8, 8), **change}
    with pytest.raises(kind, match=message):
        deploy.compile(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 9), r"x has shape \(2, 3, 8, 9\): the model was compiled for \(N, 3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), "x has shape"),
        (torch.zeros(3, 8, 8), "x has shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), r"x is torch\.float64 on cpu"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "on meta"),
        ([1.0], "x is of type list"),
    ],
)
def test_wrong_inputs_are_clear_errors(x: Tensor, message: str) -> None:
    compiled = deploy.compile(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
    with pytest.raises(InvalidArgument, match=message):
        compiled(x)


def test_channels_last_input_is_computed_all_the_same() -> None:
    compiled = deploy.compile(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(compiled(x), compiled(x.contiguous(memory_format=torch.channels_last)))


def test_without_the_compiled_kernels_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: "no compiler")
    with pytest.raises(BackendUnavailable, match="no compiler"):
        deploy.compile(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
