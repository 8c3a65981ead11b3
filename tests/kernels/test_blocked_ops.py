"""Normalisation, addition, ReLU and pooling on blocked memory against float64 torch on NCHW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from clicktrain.kernels.cpu import backend, blocked_ops, library, memory

LANES = 8
EPS = 1e-5

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every result memory full of NaN: what a function forgets to write shows."""

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"))

    monkeypatch.setattr(blocked_ops, "empty", poisoned)


def blocked(x: Tensor) -> Tensor:
    """Pack in plain torch."""
    n, c, h, w = x.shape
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -n % LANES))
    return padded.view(-1, LANES, c, h, w).permute(0, 2, 3, 4, 1).contiguous()


def unblocked(x: Tensor, images: int) -> Tensor:
    """Unpack in plain torch; the lanes beyond the batch must be zero."""
    lanes = x.permute(0, 4, 1, 2, 3).flatten(0, 1)
    assert not lanes[images:].any()
    return lanes[:images].contiguous()


def close(result: Tensor, truth: Tensor, tolerance: float = 1e-5) -> bool:
    return float((result.double() - truth.double()).norm()) <= tolerance * float(truth.double().norm()) + 1e-12


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """Draw an NCHW batch; every third one crosses a tile of the sums (512 pixels)."""
    n, c = draw(st.integers(1, 19)), draw(st.integers(1, 9))
    h, w = draw(st.sampled_from([(1, 1), (2, 2), (3, 5), (7, 7), (4, 9), (23, 25), (33, 17)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mean, deviation = draw(st.sampled_from([(0.0, 1.0), (3.0, 0.1), (-100.0, 2.0)]))
    return torch.randn(n, c, h, w, generator=generator) * deviation + mean


several = settings(max_examples=60, deadline=None)
LARGE, LARGE_AND_ODD = (
    torch.randn(20, 33, *size, generator=torch.Generator().manual_seed(0)) for size in ((28, 30), (29, 31))
)
"""Whose results bypass the caches: more than 2 MB."""


@several
@given(activations())
def test_packing_is_inverted_and_pads_with_zeros(x: Tensor) -> None:
    packed = backend.pack(x)
    assert torch.equal(packed, blocked(x))
    assert torch.equal(backend.unpack(packed, len(x)), x)


@several
@given(activations(), st.floats(0, 1))
def test_batch_statistics_equal_those_of_torch(x: Tensor, momentum: float) -> None:
    if x.numel() == x.shape[1]:
        x = x.repeat(2, 1, 1, 1)
    c = x.shape[1]
    running = torch.randn(c), torch.rand(c) + 0.5
    expected = running[0].double(), running[1].double()
    F.batch_norm(x.double(), *expected, training=True, momentum=momentum, eps=EPS)  # moves `expected`
    mean, invstd = blocked_ops.batch_statistics(blocked(x), len(x), EPS, momentum, *running)
    variance = x.double().var((0, 2, 3), unbiased=False)
    size = float(x.double().norm() / x.numel() ** 0.5)  # the statistics can be no more exact than the values are
    assert float((mean - x.double().mean((0, 2, 3))).abs().max()) <= 1e-6 * size
    assert torch.allclose(invstd.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)
    assert torch.allclose(running[0].double(), expected[0], rtol=1e-5, atol=1e-6 * (1 + size))
    assert torch.allclose(running[1].double(), expected[1], rtol=1e-5, atol=1e-6 * (1 + size))


@several
@given(activations(), st.booleans(), st.booleans())
@example(LARGE, False, True)
@example(LARGE_AND_ODD, True, False)
def test_affine(x: Tensor, with_residual: bool, relu: bool) -> None:
    scale, shift = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    residual = torch.randn_like(x) if with_residual else None
    y = blocked_ops.affine(blocked(x), len(x), scale, shift, None if residual is None else blocked(residual), relu)
    truth = x.double() * scale[:, None, None] + shift[:, None, None]
    truth = truth if residual is None else truth + residual
    assert close(unblocked(y, len(x)), truth.relu() if relu else truth)


@several
@given(activations(), st.booleans(), st.booleans(), st.sampled_from(["none", "output", "affine"]))
@example(LARGE, True, True, "affine")
@example(LARGE_AND_ODD, True, True, "output")
@example(LARGE_AND_ODD, False, True, "none")
def test_batch_norm_backward(x: Tensor, training: bool, affine: bool, relu: str) -> None:
    x = x / x.abs().mean()  # the gradient below divides by the deviation: keep its condition out of the test
    if x.numel() == x.shape[1]:
        x = x.repeat(2, 1, 1, 1)
    c = x.shape[1]
    x64 = x.double().requires_grad_()
    weight, bias = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    weight64 = (torch.ones(c) if weight is None else weight).double().requires_grad_()
    bias64 = (torch.zeros(c) if bias is None else bias).double().requires_grad_()
    running = torch.randn(c).double(), torch.rand(c).double() + 0.5
    y64 = F.batch_norm(x64, *(r.clone() for r in running), weight64, bias64, training, 0.1, EPS)
    mean = x.double().mean((0, 2, 3)) if training else running[0]
    variance = x.double().var((0, 2, 3), unbiased=False) if training else running[1]
    invstd = (variance + EPS).rsqrt()
    scale = weight64.detach() * invstd
    shift = bias64.detach() - mean * scale
    dy = torch.randn_like(x)
    # Where float32 and float64 may disagree on which side of zero a ReLU's input is, no gradient is sent.
    dy[(y64.detach().abs() < 1e-4)] = 0
    (y64.relu() if relu != "none" else y64).backward(dy.double())

    dx, dweight, dbias = blocked_ops.batch_norm_backward(
        blocked(dy), blocked(x), len(x), mean.float(), invstd.float(), weight, training,
        relu_output=blocked(y64.detach().relu().float()) if relu == "output" else None,
        relu_affine=(scale.float(), shift.float()) if relu == "affine" else None,
    )  # fmt: skip
    assert dx is not None
    assert x64.grad is not None
    assert weight64.grad is not None
    assert bias64.grad is not None
    scale_of_terms = float(dy.double().norm() * scale.abs().max())
    assert float((unblocked(dx, len(x)) - x64.grad).norm()) <= 2e-5 * scale_of_terms + 1e-9
    size = dy.double().norm() * x.numel() ** 0.5
    assert float((dbias - bias64.grad).norm()) <= 1e-6 * size + 1e-9
    assert float((dweight - weight64.grad).norm()) <= 1e-6 * size * float(invstd.max()) + 1e-9


def test_batch_norm_backward_leaves_out_the_input() -> None:
    x, dy, ones = torch.randn(1, 3, 4, 4, 8), torch.randn(1, 3, 4, 4, 8), torch.ones(3)
    dx, _, dbias = blocked_ops.batch_norm_backward(dy, x, 8, ones, ones, None, True, needs_input=False)
    assert dx is None
    assert close(dbias, dy.sum((0, 2, 3, 4)))


@several
@given(activations())
def test_channel_sums(x: Tensor) -> None:
    assert close(blocked_ops.channel_sums(blocked(x), len(x)), x.double().sum((0, 2, 3)), 1e-4)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    size = draw(st.sampled_from([(2, 2), (3, 3), (1, 1), (3, 2), (5, 4)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (3, 1)]))
    padding = draw(st.integers(0, size[0] // 2)), draw(st.integers(0, size[1] // 2))
    return size, stride, padding


@several
@given(activations(), st.booleans(), st.booleans())
@example(LARGE, True, False)
@example(LARGE_AND_ODD, True, False)
def test_batch_norm_backward_through_relu_and_pooling(x: Tensor, training: bool, special: bool) -> None:
    x = F.pad(x / x.abs().mean(), (0, 1, 0, 1))  # 2 x 2 at least, and each kind of odd edge
    c = x.shape[1]
    statistics = torch.randn(c), torch.rand(c) + 0.5
    scale, shift = torch.randn(c), torch.randn(c)
    if special:  # all of some windows is negative, and equal after the ReLU
        x[..., ::3] = -(shift[:, None, None] + 1) / scale[:, None, None]
    pooled, places = blocked_ops.max_pool(blocked(x), len(x), (2, 2), (2, 2), (0, 0), (scale, shift), relu=True)
    dy = torch.randn(len(x), c, *pooled.shape[2:4])
    between = blocked_ops.max_pool_backward(blocked(dy), places, (x.shape[2], x.shape[3]), (2, 2), (2, 2), (0, 0))
    rest = (blocked(x), len(x), *statistics, scale, training)
    truth = blocked_ops.batch_norm_backward(between, *rest, relu_affine=(scale, shift))
    result = blocked_ops.batch_norm_backward(blocked(dy), *rest, relu_affine=(scale, shift), places=places)
    invstd, of_input = float(statistics[1].max()), float(dy.norm() * scale.abs().max())
    of_sums = float(dy.norm()) * x.numel() ** 0.5  # their terms may cancel
    tolerances = 2e-5 * of_input * invstd, 1e-6 * of_sums * invstd, 1e-6 * of_sums
    for one, other, tolerance in zip(result, truth, tolerances, strict=True):
        assert one is not None
        assert other is not None
        assert float((one.double() - other.double()).norm()) <= tolerance + 1e-9


@several
@given(activations(), windows(), st.booleans(), st.booleans())
def test_max_pool_of_an_affine_function(
    x: Tensor, window: tuple[tuple[int, int], ...], relu: bool, special: bool
) -> None:
    size, stride, padding = window
    if x.shape[2] + 2 * padding[0] < size[0] or x.shape[3] + 2 * padding[1] < size[1]:
        return
    if special:
        x.flatten()[::5] = float("nan")
    affine = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    between = blocked_ops.affine(blocked(x), len(x), *affine, None, relu)
    truth, places_there = blocked_ops.max_pool(between, len(x), size, stride, padding)
    y, places = blocked_ops.max_pool(blocked(x), len(x), size, stride, padding, affine, relu)
    assert torch.equal(y.nan_to_num(7e7), truth.nan_to_num(7e7))
    assert torch.equal(places, places_there)


@several
@given(activations(), windows(), st.booleans())
def test_max_pool_and_its_backward(x: Tensor, window: tuple[tuple[int, int], ...], special: bool) -> None:
    size, stride, padding = window
    if x.shape[2] + 2 * padding[0] < size[0] or x.shape[3] + 2 * padding[1] < size[1]:
        return
    if special:  # equal values, infinities and NaN
        x = x.round()
        x.flatten()[::3] = float("-inf")
        x.flatten()[::5] = float("nan")
    x.requires_grad_()
    truth = F.max_pool2d(x, size, stride, padding)
    y, places = blocked_ops.max_pool(blocked(x.detach()), len(x), size, stride, padding)
    assert torch.equal(unblocked(y, len(x)).nan_to_num(7e7), truth.detach().nan_to_num(7e7))
    dy = torch.randn_like(truth)
    truth.backward(dy)
    dx = blocked_ops.max_pool_backward(blocked(dy), places, (x.shape[2], x.shape[3]), size, stride, padding)
    assert x.grad is not None
    assert close(unblocked(dx, len(x)), x.grad, 1e-6)


def test_relu_passes_nan_forward_and_backward() -> None:
    x = torch.tensor([float("nan"), -1.0, 2.0, 0.0]).repeat(2).view(1, 1, 1, 1, 8)
    one, zero = torch.ones(1), torch.zeros(1)
    y = blocked_ops.affine(x, 8, one, zero, relu=True)
    assert torch.equal(y.nan_to_num(9.0).flatten()[:4], torch.tensor([9.0, 0.0, 2.0, 0.0]))
    dx, _, _ = blocked_ops.batch_norm_backward(torch.ones_like(x), x.nan_to_num(0), 8, zero, one, None, False, True, y)
    assert dx is not None
    assert torch.equal(dx.flatten()[:4], torch.tensor([1.0, 0.0, 1.0, 0.0]))


def results() -> list[Tensor]:
    """Compute every function on one uneven case."""
    generator = torch.Generator().manual_seed(3)
    x, dy, r = (blocked(torch.randn(13, 11, 23, 25, generator=generator)) for _ in range(3))
    scale, shift = torch.randn(11, generator=generator), torch.randn(11, generator=generator)
    running = torch.zeros(11), torch.ones(11)
    mean, invstd = blocked_ops.batch_statistics(x, 13, EPS, 0.1, *running)
    y = blocked_ops.affine(x, 13, scale, shift, r, True)
    backward = blocked_ops.batch_norm_backward(dy, x, 13, mean, invstd, scale, True, relu_output=y)
    pooled, places = blocked_ops.max_pool(x, 13, (3, 3), (2, 2), (1, 1))
    spread = blocked_ops.max_pool_backward(pooled, places, (23, 25), (3, 3), (2, 2), (1, 1))
    halved, whence = blocked_ops.max_pool(x, 13, (2, 2), (2, 2), (0, 0), (scale, shift), relu=True)
    through = blocked_ops.batch_norm_backward(
        halved, x, 13, mean, invstd, scale, True, relu_affine=(scale, shift), places=whence
    )
    made = [mean, invstd, *running, y, *backward, pooled, places, spread, halved, whence, *through]
    made.append(blocked_ops.channel_sums(x, 13))
    return [tensor for tensor in made if tensor is not None]


@pytest.fixture
def restored_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.set_num_threads(1)
    one = results()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(results(), one, strict=True)), threads


@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
def test_every_instruction_set_of_this_machine_agrees(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results()
    has: dict[str, Callable[[], int]] = {
        "avx512": library.load().clicktrain_has_avx512,
        "avx2": library.load().clicktrain_has_avx2,
        "portable": lambda: 1,
    }
    if not has[instruction_set]():
        pytest.skip(f"this machine has no {instruction_set}")
    monkeypatch.setattr(library, "instruction_set", lambda: instruction_set)
    blocked_ops._function.cache_clear()
    try:
        made = results()
    finally:
        blocked_ops._function.cache_clear()
    assert all(close(a, b, 1e-5) for a, b in zip(made, expected, strict=True))


class TestPool:
    """Memory that is used again."""

    def test_memory_of_a_dead_tensor_serves_the_next_of_its_size(self) -> None:
        pool = memory.Pool(smallest=1)
        first = pool.empty(3, 5)
        address = first.data_ptr()
        view = first[1]
        del first
        assert pool.empty(3, 5).data_ptr() != address, "a view still lives in that memory"
        del view
        assert pool.empty(5, 3).data_ptr() == address

    def test_tensors_are_aligned_for_vectors_and_keep_their_values(self) -> None:
        pool = memory.Pool(smallest=1)
        tensors = [pool.empty(1000 + i).fill_(i) for i in range(5)]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))

    def test_small_tensors_do_not_use_it(self) -> None:
        pool = memory.Pool(smallest=100)
        pool.empty(24)
        assert pool.free_bytes == 0
        pool.empty(25)
        assert pool.free_bytes == 100

    def test_idle_memory_goes_back(self) -> None:
        pool = memory.Pool(smallest=1, idle_calls=4)
        pool.empty(100)
        assert pool.free_bytes == 400
        for _ in range(9):
            pool.empty(10)
        assert pool.free_bytes == 40
