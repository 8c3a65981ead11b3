"""Plans are pure data: printable, cached by content, quick to build; and the layout derived from them is right."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from clicktrain.errors import InvalidArgument
from clicktrain.kernels import plan
from clicktrain.kernels.cpu import passes, sweeps, tiles
from clicktrain.kernels.cpu.codegen import SweepSpec, TileShape
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.reorder import reorder
from clicktrain.kernels.cpu.runtime import Packing
from clicktrain.patterns import PRUNED, PatternPool, official_pool
from tests.kernels.cases import Case

SQUARES = official_pool(4)


def test_equal_content_gives_the_same_plan() -> None:
    index = torch.tensor([[0, PRUNED], [3, 1]], dtype=torch.uint8)
    first = plan(index, SQUARES, (8, 2, 6, 6), 1, 1)
    assert plan(index.clone(), official_pool(4), (8, 2, 6, 6), (1, 1), (1, 1)) is first
    assert plan(index, SQUARES, (8, 2, 6, 6), 2, 1) is not first
    index[0, 0] = 1
    assert plan(index, SQUARES, (8, 2, 6, 6), 1, 1) is not first
    assert first.index[0, 0] == 0  # the plan kept its own copy


def test_a_plan_prints_what_it_is() -> None:
    text = str(plan(torch.tensor([[0, PRUNED], [3, 3]], dtype=torch.uint8), SQUARES, (8, 2, 6, 6), 1, 1))
    assert "(8, 2, 6, 6) -> (8, 2, 6, 6)" in text
    assert "kernels: 3 of 4 kept, 1 to 2 in a filter" in text
    assert "weights: 12 kept, compression 3.00x, 3456 MACs" in text
    assert "pattern ##./##./...: 2 kernels" in text


@pytest.mark.parametrize(
    ("index", "shape", "stride", "message"),
    [
        ([[4]], (1, 1, 5, 5), 1, "index 4 is outside the pool of 4 patterns"),
        ([[0]], (1, 2, 5, 5), 1, r"input_shape=\(1, 2, 5, 5\): expected \(N, 1, H, W\)"),
        ([[0]], (1, 1, 5, 5), 0, r"stride=\(0, 0\)"),
        ([[0]], (1, 1, 2, 5), 1, "smaller than the 3x3 kernel"),
    ],
)
def test_what_cannot_be_planned_is_named(
    index: list[list[int]], shape: tuple[int, ...], stride: int, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        plan(torch.tensor(index, dtype=torch.uint8), SQUARES, shape, stride, 0)


def test_kernels_are_reordered_by_block_group_and_run_lengths() -> None:
    index = torch.tensor([[1, 0, PRUNED, 1, 0], [0, PRUNED, 2, 0, 0], [1, 1, PRUNED, PRUNED, 0]], dtype=torch.uint8)
    pool = PatternPool.from_masks([[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [0, 1]]])
    layer = Layer.forward(plan(index, pool, (8, 5, 6, 6), 1, 0))
    found = reorder(layer, channel_block=3, group=2, part=3)
    # Lists: channels 0-2 patterns 0-1, channels 0-2 pattern 2, then the same for channels 3-4.
    assert found.order.tolist() == [[2, 1, 0], [0, 2, 1], [2, 0, 1], [0, 1, 2]]
    assert found.runs[0].tolist() == [[0, 2], [1, 0], [1, 1]]
    assert found.runs[1].tolist() == [[0, 0], [0, 0], [1, 0]]
    names = ("filters", "channels", "patterns")
    rows = list(zip(*(getattr(found.kernels, name).tolist() for name in names), strict=True))
    assert rows[:5] == [(2, 0, 1), (2, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert found.places[:5].tolist() == [0, 0, 1, 2, 2]
    assert found.kernels.numbers.tolist()[:5] == [8, 9, 4, 1, 0]


def test_filters_stay_in_their_part() -> None:
    layer = Layer.forward(Case(SQUARES, 40, 30, 8, (6, 6), (1, 1), (1, 1), 0.3, seed=0).plan())
    found = reorder(layer, channel_block=16, group=2, part=16)
    assert found.order.shape == (4, 40)
    for order in found.order:
        assert [sorted(part) for part in (order[:16], order[16:32], order[32:])] == [
            list(range(16)), list(range(16, 32)), list(range(32, 40)),
        ]  # fmt: skip


def test_the_transposed_layer_turns_patterns_and_swaps_channels() -> None:
    index = torch.tensor([[0, PRUNED, 1]], dtype=torch.uint8)
    pool = PatternPool.from_masks([np.eye(3)[[0, 1, 2]], [[0, 1, 1], [0, 0, 1], [0, 0, 0]]])
    layer = Layer.transposed(plan(index, pool, (8, 3, 6, 6), 2, 1))
    assert (layer.filters, layer.channels, layer.reversed) == (3, 1, True)
    assert layer.kernels.filters.tolist() == [0, 2]
    assert [layer.patterns[p] for p in layer.kernels.patterns] == [(0, 4, 8), (3, 6, 7)]
    assert (layer.stride, layer.spread, layer.in_size, layer.out_size) == ((1, 1), (2, 2), (3, 3), (6, 6))


@pytest.mark.parametrize(("size", "tile", "spread"), [(32, 5, 1), (7, 2, 1), (9, 4, 2), (1, 8, 1), (13, 6, 3)])
def test_tiles_cover_an_axis_once_and_evenly(size: int, tile: int, spread: int) -> None:
    parts = tiles.cuts(size, tile, spread)
    assert [start for start, _ in parts] == [sum(length for _, length in parts[:i]) for i in range(len(parts))]
    assert sum(length for _, length in parts) == size
    assert all(1 <= length <= tile for _, length in parts)
    assert all(start % spread == 0 for start, _ in parts)


def test_few_images_are_cut_into_strips() -> None:
    made = Case(SQUARES, 4, 4, 1, (16, 16), (1, 1), (1, 1), 1.0, seed=0).plan()
    packing = Packing.of(Layer.forward(made), 1)
    assert packing.layer.padding == (0, 0)
    assert packing.layer.out_size[0] * packing.layer.out_size[1] * 8 == 16 * 16
    assert Packing.of(Layer.forward(made), 8).layer.out_size == (16, 16)


def test_generated_code_is_what_it_was() -> None:
    spec = SweepSpec("filters", "avx2", 3, ((0, 1), (4, 5)), 2, (1, 1), (1, 1), (0, 0), 3, 4, (1, 1, 2))
    text = sweeps.render(spec, (TileShape(1, 1, 2, (1, 3), (0, 4)),))
    body = [line.strip() for line in text.splitlines() if "run[" in line or "Vec" in line]
    assert body == [
        "const Vec start = broadcast(s->bias ? s->bias[filter] : 0.0f);",
        "Vec s0_0_0 = start, s0_0_1 = start;",
        "for (int n = run[0]; n; --n, ++offset, weight += 2) {",
        "const Vec w0 = broadcast(weight[0]);",
        "const Vec w1 = broadcast(weight[1]);",
        "for (int n = run[1]; n; --n, ++offset, weight += 2) {",
        "const Vec w0 = broadcast(weight[0]);",
        "const Vec w1 = broadcast(weight[1]);",
        "{ Vec x = load(channel + 40); s0_0_0 += w0 * x; }",
        "{ Vec x = load(channel + 48); pin(x); s0_0_1 += w0 * x; s0_0_0 += w1 * x; }",
        "{ Vec x = load(channel + 56); s0_0_1 += w1 * x; }",
    ]  # the window's first row is padding: nothing of pattern 0 is left


def test_taps_take_turns_at_the_chains() -> None:
    spec = SweepSpec("filters", "avx2", 3, ((0, 1, 4),), 1, (1, 1), (1, 1), (0, 0), 3, 4, (1, 1, 1), chains=2)
    lines = [line.strip() for line in sweeps.render(spec, (TileShape(1, 1, 1, (0, 3), (0, 3)),)).splitlines()]
    sums = [line.partition("x = ")[2] for line in lines if line.startswith("{ Vec x")]
    assert sums == [
        "load(channel + 0); s0_0_0 += w0 * x; }",
        "load(channel + 8); s0_0_0_1 += w1 * x; }",
        "load(channel + 40); s0_0_0 += w2 * x; }",
    ]
    assert lines.index("s0_0_0 += s0_0_0_1;") < lines.index("if (const float* residual = s->residual) {")


def test_a_network_is_planned_and_laid_out_in_milliseconds() -> None:
    shapes = [(64, 64, 32), (128, 64, 16), (128, 128, 16), (256, 128, 8), (256, 256, 8), (512, 256, 4), (512, 512, 4)]
    cases = [Case(SQUARES, f, c, 32, (s, s), (1, 1), (1, 1), 0.25, seed=f + c + s) for f, c, s in shapes]
    plans = [case.plan() for case in cases]
    choice = tiles.Choice("taps", (1, 2, 4), 1, 64, 1)
    start = time.perf_counter()
    for made in plans:
        passes.prepare(Layer.forward(made), 4, choice)
    assert time.perf_counter() - start < 2.0  # 0.15 s on an idle machine
