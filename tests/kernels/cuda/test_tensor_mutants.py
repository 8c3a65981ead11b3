"""The tensor-core kernels on the CPU: every barrier, wait and bound is needed, and a test notices its absence."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest

from clicktrain.kernels.cuda import codegen
from clicktrain.patterns import PatternPool
from tests.kernels.cases import relative_error
from tests.kernels.cuda.configurations import TOLERANCES, run
from tests.kernels.cuda.host import Fault, HostLauncher, on_host
from tests.kernels.cuda.shared import CASE, CONFIGURATIONS, SHARED, SQUARES, USED

ONE = PatternPool(tuple(SQUARES)[:1])
RESIDENT = USED.small(all_rows=True)
FUNCTIONS = ("forward", "grad_input", "grad_values")


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
PLACES = {"tensor.cuh": 10, "tensor_forward.cuh": 1, "tensor_input.cuh": 3, "finish.cuh": 1}
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
