"""The CUDA kernels on the CPU: whole blocks, races, bounds, degenerate layers, bad operands."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.kernels import backends, plan, reference
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import backend, codegen, launch, tiling
from clicktrain.kernels.cuda.epilogue import Epilogue
from clicktrain.patterns import PRUNED, full_pool, official_pool
from tests.kernels.cases import Case, expected, relative_error
from tests.kernels.cuda.configurations import CONFIGURATIONS, check, run
from tests.kernels.cuda.host import PLATFORM as HOST_PLATFORM
from tests.kernels.cuda.host import Fault, HostLauncher, compiled, host_unit, kernel_text, on_host

SQUARES = official_pool(4)
USED = CONFIGURATIONS["squares"]
CASE = Case(SQUARES, 7, 8, 5, (7, 8), (1, 1), (1, 1), 0.6, seed=3)
"""Several chunks of channels, blocks of filters, groups and splits of patches, all cut unevenly."""

CHOSEN = {
    "wide": Case(SQUARES, 9, 21, 3, (9, 13), (1, 1), (1, 1), 0.3, seed=1),
    "small images": Case(SQUARES, 12, 17, 70, (2, 2), (1, 1), (1, 1), 0.4, seed=2),
    "stride 2": Case(SQUARES, 6, 19, 3, (10, 7), (2, 2), (1, 1), 0.5, seed=3),
    "one pixel, one image": Case(SQUARES, 5, 6, 1, (1, 1), (1, 1), (1, 1), 0.8, seed=4),
    "pointwise": Case(full_pool(1), 10, 30, 2, (7, 6), (1, 1), (0, 0), 0.3, seed=5),
}


@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_what_the_backend_chooses_by_itself(case, launcher):
    with on_host(launcher):
        assert check(case) == 3


def test_a_block_as_large_as_on_a_gpu(units):
    limits = tiling.Limits(shared_bytes=99 << 10, multiprocessors=1)
    case = Case(SQUARES, 40, 24, 4, (16, 16), (1, 1), (1, 1), 0.4, seed=1)
    with on_host(HostLauncher(units, limits)) as launcher:
        assert check(case) == 3
    threads = [int(re.search(r"THREADS = (\d+);", text)[1]) for text in launcher.texts]
    assert min(threads) > 500


def test_the_text_is_the_same_as_for_nvrtc():
    layer = Layer.forward(CASE.plan())
    for spec in (USED.convolution(layer, "float16"), USED.gradient(layer, "float32")):
        for_nvrtc, for_host = codegen.unit(spec), host_unit(codegen.unit(spec))
        digest = hashlib.sha256(codegen.render(spec).encode()).hexdigest()
        assert hashlib.sha256(kernel_text(for_nvrtc).encode()).hexdigest() == digest
        length = len(codegen.render(spec))
        assert hashlib.sha256(for_host[:length].encode()).hexdigest() == digest
        assert 'extern "C" __global__' not in for_host[length:]
        assert not re.search(r"^\s*#\s*(if|include|define)", codegen.render(spec), re.MULTILINE)


def test_equal_specifications_give_equal_text():
    first, second = (USED.convolution(Layer.forward(CASE.plan()), "float32") for _ in range(2))
    assert codegen.unit(first) == codegen.unit(second)
    assert codegen.unit(replace(first, channels=4)) != codegen.unit(first)


def outcome(launcher: HostLauncher) -> str:
    """Return "right", "wrong", or the fault that the host found."""
    with on_host(launcher), USED.used():
        try:
            got, want = run(CASE)
        except Fault as fault:
            return str(fault)
    return "right" if all(relative_error(got[name].double(), want[name]) < 1e-5 for name in want) else "wrong"


def without(pattern: str, number: int):
    """Return an edit that deletes one match of a pattern from a unit; a unit without it stays as it is."""

    def edit(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        if number >= len(matches):
            return text
        start, end = matches[number].span()
        return text[:start] + text[end:]

    return edit


SYNCHRONISATION = r"(?<=\s)(__syncthreads|wait_for_copies)\(\);"


@pytest.mark.parametrize("kernel", ["convolution.cuh", "gradient.cuh"])
@pytest.mark.parametrize("number", [0, 1])
def test_deleting_any_barrier_or_wait_is_noticed(kernel, number, units):
    text = (codegen.DIRECTORY / kernel).read_text()
    assert len(re.findall(SYNCHRONISATION, text)) == 2  # both numbers are all there are

    def edit(unit: str) -> str:
        return without(SYNCHRONISATION, number)(unit) if text in unit else unit

    outcomes = []
    for order in ("forward", "reverse", "random"):
        launcher = HostLauncher(units, orders=(order,))
        assert outcome(launcher) == "right"
        launcher.edit = edit
        outcomes.append(outcome(launcher))
    assert set(outcomes) != {"right"}, outcomes


MUTANTS = {
    "one buffer for two chunks": ("buffer = next % 2;", "buffer = chunk % 2 * 0;"),
    "one buffer for two groups": ("(buffer ^ 1) * BUFFER", "buffer * BUFFER"),
    "reads below the image": (" && x_row < in_h && ", " && "),
    "reads beyond the last image": ("x_image < images && x_row >= 0", "x_row >= 0"),
    "the gradient reads below the image": (" && row + r < batch.height && ", " && "),
    "the gradient reads beyond the last image": ("image + i < batch.images && row + r >= 0", "row + r >= 0"),
    "writes beyond the last image": ("if (patch.image + image * LANE_IMAGES >= images) continue;", ""),
    "writes below the image": ("if (top + row >= out_h) continue;", ""),
    "writes right of the image": ("if (left + column >= out_w) continue;", ""),
    "a warp reads another's program": ("words + words[2 * warp]", "words + words[0]"),
    "lanes without a patch are counted": ("  if (lane >= SEATS) {", "  if (false) {"),
    "the region of another chunk": ("order + channel, first", "order, first"),
    "a diverging barrier": ("    __syncthreads();", "    if (lane) __syncthreads();"),
    "a kernel's window of another pattern": ("x + task[2];", "x + task[2] + 1;"),
    "a window of another channel": ("corner + place;", "corner + (place > 0 ? place - 1 : 0);"),
}  # fmt: skip


@pytest.mark.parametrize("old_new", MUTANTS.values(), ids=MUTANTS)
def test_mistakes_are_noticed(old_new, units):
    launcher, edited = HostLauncher(units), []

    def edit(unit: str) -> str:
        edited.append(old_new[0] in unit)
        return unit.replace(*old_new)

    launcher.edit = edit
    assert outcome(launcher) != "right"
    assert any(edited)


def test_results_are_the_same_bits_in_any_order(units):
    results = []
    for order in ("forward", "reverse", "random"):
        with on_host(HostLauncher(units, orders=(order,))), USED.used():
            results.append(run(CASE)[0])
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


PROBE = """
extern "C" __global__ void __launch_bounds__(32) probe(const float* x, float* y) {
  const float value = to_float(x[threadIdx.x]);
  half16 h;
  bfloat16 b;
  from_float(value, h);
  from_float(value, b);
  y[threadIdx.x] = to_float(h);
  y[32 + threadIdx.x] = to_float(b);
  float total = value;
  for (int distance = 16; distance; distance /= 2) total += shuffle_xor(total, distance);
  y[64 + threadIdx.x] = total;
}
"""


def test_the_host_rounds_and_shuffles_as_torch_and_a_warp_do(units):
    unit = codegen._source("platform.cuh") + PROBE
    launcher = HostLauncher(units)
    exponents = torch.linspace(-30, 17, 2048)
    numbers = torch.cat(
        (torch.randn(2048) * 2**exponents, torch.tensor([0.0, -0.0, 65519.0, 65520.0, 1e9, 3e-8, 2.98e-8]))
    )
    for values in (*numbers.split(32)[:-1], numbers[-32:]):
        y = torch.zeros(96)
        launcher.launch(unit, "probe", 1, 32, 0, (values.clone(), y))
        assert torch.equal(y[:32], values.half().float())
        assert torch.equal(y[32:64], values.bfloat16().float())
        assert torch.allclose(y[64:].double(), values.double().sum(), atol=1e-5 * float(values.abs().sum()))


def test_a_fused_epilogue(launcher):
    made, x, values, dy = CASE.operands()
    scale, shift = torch.randn(7), torch.randn(7)
    want = reference.forward(x.double(), values.double(), made)
    affine = want * scale[:, None, None] + shift[:, None, None]
    with on_host(launcher), USED.used():
        everything = backend.forward_fused(x, values, made, Epilogue(scale, shift, dy, relu=True))
        only_relu = backend.forward_fused(x, values, made, Epilogue(relu=True))
        assert relative_error(everything.double(), (affine + dy).relu()) < 1e-5
        assert relative_error(only_relu.double(), want.relu()) < 1e-5
        with pytest.raises(InvalidArgument, match=r"shift is torch.float32 \(8,\).*expected torch.float32 \(7,\)"):
            backend.forward_fused(x, values, made, Epilogue(shift=torch.zeros(8)))
        with pytest.raises(InvalidArgument, match="residual has strides"):
            backend.forward_fused(x, values, made, Epilogue(residual=dy.contiguous(memory_format=torch.channels_last)))


def test_nan_under_pruned_taps_does_not_spread(launcher):
    index = torch.full((2, 2), PRUNED, dtype=torch.uint8)
    index[0, 0] = 3  # the square up and left
    made = plan(index, SQUARES, (1, 2, 6, 8), 1, 1)
    x = torch.randn(made.input_shape)
    x[0, 1], x[0, 0, 5, 7] = torch.nan, torch.inf  # a channel of no kernel; a corner that only the last pixel reads
    values, dy = torch.randn(made.values_shape), torch.randn(made.output_shape)
    with on_host(launcher), USED.used():
        y = backend.forward(x, values, made)
        assert torch.equal(torch.isfinite(y), torch.isfinite(reference.forward(x, values, made)))
        assert int((~torch.isfinite(y)).sum()) == 1
        dvalues = backend.grad_values(x, dy, made)
        assert torch.isfinite(dvalues).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("shape", [(0, 8, 7, 8), (5, 8, 7, 8)])
@pytest.mark.parametrize("kept", [False, True])
def test_empty_batches_and_layers(shape, kept, launcher):
    index = torch.full((7, 8), 0 if kept else PRUNED, dtype=torch.uint8)
    made = plan(index, SQUARES, shape, 1, 1)
    x, dy, values = torch.randn(shape), torch.randn(made.output_shape), torch.randn(made.values_shape)
    with on_host(launcher), USED.used():
        want = expected(made, x, values, dy)
        assert relative_error(backend.forward(x, values, made).double(), want["forward"]) < 1e-5
        assert relative_error(backend.grad_input(dy, values, made).double(), want["grad_input"]) < 1e-5
        assert relative_error(backend.grad_values(x, dy, made).double(), want["grad_values"]) < 1e-5


def test_operands_need_not_be_contiguous(launcher):
    made, x, values, dy = CASE.operands()
    want = expected(made, x, values, dy)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    with on_host(launcher), USED.used():
        assert relative_error(backend.forward(x, values.t().contiguous().t(), made).double(), want["forward"]) < 1e-5
        assert relative_error(backend.grad_values(x, dy, made).double(), want["grad_values"]) < 1e-5


def test_bad_operands_are_named(launcher, monkeypatch):
    made, x, values, dy = CASE.operands()
    with pytest.raises(InvalidArgument, match="x is on cpu: the cuda backend computes on cuda tensors"):
        backend.forward(x, values, made)
    with on_host(launcher):
        with pytest.raises(InvalidArgument, match=r"x is torch.float64: the cuda backend computes in torch.float32"):
            backend.forward(x.double(), values.double(), made)
        with pytest.raises(InvalidArgument, match=r"x is torch.float32 on cpu, values torch.float16"):
            backend.forward(x, values.half(), made)
        with pytest.raises(InvalidArgument, match=r"dy has shape \(5, 7, 7, 7\): the plan expects \(5, 7, 7, 8\)"):
            backend.grad_values(x, dy[..., 1:], made)
        monkeypatch.setattr(backend, "INDEX_LIMIT", 1000)
        with pytest.raises(InvalidArgument, match=r"x of shape \(5, 8, 7, 8\) has 2240 elements.*split the batch"):
            backend.forward(x, values, made)


def test_the_reason_why_there_is_no_cuda_backend():
    reason = launch.available()
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert isinstance(reason, str)
    assert "CuPy is not installed" in reason or "no NVIDIA GPU" in reason
    with pytest.raises(BackendUnavailable, match="backend='cuda': "):
        backends.select("cuda", torch.zeros(1, 1, 1, 1))


def test_old_gpus_are_refused():
    assert launch.too_old((7, 5)) is None
    assert launch.too_old((9, 0)) is None
    assert launch.too_old((7, 0)) == "the GPU has compute capability 7.0: the kernels need 7.5 or newer"


def test_guard_pages_trap_on_both_sides(units):
    body = (
        'extern "C" __global__ void __launch_bounds__(32) {name}(const float* x, float* y) {{ y[0] = x[{index}]; }}\n'
    )
    texts = {index: codegen._source("platform.cuh") + body.format(name="touch", index=index) for index in (-1, 0, 5)}
    x = torch.arange(5.0)
    for index, text in texts.items():
        faults = 0
        for _ in range(3):  # arrays end at a page or start at one, in turn
            launcher, y = HostLauncher(units), torch.zeros(1)
            launcher.launches = _
            try:
                launcher.launch(text, "touch", 1, 32, 0, (x, y))
            except Fault as fault:
                faults += "out of bounds" in str(fault)
        assert (faults > 0) == (index != 0), index


def test_the_host_platform_declares_what_the_device_does():
    names = set(re.findall(r"__device__ __forceinline__ [\w:<>, ]+?[ *]+(\w+)\(", codegen._source("platform.cuh")))
    assert {"copy_async", "wait_for_copies", "shuffle_xor", "shared_memory", "load_packed", "store_packed"} <= names
    host = HOST_PLATFORM.read_text()
    assert all(re.search(rf"\b{name}\(", host) for name in names)


def test_a_unit_that_does_not_compile_fails_loudly(units):
    with pytest.raises(subprocess.CalledProcessError):
        compiled("nonsense", units)


def test_the_drawn_cases_are_of_every_kind():
    random = np.random.default_rng(0)
    drawn = [used.draw(random) for used in CONFIGURATIONS.values() for _ in range(50)]
    assert any(case.filters == 1 for case in drawn)
    assert any(case.density == 0 for case in drawn)
    assert any(case.channels > 6 and case.filters > 6 and case.images > 4 for case in drawn)
