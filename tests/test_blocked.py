"""Blocked activations: whole networks against plain ones, the borders, and everything that is not blocked."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clicktrain import blocked, models
from clicktrain.assignment import Assignment
from clicktrain.blocked import BlockedTensor
from clicktrain.conversion import convert, to_dense
from clicktrain.kernels.cpu import blocked_ops, library
from clicktrain.layers import PatternConv2d
from clicktrain.models.blocks import BasicBlock, Bottleneck
from clicktrain.models.resnet import ResNet
from clicktrain.patterns import PRUNED, official_pool

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


@pytest.fixture(autouse=True)
def _generic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile no specialised convolution: they are bitwise equal to the generic one, and tested elsewhere."""
    library.load()
    monkeypatch.setenv("CLICKTRAIN_DISABLE_JIT", "1")


def sparse(conv: nn.Conv2d, density: float = 0.5) -> Assignment:
    index = torch.randint(0, 4, conv.weight.shape[:2], dtype=torch.uint8)
    index[torch.rand(index.shape) > density] = PRUNED
    return Assignment(index, official_pool(4))


def prune(model: nn.Module) -> nn.Module:
    """Convert every 3x3 convolution but the first."""
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    convert(model, {name: sparse(conv) for name, conv in convs[1:]})
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """Return the same network on the reference backend, every activation NCHW."""
    twin = copy.deepcopy(model)
    blocked.remove(twin)
    for layer in twin.modules():
        if isinstance(layer, PatternConv2d):
            layer.backend = "reference"
    return twin


class Everything(nn.Module):
    """One of each operator that stays blocked, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.ModuleList(
            nn.Conv2d(16, 16, 3, stride, 1, bias=bias) for stride, bias in ((1, False), (2, True))
        )
        self.norm = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16)])
        self.shortcut = nn.Conv2d(16, 16, 1, 2, bias=False)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm[0](self.stem(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        y = self.norm[1](self.conv[0](x))
        y += x
        y = F.relu_(y) + 0.5 * F.silu(y)
        z = self.norm[2](self.conv[1](y))
        z = torch.relu(torch.add(self.shortcut(y), z, alpha=2))
        z = F.avg_pool2d(z, 2, 1) + F.adaptive_avg_pool2d(z, 3).mean((2, 3), keepdim=True)
        return self.head(F.dropout(F.adaptive_avg_pool2d(z, 2), 0.1, self.training).flatten(1))


def small_resnet(block: type[BasicBlock] | type[Bottleneck]) -> nn.Module:
    return ResNet(block, [(64, 1), (128, 1)], num_classes=10, in_channels=3, width=0.125)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: models.create("vgg11", 10, width=0.125),
    # Few blocks: in a deep network, ReLUs that flip on rounding set any two float32 computations of it apart.
    "resnet": lambda: small_resnet(BasicBlock),
    "bottleneck": lambda: small_resnet(Bottleneck),
    "everything": Everything,
}


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result.detach() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-12))


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return prune(NETWORKS[request.param]())


@pytest.mark.parametrize(("images", "training"), [(16, True), (13, True), (13, False)])
def test_gradients_and_state_equal_those_of_the_plain_network(network: nn.Module, images: int, training: bool) -> None:
    twin = plain_copy(network)
    x, target = torch.randn(images, 3, 16, 16), torch.randint(0, 5, (images,))
    results = []
    for model in (network.train(training), twin.train(training)):
        torch.manual_seed(1)  # dropout
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        assert type(output) is Tensor
        F.cross_entropy(output, target).backward()
        assert type(inputs.grad) is Tensor
        results.append((output, inputs.grad, [p.grad for p in model.parameters()]))
    (y, dx, gradients), (y_plain, dx_plain, gradients_plain) = results
    assert relative(y, y_plain) < 1e-4
    assert relative(dx, dx_plain) < 1e-4
    # A bias in front of a normalisation has gradient zero but for rounding, so the scale is that of all gradients.
    scale = max(float(g.norm()) for g in gradients_plain if g is not None)
    for gradient, expected in zip(gradients, gradients_plain, strict=True):
        assert gradient is not None
        assert expected is not None
        assert float((gradient - expected).norm()) < 1e-4 * max(float(expected.norm()), 1e-2 * scale)
    for (name, value), expected in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(value.float(), expected.float(), rtol=1e-4, atol=1e-5), name


def test_first_steps_of_training_have_the_loss_of_the_plain_network() -> None:
    model = prune(small_resnet(BasicBlock))
    twin = plain_copy(model)
    data = [(torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))) for _ in range(4)]
    losses = []
    for net in (model, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for step in range(8):
            loss = F.cross_entropy(net(data[step % 4][0]), data[step % 4][1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_the_network_does_not_depend_on_the_number_of_threads() -> None:
    # Only the convolutional part: the matrix products of the head are torch's.
    model = prune(small_resnet(BasicBlock))
    body = nn.Sequential(*list(model.children())[:-1])
    x = torch.randn(13, 3, 16, 16)
    made = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        net = copy.deepcopy(body)
        blocked.install(net)
        features = net(x)
        features.square().sum().backward()
        made.append([features, *(p.grad for n, p in net.named_parameters() if p.ndim < 4)])
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


class TestWhatStaysBlocked:
    def kinds(self, model: nn.Module, x: Tensor) -> dict[str, bool]:
        """Tell for each layer whether its output was blocked."""
        seen: dict[str, bool] = {}
        handles = [
            layer.register_forward_hook(
                lambda _m, _i, out, name=name: seen.update({name: isinstance(out, BlockedTensor)})
            )
            for name, layer in model.named_modules()
            if not list(layer.children())
        ]
        model(x)
        for handle in handles:
            handle.remove()
        return seen

    def test_everything_up_to_the_global_pool_does(self) -> None:
        seen = self.kinds(prune(models.create("vgg11", 10, width=0.125)), torch.randn(8, 3, 32, 32))
        assert all(is_blocked for name, is_blocked in seen.items() if name.startswith("features"))
        assert not any(is_blocked for name, is_blocked in seen.items() if name.startswith("classifier"))

    def test_between_a_normalisation_and_its_pooling_nothing_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("affine", "max_pool", "max_pool_backward", "batch_norm_backward"):
            function = getattr(blocked_ops, name)

            def counted(*args: Any, name: str = name, function: Callable[..., Any] = function, **more: Any) -> Any:
                calls.append(name)
                return function(*args, **more)

            monkeypatch.setattr(blocked_ops, name, counted)
        model = prune(models.create("vgg11", 10, width=0.125))
        model(torch.randn(8, 3, 32, 32)).sum().backward()
        pools = sum(isinstance(layer, nn.MaxPool2d) for layer in model.modules())
        norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
        assert {name: calls.count(name) for name in set(calls)} == {
            "affine": norms - pools, "max_pool": pools, "batch_norm_backward": norms
        }  # fmt: skip

    def test_after_an_unknown_layer_the_next_pattern_convolution_packs_again(self) -> None:
        model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)))
        assert self.kinds(model, torch.randn(8, 3, 9, 9)) == {"0": True, "1": False, "2": False, "3": True}

    @pytest.mark.parametrize(
        ("x", "why"),
        [
            (torch.randn(5, 3, 9, 9), "a batch that leaves most lanes empty"),
            (torch.randn(9, 3, 9, 9), "one image more than a block"),
            (torch.randn(8, 3, 9, 9, dtype=torch.float64), "another type"),
        ],
    )
    def test_these_inputs_do_not(self, x: Tensor, why: str) -> None:
        assert not blocked.suits(x), why
        assert blocked.pack(x) is x

    def test_nothing_does_while_disabled(self) -> None:
        model, x = prune(models.create("vgg11", 10, width=0.125)).eval(), torch.randn(8, 3, 32, 32)
        with blocked.disabled():
            assert not any(self.kinds(model, x).values())
        assert any(self.kinds(model, x).values())

    def test_a_backend_chosen_by_name_is_respected(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        convert(model, {"1": sparse(model[1])}, backend="reference")
        seen = self.kinds(model, torch.randn(8, 3, 9, 9))
        assert not seen["1"]

    def test_autocast_computes_plain(self) -> None:
        model, x = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))), torch.randn(8, 3, 9, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert not any(self.kinds(model, x).values())
            assert relative(model(x), plain_copy(model)(x)) < 1e-2


class TestBorders:
    @pytest.fixture
    def model(self) -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
        return prune(nn.Sequential(*layers)).eval()

    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))

    def test_a_fully_convolutional_model_gives_an_ordinary_tensor(self, model: nn.Module) -> None:
        y = model(self.x)
        assert type(y) is Tensor
        assert y.shape == (8, 8, 5, 5)
        assert y.is_contiguous()

    def test_outputs_in_containers_are_plain_too(self, model: nn.Module) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = model

            def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
                y = self.body[:3](x)
                return {"features": [y, self.body[3](y)]}

        two = Two()
        blocked.install(two)
        assert all(type(y) is Tensor for y in two(self.x)["features"])

    def test_state_and_pickles_are_those_of_the_model(self, model: nn.Module) -> None:
        assert not any("block" in key for key in model.state_dict())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(self.x), model(self.x))

    @pytest.mark.parametrize("backend", ["reference", "cuda"])
    def test_nothing_is_installed_where_nothing_computes_on_the_cpu(self, model: nn.Module, backend: str) -> None:
        for layer in model.modules():
            if isinstance(layer, PatternConv2d):
                layer.backend = backend
        blocked.install(model)
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
        assert not any(getattr(layer, "blocked_on", None) for layer in model.modules())

    def test_a_model_that_moves_is_installed_on_its_new_device(
        self, model: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("clicktrain.blocked.kernels.GPU", "meta")
        blocked.install(model)
        before = dict(model._forward_pre_hooks), dict(model._forward_hooks)
        model.to("meta")

        def places() -> set[str | None]:
            return {layer.blocked_on for layer in model.modules() if isinstance(layer, PatternConv2d)}

        with blocked.installed(model):
            assert places() == {"meta"}
            (hook,) = model._forward_pre_hooks.values()
            assert hook.keywords == {"device": "meta"}
        assert places() == {"cpu"}
        assert (dict(model._forward_pre_hooks), dict(model._forward_hooks)) == before
        blocked.install(model)
        assert places() == {"meta"}
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1

    def test_installing_twice_changes_nothing_and_to_dense_removes(self, model: nn.Module) -> None:
        blocked.install(model)
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        expected = model(self.x)
        to_dense(model)
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
        assert relative(model(self.x), expected) < 1e-5

    def test_export_trace_and_compile_see_the_plain_network(self, model: nn.Module) -> None:
        expected = model(self.x)
        exported = torch.export.export(model, (self.x,))
        targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert "clicktrain.pattern_conv2d.default" in targets
        assert relative(exported.module()(self.x), expected) < 1e-5
        assert relative(torch.compile(model, backend="aot_eager", fullgraph=True)(self.x), expected) < 1e-5
        assert relative(torch.jit.trace(model, self.x)(self.x), expected) < 1e-5

    def test_activation_checkpointing(self, model: nn.Module) -> None:
        gradients = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            x = self.x.clone().requires_grad_()
            run(x).square().sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)

    def test_module_hooks_see_right_values(self, model: nn.Module) -> None:
        seen: list[Tensor] = []
        model[2].register_full_backward_hook(lambda _m, _inputs, outputs: seen.append(outputs[0]))
        x = self.x.clone().requires_grad_()
        model(x).square().sum().backward()
        with blocked.disabled():
            model(x).square().sum().backward()
        assert relative(blocked.plain(seen[0]), seen[1]) < 1e-5


def test_without_the_extension_everything_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.blocked.tensor.availability", lambda name: "no compiler")
    model = prune(models.create("vgg11", 10, width=0.125))
    twin = plain_copy(model)
    x = torch.randn(8, 3, 32, 32)
    assert not blocked.suits(x)
    assert relative(model.eval()(x), twin.eval()(x)) < 1e-4
