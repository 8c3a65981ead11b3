"""The CPU kernels against float64 on thousands of random convolutions, with outputs poisoned beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.kernels.cpu import backend, codegen, library, memory, passes, tuning
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.passes import prepare
from clicktrain.kernels.cpu.tiles import Choice
from clicktrain.patterns import PatternPool, all_patterns, full_pool, official_pool
from tests.kernels.cases import Case, cases, expected, relative_error

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

GENERIC_CASES, SPECIALISED_CASES = 2500, 500
MINE = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
seen: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that a place that is not written shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "empty", lambda *shape: torch.full(shape, torch.nan))
        yield


def check(case: Case) -> None:
    """Compare all three functions, on NCHW tensors and on blocked activations."""
    made, x, values, dy = case.operands()
    want = expected(made, x, values, dy)
    got = {
        "forward": backend.forward(x, values, made),
        "grad_input": backend.grad_input(dy, values, made),
        "grad_values": backend.grad_values(x, dy, made),
    }
    for name, result in got.items():
        assert relative_error(result, want[name]) < 1e-5, f"{name} of {case}"
    xb, dyb = backend.pack(x), backend.pack(dy)
    y = backend.unpack(backend.forward_blocked(xb, values, made), case.images)
    dx = backend.unpack(backend.grad_input_blocked(dyb, values, made), case.images)
    assert relative_error(y, want["forward"]) < 1e-5, f"forward_blocked of {case}"
    assert relative_error(dx, want["grad_input"]) < 1e-5, f"grad_input_blocked of {case}"
    assert relative_error(backend.grad_values_blocked(xb, dyb, made), want["grad_values"]) < 1e-5


def count(case: Case) -> None:
    """Remember what was checked."""
    seen["cases"] += 1
    seen["large"] += case.is_large


@settings(MINE, max_examples=GENERIC_CASES)
@given(cases())
def test_generic_kernels(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen, "MAX_PATTERNS", 0)  # the generic sweep for every pool
        tuning.forget()
        check(case)
        count(case)


# The specialised kernels are compiled for pool, size and stride, so these come from short lists.
POOLS: tuple[PatternPool, ...] = (official_pool(4), official_pool(12), all_patterns(1), all_patterns(9))
GEOMETRIES = (
    ((6, 6), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1)), ((7, 9), (1, 1), (0, 2)),
    ((8, 7), (2, 2), (1, 1)), ((5, 6), (2, 2), (0, 0)), ((8, 12), (1, 1), (1, 1)),
)  # fmt: skip


@st.composite
def specialised_cases(draw: st.DrawFn) -> Case:
    """Any channels, batch and density on a few geometries."""
    size, stride, padding = draw(st.sampled_from(GEOMETRIES))
    channels = st.integers(65, 90) if draw(st.booleans()) else st.integers(1, 40)
    return Case(
        draw(st.sampled_from(POOLS)), draw(channels), draw(channels), draw(st.sampled_from((8, 11, 16, 19))), size,
        stride, padding, draw(st.sampled_from((0.05, 0.3, 1.0))), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


@settings(MINE, max_examples=SPECIALISED_CASES)
@given(specialised_cases())
def test_specialised_kernels(case: Case) -> None:
    tuning.forget()
    check(case)
    count(case)


@st.composite
def wide_layers(draw: st.DrawFn) -> Case:
    """Small images with so many filters or channels that no cache holds an image, or the sums."""
    pool, size, padding = draw(
        st.sampled_from(
            (
                (official_pool(4), (4, 4), 1),
                (official_pool(4), (2, 2), 1),
                (full_pool(1), (4, 4), 0),
                (full_pool(1), (7, 7), 0),
            )
        )
    )
    many, few = draw(st.integers(1000, 9000)), draw(st.integers(1, 9))
    filters, channels = draw(st.permutations((many, few)))
    return Case(
        pool, filters, channels, draw(st.integers(1, 17)), size, (1, 1), (padding,) * 2,
        draw(st.sampled_from((0.01, 0.1, 1.0))), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


@settings(MINE, max_examples=60)
@given(wide_layers())
def test_wide_layers(case: Case) -> None:
    tuning.forget()
    check(case)


@st.composite
def large_kernels(draw: st.DrawFn) -> Case:
    """Dense 5x5 and 7x7 convolutions, whose weights are more than registers."""
    kernel_size, size, stride = draw(
        st.sampled_from(((5, (9, 12), (1, 1)), (5, (8, 7), (2, 2)), (7, (14, 13), (2, 2)), (7, (6, 8), (1, 1))))
    )
    return Case(
        full_pool(kernel_size), draw(st.integers(1, 20)), draw(st.integers(1, 12)), draw(st.sampled_from((8, 19))),
        size, stride, (kernel_size // 2,) * 2, draw(st.sampled_from((0.3, 1.0))), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


SWEEPS: tuple[tuple[codegen.Sweep, tuple[int, int, int], int], ...] = (
    ("channel_pairs", (1, 2, 4), 1), ("channel_pairs", (1, 4, 2), 1), ("channels", (1, 1, 4), 1),
    ("channels", (1, 2, 4), 1), ("filters", (2, 2, 4), 2), ("filters", (1, 3, 3), 3), ("filter_pairs", (1, 3, 4), 1),
    ("filter_pairs", (2, 1, 6), 2), ("filter_blocks", (2, 2, 4), 2),
)  # fmt: skip
"""With tile and band."""


@settings(MINE, max_examples=100)
@given(st.one_of(specialised_cases(), large_kernels()), st.integers(1, 90), st.integers(1, 4))
def test_every_sweep(case: Case, channel_block: int, group: int) -> None:
    """All tiles, whatever the heuristic would choose."""
    made, x, values, dy = case.operands()
    want = expected(made, x, values, dy)
    for name, layer, source in (
        ("forward", Layer.forward(made), backend.pack(x)), ("grad_input", Layer.transposed(made), backend.pack(dy)),
    ):  # fmt: skip
        blocks = len(source)
        for sweep, tile, band in SWEEPS:
            register = codegen.REGISTERS[sweep]
            if register.name == "Pair" and library.instruction_set() != "avx512":
                continue
            if register.pixels == 2 and max(layer.spread) > 1:
                continue
            if tile[1] % layer.spread[0] or tile[2] % layer.spread[1]:
                continue
            choice = Choice(sweep, tile, band, channel_block, group)
            prepared = prepare(layer, blocks, choice)
            y = memory.empty(blocks, layer.filters, *layer.out_size, 8)
            library.function("convolve")(prepared.address, source.data_ptr(), values.data_ptr(), y.data_ptr(), 2)
            assert relative_error(backend.unpack(y, case.images), want[name]) < 1e-5, f"{choice} {case}"


@st.composite
def few_pixels(draw: st.DrawFn) -> Case:
    """Layers of few tiles, kept densely, sparsely or but for a kernel or none; patterns of 1 to 9 entries."""
    entries = draw(st.sampled_from((1, 3, 4, 9)))
    size, stride, padding = draw(
        st.sampled_from((((4, 4), (1, 1), 1), ((2, 2), (1, 1), 1), ((5, 7), (2, 2), 1), ((1, 1), (1, 1), 1)))
    )
    return Case(
        PatternPool(all_patterns(entries).patterns[-5:]), draw(st.integers(1, 90)), draw(st.integers(1, 90)),
        draw(st.integers(1, 9)), size, stride, (padding,) * 2, draw(st.sampled_from((0.002, 0.05, 0.3, 1.0))),
        draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


@settings(MINE, max_examples=200)
@given(few_pixels(), st.sampled_from(((1, 2, 4), (1, 4, 2), (1, 1, 2))), st.integers(1, 90))
def test_weights_from_the_values(case: Case, tile: tuple[int, int, int], channel_block: int) -> None:
    """The bits are those of gathered weights, however many tiles there are."""
    made, x, values, dy = case.operands()
    if not len(values):
        return
    want = expected(made, x, values, dy)
    for name, layer, source in (
        ("forward", Layer.forward(made), backend.pack(x)), ("grad_input", Layer.transposed(made), backend.pack(dy)),
    ):  # fmt: skip
        if tile[1] % layer.spread[0] or tile[2] % layer.spread[1]:
            continue
        sweeps: list[codegen.Sweep] = ["channels"]
        if library.instruction_set() == "avx512" and layer.spread == (1, 1):
            sweeps.append("channel_pairs")
        for sweep in sweeps:
            choice = Choice(sweep, tile, 1, channel_block, len(case.pool))
            gathered, read = (weights_from(source, values, layer, choice, reads_values=r) for r in (False, True))
            assert torch.equal(gathered, read), f"{name} {choice} {case}"
            assert relative_error(backend.unpack(read, case.images), want[name]) < 1e-5, f"{name} {choice} {case}"


def weights_from(source: Tensor, values: Tensor, layer: Layer, choice: Choice, reads_values: bool) -> Tensor:
    """Return the result of a pass that reads the values, or gathers them, whatever its tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_reads_values", lambda *_: reads_values)
        prepared = prepare(layer, len(source), choice)
    assert prepared.structure.reads_values == reads_values
    y = memory.empty(len(source), layer.filters, *layer.out_size, 8)
    library.function("convolve")(prepared.address, source.data_ptr(), values.data_ptr(), y.data_ptr(), 2)
    return y


def test_enough_cases_were_large() -> None:
    print(f"{seen['cases']} cases, {seen['large']} of them cross a channel block, a tile and a block of images")
    assert seen["cases"] >= GENERIC_CASES + SPECIALISED_CASES
    assert seen["large"] >= seen["cases"] / 4
