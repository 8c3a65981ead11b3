"""On a GPU: the kernels through CuPy, against the reference, inside autograd, on any stream (`nox -s gpu`)."""

from __future__ import annotations

import copy

import pytest
import torch

import clicktrain
from bench.gpu import checks
from bench.suite.networks import without_kernels
from clicktrain import blocked, models
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import backends, pattern_conv2d
from clicktrain.kernels.cuda import backend, launch
from clicktrain.patterns import official_pool
from tests.kernels.cases import Case, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.available() is not True, reason=f"not run on this hardware: {launch.available()}"),
]
CASE = Case(official_pool(4), 33, 48, 9, (14, 13), (1, 1), (1, 1), 0.4, seed=1)


def test_random_convolutions():
    assert checks.check(120, 300.0).cases >= 9


def test_auto_takes_the_cuda_backend():
    assert backends.select("auto", torch.zeros(1, 1, 1, 1, device="cuda")) is backend


def test_autograd_equals_the_reference():
    made, x, values, dy = CASE.operands()
    gradients = {}
    for name in ("cuda", "reference"):
        inputs = [t.cuda().requires_grad_() for t in (x, values)]
        # With TF32, torch's default, the reference would be the less exact of the two.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            gradients[name] = torch.autograd.grad(pattern_conv2d(*inputs, made, name), inputs, dy.cuda())
    for got, want in zip(gradients["cuda"], gradients["reference"], strict=True):
        assert relative_error(got.double(), want.double()) < 1e-4  # cuDNN may compute by Winograd


def test_work_goes_to_the_current_stream_and_twice_gives_the_same_bits():
    made, x, values, dy = (t.cuda() if isinstance(t, torch.Tensor) else t for t in CASE.operands())
    want = backend.grad_values(x, dy, made)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = backend.grad_values(x, dy, made)
        y = backend.forward(x, values, made)
    stream.synchronize()
    assert torch.equal(want, again)
    assert torch.equal(y, backend.forward(x, values, made))


@pytest.fixture
def launched(monkeypatch):
    """Return the names of the kernels that are launched from now on."""
    names, launcher = set(), backend.launcher

    class Noting(launch.CupyLauncher):
        def launch(self, text, kernel, *rest):
            names.add(kernel)
            launcher.launch(text, kernel, *rest)

    monkeypatch.setattr(backend, "launcher", Noting())
    backend.forget()  # passes that are laid out keep their launcher
    yield names
    backend.forget()


def pruned(width=0.25):
    """Return a VGG-11 with patterns, and one that computes the same with torch in float64; neither has dropout."""
    torch.manual_seed(0)
    model = models.create("vgg11", 10, width=width).cuda()
    convs = [(name, conv) for name, conv in model.named_modules() if isinstance(conv, torch.nn.Conv2d)][1:]
    clicktrain.convert(model, {name: without_kernels(conv, 60) for name, conv in convs})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, clicktrain.to_dense(copy.deepcopy(model)).double()


def gradients(network, images, classes):
    output = network(images)
    assert type(output) is torch.Tensor
    torch.nn.functional.cross_entropy(output, classes).backward()
    return [p.grad.double() for p in network.parameters()]


@pytest.fixture
def batch():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.randn(8, 3, 32, 32).cuda(), torch.arange(8).cuda()


@pytest.mark.parametrize("way", ["fused", "recorded", "one by one"])
def test_gradients_of_a_network(way, batch, launched):
    (images, classes), (model, twin) = batch, pruned()
    network = clicktrain.record(model, torch.zeros_like(images)) if way == "recorded" else model
    if way == "fused":
        blocked.install(model)
    got = gradients(network, images, classes)
    want = dict(zip(dict(twin.named_parameters()), gradients(twin, images.double(), classes), strict=True))
    fused = {"statistics", "max_pool", "norm_gradient", "pooled_norm_gradient"}
    assert launched >= {"convolve", "window_gradient"}
    assert (launched & fused) == (set() if way == "one by one" else fused)
    scale = max(float(gradient.norm()) for gradient in want.values())
    for name, gradient in zip(dict(model.named_parameters()), got, strict=True):
        expected = want[name.replace("values", "weight")]
        if name.endswith("values"):
            expected = model.get_submodule(name.removesuffix(".values")).get_assignment().gather(expected)
        # In a deep network, ReLUs that flip on rounding set any two computations apart.
        assert float((gradient - expected).norm()) <= 2e-3 * max(float(expected.norm()), 1e-2 * scale), name
    for name, buffer in twin.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name).double(), buffer, rtol=1e-4, atol=1e-5)


def test_a_record_reads_what_it_read_after_equal_layers_were_tuned(batch):
    (images, classes), (model, _) = batch, pruned()
    network = clicktrain.record(model, images)
    want = gradients(network, images, classes)
    clicktrain.tune(copy.deepcopy(model), images.shape)
    other = [torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in (100, 1000, 10_000) * 200]
    network.zero_grad()
    got = gradients(network, images, classes)
    assert len(other) == 600
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_graphs_of_torch_compile_compute_the_same_again_and_again(batch):
    (images, classes), (model, _) = batch, pruned()
    want = gradients(model, images, classes)
    backend.forget()  # layouts come while torch prepares its graphs
    network = torch.compile(model, mode="reduce-overhead")
    for _ in range(6):
        model.zero_grad()
        for gradient, expected in zip(gradients(network, images, classes), want, strict=True):
            assert float((gradient - expected).norm()) <= 2e-3 * max(float(expected.norm()), 1e-3)


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(InvalidArgument, match="x is on cpu"):
        backends.select("cuda", torch.zeros(1, 1, 1, 1))
