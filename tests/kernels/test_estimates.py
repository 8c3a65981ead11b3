"""Which ways to cut up a pass the CPU backend takes unmeasured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clicktrain.kernels import plan
from clicktrain.kernels.cpu import backend, estimates
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.patterns import all_patterns, full_pool, official_pool
from tests.kernels.cases import Case

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

SQUARES = official_pool(4)


def test_a_pool_of_all_patterns_uses_the_generic_kernel() -> None:
    random = np.random.default_rng(0)
    index = torch.from_numpy(random.integers(0, 126, (12, 9)).astype(np.uint8))
    made = plan(index, all_patterns(4), (8, 9, 6, 6), 1, 1)
    assert estimates.estimate(Layer.forward(made), 1).sweep == "taps"


@pytest.mark.parametrize(
    ("instruction_set", "stride", "size", "tile"),
    [
        ("avx512", 1, 2, (1, 2, 2)),  # the window is the image
        ("avx512", 1, 4, (1, 4, 4)),
        ("avx512", 1, 7, (1, 4, 4)),  # every window lies at an edge
        ("avx512", 1, 12, None),  # few channels
        ("avx512", 2, 2, (1, 1, 1)),  # one output pixel
        ("avx2", 2, 12, (1, 1, 2)),
        ("avx2", 1, 12, (1, 3, 4)),  # of the window what one pattern reads
        ("avx2", 1, 2, (1, 2, 2)),
        ("portable", 1, 12, None),
    ],
)
def test_layers_go_channel_by_channel_where_the_window_fits(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, stride: int, size: int, tile: tuple[int, int, int] | None
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: instruction_set)
    monkeypatch.setattr(estimates, "wide_registers", lambda: False)
    made = Case(SQUARES, 16, 16, 16, (size, size), (stride,) * 2, (1, 1), 0.3, seed=0).plan()
    choice = estimates.estimate(Layer.forward(made), 2)
    assert (choice.sweep, choice.tile if tile else None) == ("channels" if tile else "filters", tile)


@pytest.mark.parametrize(
    ("wide", "channels", "size", "padding", "stride", "sweep"),
    [
        (False, 64, 12, 1, 1, "channel_pairs"),
        (False, 64, 8, 1, 1, "channels"),
        (False, 64, 9, 0, 1, "channel_pairs"),  # a strip
        (False, 16, 12, 1, 1, "filters"),
        (False, 32, 12, 1, 1, "filters"),
        (False, 16, 12, 1, 2, "channel_pairs"),
        (False, 64, 12, 1, 2, "channel_pairs"),
        (True, 16, 12, 1, 1, "channel_pairs"),
        (True, 64, 7, 1, 1, "channel_pairs"),
        (True, 64, 2, 1, 1, "channel_pairs"),
        (True, 64, 12, 1, 2, "channel_pairs"),
        (True, 64, 1, 1, 1, "channels"),
    ],
)
def test_pairs_of_pixels_where_registers_are_wide_or_little_is_padding(
    monkeypatch: pytest.MonkeyPatch, wide: bool, channels: int, size: int, padding: int, stride: int, sweep: str
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(estimates, "wide_registers", lambda: wide)
    made = Case(official_pool(4), 64, channels, 16, (size, size), (stride,) * 2, (padding,) * 2, 0.3, seed=0).plan()
    assert estimates.estimate(Layer.forward(made), 1).sweep == sweep


@pytest.mark.parametrize(("size", "tile"), [
    ((1, 1), (1, 1)), ((1, 2), (1, 2)), ((3, 1), (2, 1)), ((2, 3), (2, 2)), ((1, 9), (1, 4)), ((9, 9), (3, 4)),
])  # fmt: skip
def test_small_outputs_are_one_tile_where_a_tile_can_be_as_large(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(estimates, "wide_registers", lambda: False)
    made = Case(SQUARES, 16, 16, 16, size, (1, 1), (1, 1), 0.3, seed=0).plan()
    assert estimates.estimate(Layer.forward(made), 2).tile == (1, *tile)


@pytest.mark.parametrize(("filters", "size", "pooled", "tile"), [
    (40, 12, False, (3, 4)), (40, 12, True, (2, 4)), (40, 8, False, (2, 4)), (100, 12, False, (2, 4)),
    (160, 12, False, (1, 4)), (160, 14, False, (2, 2)), (160, 8, False, (2, 4)),
])  # fmt: skip
def test_tiles_are_larger_where_runs_are_shorter(
    monkeypatch: pytest.MonkeyPatch, filters: int, size: int, pooled: bool, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(estimates, "filters_at_once", lambda _: 64)
    made = Case(official_pool(4), filters, 12, 16, (size, size), (1, 1), (1, 1), 0.3, seed=0).plan()
    assert estimates.estimate(Layer.forward(made), 2, pooled).tile == (1, *tile)


@pytest.mark.parametrize(("wide", "blocks", "size", "stride", "sweep"), [
    (True, 2, 8, 1, "filter_blocks"), (True, 1, 8, 1, "channel_pairs"), (False, 2, 8, 1, "channels"),
    (True, 2, 16, 1, "channel_pairs"), (True, 2, 8, 2, "channel_pairs"), (True, 2, 1, 1, "channels"),
])  # fmt: skip
def test_small_images_of_two_blocks_share_registers_where_those_are_wide(
    monkeypatch: pytest.MonkeyPatch, wide: bool, blocks: int, size: int, stride: int, sweep: str
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(estimates, "wide_registers", lambda: wide)
    made = Case(SQUARES, 64, 64, 16, (size, size), (stride,) * 2, (1, 1), 0.5, seed=0).plan()
    assert estimates.estimate(Layer.forward(made), blocks).sweep == sweep
    if stride > 1:
        assert estimates.estimate(Layer.transposed(made), blocks).sweep == "filter_blocks"
        assert estimates.estimate(Layer.transposed(made), 1).sweep == "filters"


@pytest.mark.parametrize(("instruction_set", "wide", "stride", "sweep", "channels"), [
    ("avx2", False, 1, "filters", 128), ("avx512", False, 1, "filters", 64), ("avx512", True, 1, "filter_pairs", 128),
    ("portable", False, 1, "taps", 64), ("avx2", False, 2, "filters", 128), ("avx512", False, 2, "filters", 64),
])  # fmt: skip
def test_1x1_convolutions_are_specialised_where_that_was_faster(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str, wide: bool, stride: int, sweep: str, channels: int
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: instruction_set)
    monkeypatch.setattr(estimates, "wide_registers", lambda: wide)
    monkeypatch.setattr(estimates, "cache_bytes", lambda _: 1 << 15)
    made = Case(full_pool(1), 16, 500, 16, (12, 12), (stride,) * 2, (0, 0), 0.3, seed=0).plan()
    choice = estimates.estimate(Layer.forward(made), 2)
    assert (choice.sweep, choice.channel_block) == (sweep, channels)
    if stride > 1:
        assert estimates.estimate(Layer.transposed(made), 2).sweep == "taps"  # pixels without any tap: not measured


@pytest.mark.parametrize(("size", "stride", "density", "tile", "channels"), [
    (56, 1, 0.3, (1, 14), 64), (32, 1, 0.3, (1, 8), 128), (7, 1, 0.3, (1, 7), 128), (4, 1, 0.3, (2, 4), 128),
    (17, 1, 0.3, (1, 8), 128), (2, 1, 0.3, (2, 2), 256), (56, 2, 0.3, (1, 8), 64), (56, 1, 1.0, (1, 14), 32),
])  # fmt: skip
def test_1x1_convolutions_go_by_rows_where_512_bits_take_two_steps(
    monkeypatch: pytest.MonkeyPatch, size: int, stride: int, density: float, tile: tuple[int, int], channels: int
) -> None:
    monkeypatch.setattr(estimates, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(estimates, "wide_registers", lambda: False)
    monkeypatch.setattr(estimates, "cache_bytes", lambda _: 1 << 15)
    made = Case(full_pool(1), 16, 600, 8, (size, size), (stride,) * 2, (0, 0), density, seed=0).plan()
    choice = estimates.estimate(Layer.forward(made), 1)
    assert (choice.sweep, choice.tile, choice.channel_block) == ("filters", (1, *tile), channels)
