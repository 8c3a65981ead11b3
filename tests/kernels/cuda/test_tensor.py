"""The tensor-core kernels on the CPU: against float64, what is chosen and where, values that are not finite."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from clicktrain.assignment import assign
from clicktrain.kernels import plan, reference
from clicktrain.kernels.cuda import backend, codegen, launch, tensor, tensor_text
from clicktrain.kernels.cuda.epilogue import Epilogue
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.patterns import PRUNED, full_pool, official_pool
from tests.kernels.cases import expected, relative_error
from tests.kernels.cuda.configurations import TOLERANCES, check
from tests.kernels.cuda.host import Fault, HostLauncher, compiled, host_unit, kernel_text, on_host
from tests.kernels.cuda.shared import BATCH_LAST, CASE, CHOICES, CONFIGURATIONS, SQUARES, USED, SharedCase

NARROW = ("float16", "bfloat16")
CASES = 8
"""Convolutions for each configuration and type; each is three kernel runs."""
GRID = {name: (used, False) for name, used in CONFIGURATIONS.items()}
GRID |= {f"batch last: {name}": (used, True) for name, used in BATCH_LAST.items()}
WIDE = Limits(shared_bytes=48 << 10, multiprocessors=4, warps=4)
seen: Counter[str] = Counter()


def texts(used, case, dtype, batch_last):
    """Return the units of a configuration."""
    made = case.plan()
    return [tensor_text.unit(getattr(used, choice)(made, dtype, None, batch_last)) for choice in CHOICES]


@pytest.fixture(scope="module")
def all_units(units):
    """Compile the units of all configurations, two at a time."""
    wanted = []
    for used, batch_last in GRID.values():
        case = used.draw(np.random.default_rng(0))
        wanted += [text for dtype in NARROW for text in texts(used, case, dtype, batch_last)]
    compiled(host_unit(wanted[0]), units)  # with the header that all share
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: compiled(host_unit(text), units), wanted))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", GRID)
def test_random_convolutions(name, dtype, launcher, all_units):
    (used, batch_last), random = GRID[name], np.random.default_rng(len(name))
    with on_host(launcher), used.used():
        for _ in range(CASES):
            seen[dtype] += check(used.draw(random, batch_last), dtype, batch_last)
    assert len(launcher.texts) <= 3
    assert all(f"constexpr int BATCH_LAST = {int(batch_last)};" in text for text in launcher.texts)


def test_there_were_a_thousand_runs():
    assert sum(seen.values()) >= 1000
    assert set(seen) == set(NARROW)


CHOSEN = {
    "wide": SharedCase(SQUARES, 32, 21, 9, (9, 14), (1, 1), (1, 1), 0.3, seed=1),
    "small images": SharedCase(SQUARES, 16, 17, 70, (2, 2), (1, 1), (1, 1), 0.4, seed=2),
    "stride 2": SharedCase(SQUARES, 32, 19, 8, (10, 7), (2, 2), (1, 1), 0.5, seed=3),
    "one pixel": SharedCase(SQUARES, 16, 6, 12, (1, 1), (1, 1), (1, 1), 0.8, seed=4),
    "one row": SharedCase(SQUARES, 16, 6, 8, (1, 9), (1, 1), (1, 1), 0.8, seed=4),
    "pointwise": SharedCase(full_pool(1), 48, 30, 8, (7, 6), (1, 1), (0, 0), 0.3, seed=5),
    "five by five": SharedCase(full_pool(5), 16, 3, 8, (6, 6), (1, 1), (2, 2), 0.5, seed=6),
}


@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_what_the_backend_chooses_by_itself(case, units):
    with on_host(HostLauncher(units, WIDE)) as launcher:
        assert check(case, "bfloat16") == 3
    assert all("tensor_" in text for text in launcher.texts)


def test_a_block_as_large_as_on_a_gpu(units):
    case = SharedCase(SQUARES, 64, 24, 16, (8, 8), (1, 1), (1, 1), 0.4, seed=1)
    with on_host(HostLauncher(units, Limits(shared_bytes=163 << 10, multiprocessors=1))) as launcher:
        assert check(case, "float16") == 3
    assert any("constexpr int THREADS = 512;" in text for text in launcher.texts)


@pytest.mark.parametrize("density", [0.0, 0.06])
def test_blocks_without_a_kernel(density, units):
    case = SharedCase(SQUARES, 48, 7, 9, (4, 4), (1, 1), (1, 1), density, seed=2)
    with on_host(HostLauncher(units, WIDE)):
        assert check(case, "bfloat16") == 3


MATRICES = """
using Element = half16;
extern "C" __global__ void __launch_bounds__(32)
    matrices(const half16* a, const half16* b, const half16* b_transposed, float* product) {
  using Unit = Packed<unsigned, 4>;
  half16* const space = reinterpret_cast<half16*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) space[i] = a[i];
  for (int i = lane; i < 128; i += 32) space[256 + i] = b[i], space[384 + i] = b_transposed[i];
  __syncthreads();
  const Unit* units = reinterpret_cast<const Unit*>(space);
  const Unit left = load_matrices<false>(units + lane % 16 * 2 + lane / 16);
  const Unit right = load_matrices<true>(units + 32 + lane % 16);
  const Unit same = load_matrices<false>(units + 48 + lane % 8 * 2 + lane / 8 % 2);
  float sum[2][4] = {};
  multiply_accumulate(sum[0], left, right.items[0], right.items[1], half16{});
  multiply_accumulate(sum[1], left, same.items[0], same.items[1], half16{});
  for (int i = 0; i < 8; ++i)
    product[i / 4 * 128 + (lane / 4 + i / 2 % 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i / 4][i % 4];
}
"""


def test_the_host_multiplies_matrices_as_the_fragments_say(launcher):
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()  # [row][k] and [k][column]
    product = torch.zeros(2, 16, 8)
    unit = codegen._source("platform.cuh") + MATRICES
    launcher.launch(unit, "matrices", 1, 32, 1024, (a, b, b.t().contiguous(), product))
    for found in product:
        torch.testing.assert_close(found, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_misplaced_rows_of_matrices_are_noticed(units):
    for old, new in (
        ("units + 32 + lane % 16", "reinterpret_cast<const Unit*>(space + 1)"),
        ("units + 32 + lane % 16", "units + 64 + lane"),
        ("units + 32 + lane % 16", "reinterpret_cast<const Unit*>(a)"),
    ):
        launcher = HostLauncher(units)
        text = codegen._source("platform.cuh") + MATRICES.replace(old, new)
        with pytest.raises(Fault, match=r"misaligned|out of bounds"):
            launcher.launch(
                text, "matrices", 1, 32, 1024, (*(torch.zeros(256).half() for _ in range(3)), torch.zeros(256))
            )


def test_the_text_is_the_same_as_for_nvrtc():
    for choice in CHOICES:
        spec = getattr(USED, choice)(CASE.plan(), "float16", None)
        for_nvrtc, for_host = tensor_text.unit(spec), host_unit(tensor_text.unit(spec))
        text = tensor_text.render(spec)
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert hashlib.sha256(kernel_text(for_nvrtc).encode()).hexdigest() == digest
        assert hashlib.sha256(for_host[: len(text)].encode()).hexdigest() == digest
        assert 'extern "C" __global__' not in for_host[len(text) :]
        assert not re.search(r"^\s*#\s*(if|include|define)", text, re.MULTILINE)
        assert tensor_text.unit(replace(spec, parts=7)) != tensor_text.unit(spec)


def test_a_fused_epilogue(launcher):
    made, x, values, dy = (t.bfloat16() if isinstance(t, torch.Tensor) else t for t in CASE.operands())
    scale, shift = torch.randn(80), torch.randn(80)
    want = reference.forward(x.double(), values.double(), made)
    affine = want * scale[:, None, None] + shift[:, None, None]
    with on_host(launcher), USED.used():
        everything = backend.forward_fused(x, values, made, Epilogue(scale, shift, dy, relu=True))
        only_relu = backend.forward_fused(x, values, made, Epilogue(relu=True))
    assert relative_error(everything.double(), (affine + dy).relu()) < TOLERANCES["bfloat16"]
    assert relative_error(only_relu.double(), want.relu()) < TOLERANCES["bfloat16"]


def test_nan_and_infinity_under_pruned_taps_do_not_spread(launcher):
    index = torch.full((16, 2), PRUNED, dtype=torch.uint8)
    index[:, 0] = 3  # the square up and left
    made = plan(index, SQUARES, (9, 2, 6, 7), 1, 1)
    x = torch.randn(made.input_shape).half()
    x[0, 1], x[0, 0, 5, 6] = torch.nan, torch.inf  # a channel of no kernel; a corner that only the last pixel reads
    values, dy = torch.randn(made.values_shape).half(), torch.randn(made.output_shape).half()
    with on_host(launcher), USED.used():
        y = backend.forward(x, values, made)
        want = reference.forward(x.double(), values.double(), made)
        assert torch.equal(torch.isfinite(y), torch.isfinite(want))
        assert torch.equal(y[~torch.isfinite(y)].double(), want[~torch.isfinite(want)])
        assert int((~torch.isfinite(y)).sum()) == 16
        dvalues = backend.grad_values(x, dy, made)
        assert torch.isfinite(dvalues).tolist() == [[True, True, True, False]] * 16
        dy[3, :, 0, 0] = torch.nan  # multiplied by taps that look beyond the image, and by one pixel
        dx = backend.grad_input(dy, values, made)
        assert torch.equal(torch.isfinite(dx), torch.isfinite(reference.grad_input(dy.double(), values.double(), made)))


@pytest.mark.parametrize("edit", [("", ""), ("found[i] >= 0);", "true);")], ids=["right", "rows that fill a step"])
def test_nan_in_one_blocks_weights_does_not_spread(edit, launcher):
    index = torch.full((32, 2), PRUNED, dtype=torch.uint8)
    index[:, 0] = 3  # four rows of sixteen
    made = plan(index, SQUARES, (8, 2, 6, 7), 1, 1)
    x, values = torch.randn(made.input_shape).half(), torch.randn(made.values_shape).half()
    values[:16] = torch.nan
    launcher.edit = lambda unit: unit.replace(*edit)
    with on_host(launcher), USED.used():
        y = backend.forward(x, values, made)
    assert torch.isfinite(y[:, 16:]).all() == (edit[0] == "")


def test_operands_may_start_anywhere(launcher):
    made, x, values, dy = (t.half() if isinstance(t, torch.Tensor) else t for t in CASE.operands())
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (x, values, dy)]
    assert all(t.data_ptr() % 4 == 2 for t in shifted)
    want = expected(made, x, values, dy)
    with on_host(launcher), USED.used():
        assert relative_error(backend.forward(*shifted[:2], made).double(), want["forward"]) < 2e-3
        assert relative_error(backend.grad_values(shifted[0], shifted[2], made).double(), want["grad_values"]) < 2e-3
    assert all(tensor._aligned(t).data_ptr() % 4 == 0 for t in shifted)


def test_tensor_cores_serve_exactly_where_they_can(monkeypatch):
    cpu, made = torch.device("cpu"), CASE.plan()
    assert all(tensor.applies(made, dtype, cpu) for dtype in NARROW)
    assert not tensor.applies(made, "float32", cpu)
    few = replace(CASE, images=7)
    assert not tensor.applies(few.plan(), "float16", cpu)
    assert tensor.applies(replace(CASE, images=8).plan(), "float16", cpu)
    other = made.index.clone()
    other[37, 2] = PRUNED if other[37, 2] != PRUNED else 0
    assert not tensor.applies(plan(other, SQUARES, made.input_shape, 1, 1), "float16", cpu)
    assert not tensor.applies(plan(made.index[:40], SQUARES, made.input_shape, 1, 1), "float16", cpu)
    for capability, serves in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        tensor._capable.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tensor.applies(made, "float16", torch.device("cuda", 0)) is serves
    tensor._capable.cache_clear()


def test_float32_and_unshared_filters_keep_their_kernels(launcher):
    with on_host(launcher):
        assert check(replace(CASE, images=8, filters=16), "float32") == 3
    assert not any("tensor_" in text for text in launcher.texts)


def test_an_assignment_shared_by_importance_is_served():
    shared = assign(torch.rand(32, 16, 3, 3), SQUARES, 160, share_filters=16)
    assert tensor.applies(plan(shared, input_shape=(8, 16, 8, 8), padding=1), "bfloat16", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(launch.available() is not True, reason=f"not run on this hardware: {launch.available()}")
def test_random_convolutions_on_a_gpu():
    random = np.random.default_rng(0)
    pools = (SQUARES, official_pool(12), full_pool(1), full_pool(5))
    for number in range(60):
        pool = pools[number % 4]
        stride, padding = ((1, 1), (2, 1))[number % 3 == 0], (pool.kernel_size // 2,) * 2
        filters, channels, images = (int(random.choice(c)) for c in ((16, 64, 96), (3, 33, 64), (8, 33, 128)))
        size = tuple(int(s) for s in random.choice((1, 2, 4, 7, 8, 14, 16, 32), 2))
        density = float(random.choice((0.0, 0.1, 0.3, 1.0)))
        case = SharedCase(pool, filters, channels, images, size, stride, padding, density, number)
        made, *operands = case.operands()
        dtype = getattr(torch, NARROW[number // 2 % 2])
        x, values, dy = (operand.to("cuda", dtype) for operand in operands)
        want = expected(made, x, values, dy)
        got = {
            "forward": backend.forward(x, values, made),
            "grad_input": backend.grad_input(dy, values, made),
            "grad_values": backend.grad_values(x, dy, made),
        }
        for name, result in got.items():
            assert relative_error(result.double(), want[name]) < TOLERANCES[NARROW[number // 2 % 2]], (
                f"{name} of {case}"
            )
