"""The CPU kernels against float64 on thousands of random convolutions, with outputs poisoned beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clicktrain.kernels.cpu import backend, codegen, library, memory, tuning
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.passes import Choice, prepare
from clicktrain.patterns import PatternPool, all_patterns, official_pool
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
    seen["cases"] += 1
    seen["large"] += case.is_large


@settings(MINE, max_examples=GENERIC_CASES)
@given(cases())
def test_generic_kernels(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen, "MAX_PATTERNS", 0)  # the generic sweep for every pool
        tuning.forget()
        check(case)


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


BY_CHANNEL = (("pairs", (1, 2, 4)), ("pairs", (1, 4, 2)), ("channels", (1, 2, 2)), ("channels", (1, 3, 3)))


@pytest.mark.skipif(
    library.available() is True and library.instruction_set() != "avx512", reason="sweeps by channel need AVX-512"
)
@settings(MINE, max_examples=100)
@given(specialised_cases(), st.integers(1, 90))
def test_sweeps_by_channel(case: Case, channel_block: int) -> None:
    """All tiles, in place and on copied windows, whatever the heuristic would choose."""
    made, x, values, dy = case.operands()
    want = expected(made, x, values, dy)
    for name, layer, source in (
        ("forward", Layer.forward(made), backend.pack(x)), ("grad_input", Layer.transposed(made), backend.pack(dy)),
    ):  # fmt: skip
        blocks = len(source)
        for (sweep, tile), in_place in product(BY_CHANNEL, (True, False)):
            if (sweep == "pairs" and max(layer.spread) > 1) or tile[1] % layer.spread[0]:
                continue
            choice = Choice(sweep, tile, 1, channel_block, len(layer.patterns))
            prepared = prepare(replace(layer, in_place=in_place), blocks, choice)
            y = memory.empty(blocks, layer.filters, *layer.out_size, 8)
            library.function("convolve")(prepared.address, source.data_ptr(), values.data_ptr(), y.data_ptr(), 2)
            assert relative_error(backend.unpack(y, case.images), want[name]) < 1e-5, f"{choice} {in_place} {case}"


def test_enough_cases_were_large() -> None:
    print(f"{seen['cases']} cases, {seen['large']} of them cross a channel block, a tile and a block of images")
    assert seen["cases"] >= GENERIC_CASES + SPECIALISED_CASES
    assert seen["large"] >= seen["cases"] / 4
