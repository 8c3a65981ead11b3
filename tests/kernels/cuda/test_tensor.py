"""The tensor-core kernels on the CPU: against float64, races, bounds, what is chosen and where."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from clicktrain.assignment import assign
from clicktrain.kernels import plan, reference
from clicktrain.kernels.cuda import (
    backend,
    codegen,
    launch,
    tensor,
    tensor_estimate,
    tensor_layout,
    tensor_text,
    tensor_tiling,
)
from clicktrain.kernels.cuda.epilogue import Epilogue
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.patterns import PRUNED, PatternPool, full_pool, official_pool
from tests.kernels.cases import expected, relative_error
from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.configurations import TOLERANCES, check, run
from tests.kernels.cuda.host import SMALL, Fault, HostLauncher, compiled, host_unit, kernel_text, on_host
from tests.kernels.cuda.shared import BATCH_LAST, CHOICES, CONFIGURATIONS, SharedCase

NARROW = ("float16", "bfloat16")
FUNCTIONS = ("forward", "grad_input", "grad_values")
CASES = 8
"""Convolutions for each configuration and type; each is three kernel runs."""
GRID = {name: (used, False) for name, used in CONFIGURATIONS.items()}
GRID |= {f"batch last: {name}": (used, True) for name, used in BATCH_LAST.items()}
SQUARES = official_pool(4)
ONE = PatternPool(tuple(SQUARES)[:1])
USED = CONFIGURATIONS["squares, stride 2"].small(stride=(1, 1), blocks=4, channels=6)
RESIDENT = USED.small(all_rows=True)
CASE = SharedCase(SQUARES, 80, 17, 17, (3, 5), (1, 1), (1, 1), 0.6, seed=8)
"""Several chunks of channels, sets, blocks of filters, groups and shares, cut unevenly, and warps of unequal work."""
SHARED = replace(SMALL, multiprocessors=16)
"""Blocks of threads of the forward pass have several views each, some one less than others."""
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


def outcomes(units, batch_last, edit=str, used=USED, case=CASE):
    """Return what a text does in each order of threads: "wrong", a fault, or the bits of its results."""
    found = []
    if batch_last:
        used, case = used.small(groups=2), replace(case, images=24)
    for order in ("forward", "reverse", "random"):
        launcher = HostLauncher(units, SHARED, orders=(order,))
        launcher.edit = edit
        with on_host(launcher), used.used():
            try:
                got, want = run(case, "float16", batch_last)
            except Fault as fault:
                found.append(str(fault))
                continue
        good = all(relative_error(got[name].double(), want[name]) < TOLERANCES["float16"] for name in want)
        found.append(
            hashlib.sha256(b"".join(got[n].numpy().tobytes() for n in FUNCTIONS)).hexdigest() if good else "wrong"
        )
    return found


@pytest.fixture(scope="module")
def right(units):
    """Return the bits of the right results in both formats: the same in every order of threads."""
    bits = []
    for batch_last in (False, True):
        found = set(outcomes(units, batch_last))
        assert len(found) == 1
        bits.append(found.pop())
        assert len(bits[-1]) == 64
    return bits


SYNCHRONISATION = r"(?<=\s)(__syncthreads|wait_for_copies|wait_for_batches<.*>|sync_warp|close_copies)\(\);"
PLACES = {"tensor.cuh": 10, "tensor_forward.cuh": 1, "tensor_input.cuh": 3, "tensor_values.cuh": 1}
ELSEWHERE = {
    **{("tensor.cuh", n): (USED.small(buffers=1), CASE) for n in range(3)},
    ("tensor.cuh", 3): (CONFIGURATIONS["squares, stride 2"], replace(CASE, stride=(2, 2), size=(6, 10))),
    ("tensor_forward.cuh", 0): (RESIDENT, CASE),
    ("tensor_input.cuh", 1): (USED.small(pool=ONE, warps=2, channels=4), replace(CASE, pool=ONE)),
}
"""What matters only where pixels are spread out, so that what is cleared is copied too, or where a warp works alone."""


def without(kernel, number):
    """Return an edit that deletes a barrier or wait."""
    text = (codegen.DIRECTORY / kernel).read_text()
    places = list(re.finditer(SYNCHRONISATION, text))
    assert len(places) == PLACES[kernel]  # all there are
    start, end = places[number].span()
    return lambda unit: unit.replace(text, text[:start] + ";" + text[end:])


@pytest.mark.parametrize(("kernel", "number"), [(k, n) for k, count in PLACES.items() for n in range(count)])
def test_deleting_any_barrier_or_wait_is_noticed(kernel, number, units):
    case = ELSEWHERE.get((kernel, number), (USED, CASE))
    right, found = ([set(outcomes(units, batch_last, edit, *case)) for batch_last in (False, True)]
                    for edit in (str, without(kernel, number)))  # fmt: skip
    assert all(len(bits) == 1 and len(*bits) == 64 for bits in right)
    assert found != right


MUTANTS = {
    "one buffer for two chunks": ("copy(part + 1, (part + 1) % BUFFERS)", "copy(part + 1, part % BUFFERS)"),
    "a buffer too few": ("copy(next, next % BUFFERS)", "copy(next, next % (BUFFERS - 1))"),
    "a copy too early": ("BUFFERS > 1 ? BUFFERS - 1 : 1", "BUFFERS"),
    "sums of the view before": ("part);\n    clear_sums(sum);", "part);"),
    "the same view again": ("split + turn / chunks * splits", "split"),
    "a view too few": ("(walks - split + splits - 1) / splits", "((walks - split) / splits)"),
    "one buffer for the weights": ("weights + (buffer * BLOCKS + slot)", "weights + slot"),
    "reads below the image": (" && row < height && ", " && "),
    "a unit beyond the last image": ("(WHOLE_GROUPS || image < images)", "true"),
    "lanes that exchange nothing": ("distance < 4; distance *= 2", "distance < 2; distance *= 2"),
    "sums of another image": ("place_of_sums(position / SPAN, i + 1)", "place_of_sums(position / SPAN, i)"),
    "reads beyond the last image": ("WHOLE_GROUPS || i < there", "true"),
    "writes beyond the last image": ("n >= target.images || ", ""),
    "writes below the image": ("row >= target.out_h || ", ""),
    "writes right of the gradient": (" || column >= in_w", ""),
    "pixels of dy counted twice": ("left : most_left, top, left", "left : most_left, 0, 0"),
    "a step too few": ("left > 0; --left", "left > 1; --left"),
    "one buffer for the rows": ("(ALL_ROWS ? 0 : buffer * most_steps * STEP_UNITS)", "0"),
    "rows of another block": ("own[0] - bound[ALL_ROWS ? 0 : chunk * BLOCKS]", "0"),
    "rows of one chunk only": ("copy_rows_between(0, chunks * BLOCKS, 0)", "copy_rows_between(0, BLOCKS, 0)"),
    "rows with each chunk": ("if (!ALL_ROWS) copy_rows", "if (ALL_ROWS) copy_rows"),
    "another block's stride": ("strides[first / 16 + item / OF_STEP]", "strides[first / 16]"),
    "images exchanged": ("words[2 * j + 1].items[i / 2], i", "words[2 * j].items[i / 2], i"),
    "another warp's job": ("+ warp / PARTS) * 3", "+ warp) * 3"),
    "a diverging barrier": ("__syncthreads();\n      const int", "if (threadIdx.x) __syncthreads();\n      const int"),
}  # fmt: skip


WITH_ALL_ROWS = {"rows of one chunk only", "rows with each chunk"}


@pytest.mark.parametrize(("name", "old_new"), MUTANTS.items(), ids=MUTANTS)
def test_mistakes_are_noticed(name, old_new, units, right):
    edited, used = [], RESIDENT if name in WITH_ALL_ROWS else USED

    def edit(unit):
        edited.append(old_new[0] in unit)
        return unit.replace(*old_new)

    found = [set(outcomes(units, batch_last, edit, used)) for batch_last in (False, True)]
    assert found != [{bits} for bits in right]
    assert any(edited)


def test_rows_at_once_give_the_same_bits(units, right):
    assert [set(outcomes(units, batch_last, used=RESIDENT)) for batch_last in (False, True)] == [{b} for b in right]


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


def test_every_value_has_one_row():
    made, spec = CASE.plan(), USED.forward_spec(None, "float16", None)
    rows = tensor_layout.rows(made, spec.input)
    assert (rows.bounds % 16 == 0).all()
    assert ((rows.offsets < 0) == (rows.places < 0)).all()
    kept = [p + f * s for (first, last), s in zip(rows.bounds[:, [0, -1]], rows.strides, strict=True)
            for p in rows.places[first:last] if p >= 0 for f in range(16)]  # fmt: skip
    assert sorted(kept) == list(range(made.values_shape[0] * made.values_shape[1]))
    assert rows.offsets.max() < spec.input.units


@pytest.mark.parametrize("together", [1, 2, 4])
def test_rows_of_a_set_of_blocks_are_neighbours(together):
    made, tile = CASE.plan(), USED.forward_spec(None, "float16", None).input
    rows, alone = tensor_layout.rows(made, tile, together), tensor_layout.rows(made, tile)
    chunks = alone.bounds.shape[1] - 1
    assert rows.bounds.shape == (-(-5 // together), chunks * together + 1)
    assert (rows.bounds[1:, 0] == rows.bounds[:-1, -1]).all()
    assert rows.bounds[-1, -1] == len(rows.places) == 16 * len(rows.step_strides)
    for number, chunk in product(range(5), range(chunks)):
        in_set = chunk * together + number % together
        (first, end), (begin, last) = rows.bounds[number // together, in_set:][:2], alone.bounds[number, chunk:][:2]
        for found, wanted in ((rows.places, alone.places), (rows.offsets, alone.offsets)):
            assert (found[first:end] == wanted[begin:last]).all()
        assert (rows.step_strides[first // 16 : end // 16] == rows.strides[number]).all()
    of_chunk = np.diff(rows.bounds[:, ::together]) // 16
    most = tensor_layout.most_steps(made, tile.channels, together)
    assert most == (of_chunk.max(), of_chunk.sum(1).max())


def test_blocks_of_threads_walk_over_several_views():
    spec = USED.forward_spec(None, "float16", None)
    walks, splits = tensor_estimate.walks_and_splits(3, spec, CASE.plan(), SHARED)
    assert 1 < splits < walks
    assert walks % splits  # and several chunks of channels
    assert spec.input.channels < 17


def test_kernels_are_ordered_against_bank_conflicts():
    kernels = [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (2, (4, 5, 6, 7)), (3, (12, 13, 14, 15))]
    ordered = tensor_layout.without_conflicts(kernels)
    assert sorted(ordered) == kernels
    for first, second in (ordered[:2], ordered[2:]):
        assert len({place % 8 for place in first[1] + second[1]}) == 8
    alone = [(0, (0, 1, 2)), (1, (5, 6, 7))]  # three rows do not divide eight: left as they are
    assert tensor_layout.without_conflicts(alone) == alone
    made = SharedCase(SQUARES, 16, 64, 8, (8, 8), (1, 1), (1, 1), 0.5, seed=1).plan()
    rows = tensor_layout.rows(made, tensor_tiling.Geometry.forward(made).tile((2, 8), 1, 64)).offsets
    eights = [rows[k : k + 8] for k in range(0, len(rows), 8) if (rows[k : k + 8] >= 0).all()]
    assert sum(len(set((eight % 8).tolist())) == 8 for eight in eights) > 0.7 * len(eights)


def test_channels_are_ordered_against_bank_conflicts():
    members = [(channel, number) for number, channel in enumerate((0, 1, 4, 5, 8, 10, 13, 15, 16, 20, 21))]
    ordered = tensor_layout.spread_over_banks(members)
    assert sorted(ordered) == members
    assert {channel % 4 for channel, _ in ordered[:4]} == {0, 1, 2, 3}
    assert [len({channel % 4 for channel, _ in ordered[start : start + 4]}) for start in (4, 8)] == [2, 2]


def test_jobs_hold_every_kernel_once():
    made, spec = CASE.plan(), USED.input_spec(None, "float16", None)
    jobs = tensor_layout.input_jobs(made, spec)
    columns = 8 * spec.columns
    # The tap at the lower right of a kernel is the first one of the rotated kernel: pixels look back.
    rotated = tensor_layout.tap_places(SQUARES.rotated(), spec.input)
    patterns = {tuple(places[::-1]): number for number, places in enumerate(rotated)}
    for number, block in enumerate(tensor_layout.blocks(made)):
        found = []
        for part, first in enumerate(range(0, 17, spec.channels)):
            start, kernels = jobs.kernels[part, number]
            assert start == (block.base + sum(c < first for c in block.channels)) * 4
            for word in jobs.words[jobs.bounds[part, number] : jobs.bounds[part, number + 1]]:
                tiles, taps, channels, places = word[0], word[1:5], word[5 : 5 + columns], word[5 + columns :]
                found += [(first + c, patterns[tuple(taps)]) for c in channels if c >= 0]
                assert 8 * tiles >= (channels >= 0).sum() > 8 * (tiles - 1)
                assert places.max() < kernels
        assert sorted(found) == list(zip(block.channels, block.patterns, strict=True))


GPUS = {"sm_80": Limits(163 << 10, 108), "sm_90": Limits(227 << 10, 132)}
LAYERS = {
    "64x32": SharedCase(SQUARES, 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1),
    "256x8": SharedCase(SQUARES, 256, 256, 128, (8, 8), (1, 1), (1, 1), 1.0, 1),
    "512x2": SharedCase(SQUARES, 512, 512, 128, (2, 2), (1, 1), (1, 1), 0.28, 1),
    "128x56/2": SharedCase(SQUARES, 128, 64, 64, (56, 56), (2, 2), (1, 1), 0.28, 1),
    "256x7, twelve patterns": SharedCase(official_pool(12), 256, 256, 64, (7, 7), (1, 1), (1, 1), 0.28, 1),
    "five by five": SharedCase(full_pool(5), 64, 64, 64, (14, 14), (1, 1), (2, 2), 0.3, 1),
    "pointwise": SharedCase(full_pool(1), 256, 256, 64, (14, 14), (1, 1), (0, 0), 0.3, 1),
}
KERNELS = {"forward": {"tensor_forward"}, "input": {"tensor_input"}, "values": {"tensor_values", "tensor_finish"}}


def compile_unit(name, function, gpu, batch_last):
    """Compile a unit as the backend chooses it for a layer; return its shared memory and what its kernels use."""
    made = LAYERS[name].plan()
    spec = getattr(tensor_tiling, f"{function}_spec")(made, "bfloat16", GPUS[gpu], batch_last)
    shared = spec.shared_bytes
    if function == "input":
        found = tensor_layout.input_jobs(made, spec)
        shared += spec.weight_bytes(int(found.kernels[..., 1].max())) + spec.job_bytes(int(np.diff(found.bounds).max()))
    elif function == "forward":
        shared += tensor_estimate.row_bytes(spec, made)
    return shared, nvrtc.compile_for(tensor_text.unit(spec), gpu)


@pytest.fixture(scope="module")
def compiling():
    """Compile all units, two at a time, while the tests look at the first ones."""
    pool = ThreadPoolExecutor(2)
    units = product(LAYERS, KERNELS, GPUS, (False, True))
    yield {unit: pool.submit(compile_unit, *unit) for unit in units}
    pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(not nvrtc.libraries(), reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("batch_last", [False, True])
def test_registers_and_no_spills(name, function, gpu, batch_last, compiling):
    shared, found = compiling[name, function, gpu, batch_last].result()
    assert shared <= GPUS[gpu].shared_bytes
    assert set(found) == KERNELS[function]
    for kernel, resources in found.items():
        assert resources.spilled_bytes == resources.stack_bytes == 0, (kernel, resources)
        # 16 warps of 128 registers fill a multiprocessor.
        assert resources.registers <= (40 if kernel == "tensor_finish" else 128), (kernel, resources)


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
