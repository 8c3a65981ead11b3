"""The CPU backend: threads, instruction sets, layouts, degenerate layers, tuned choices, bad operands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.kernels import Plan, plan
from clicktrain.kernels.cpu import backend, estimates, gradients, library, passes, runtime, tuning
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.patterns import PRUNED, all_patterns, full_pool, official_pool
from tests.kernels.cases import Case, expected, relative_error

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

SQUARES = official_pool(4)
LARGE = Case(SQUARES, 70, 67, 19, (9, 6), (1, 1), (1, 1), 0.3, seed=1)
CASES = {
    "stride 1": LARGE,
    "stride 2": Case(SQUARES, 70, 67, 19, (9, 6), (2, 2), (1, 1), 0.3, seed=2),
    "one image": Case(SQUARES, 30, 67, 1, (11, 9), (1, 1), (1, 1), 0.3, seed=3),
    "pointwise": Case(full_pool(1), 70, 67, 9, (7, 5), (2, 2), (0, 0), 0.3, seed=4),
    "filters in parts": Case(SQUARES, 150, 20, 40, (4, 4), (1, 1), (1, 1), 0.9, seed=5),
}


def run(case: Case) -> dict[str, Tensor]:
    made, x, values, dy = case.operands()
    return {
        "forward": backend.forward(x, values, made),
        "grad_input": backend.grad_input(dy, values, made),
        "grad_values": backend.grad_values(x, dy, made),
        "forward_blocked": backend.forward_blocked(backend.pack(x), values, made),
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_are_bitwise_the_same_for_any_number_of_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 64_000)  # several chunks
    monkeypatch.setattr(gradients, "cache_bytes", lambda level: 64_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        runtime.forget()
        results.append(run(case))
    runtime.forget()
    torch.set_num_threads(before)
    for result in results[1:]:
        for name, tensor in result.items():
            assert torch.equal(tensor, results[0][name]), name


def test_small_images_of_which_no_cache_holds_one() -> None:
    case = Case(SQUARES, 300, 20, 16, (4, 4), (1, 1), (1, 1), 0.05, seed=6)
    made, x, values, dy = case.operands()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "cache_bytes", lambda level: 1 << 14)
        runtime.forget()
        got = backend.grad_values(x, dy, made)
    runtime.forget()
    assert relative_error(got, expected(made, x, values, dy)["grad_values"]) < 1e-5


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_outputs_that_bypass_the_caches_are_the_same(stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SQUARES, 70, 67, 19, (13, 16), stride, (1, 1), 0.3, seed=5)
    stored = run(case)
    monkeypatch.setattr(passes, "STREAMED_BYTES", 0)
    runtime.forget()
    made = case.plan()
    prepared = runtime.runtime_of(made).forward.structure
    streamed = run(case)
    runtime.forget()
    assert prepared.streaming
    for name, tensor in stored.items():
        assert torch.equal(streamed[name], tensor), name


def convolve(layer: Layer, blocks: int, choice: passes.Choice, xb: Tensor, values: Tensor) -> Tensor:
    y = torch.full((blocks, layer.filters, *layer.out_size, 8), torch.nan)
    prepared = passes.prepare(layer, blocks, choice)
    library.function("convolve")(prepared.address, xb.data_ptr(), values.data_ptr(), y.data_ptr(), 2)
    return y


@pytest.mark.parametrize("direction", [Layer.forward, Layer.transposed])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_bits_depend_on_the_channel_block_only(stride: int, direction: Callable[[Plan], Layer]) -> None:
    made, x, values, dy = Case(SQUARES, 40, 70, 19, (9, 10), (stride,) * 2, (1, 1), 0.3, seed=1).operands()
    layer = direction(made)
    source = backend.pack(x if direction == Layer.forward else dy)
    choices = [
        passes.Choice(sweep, tile, band, 32, group)
        for sweep, tile, band, group in (
            ("taps", passes.taps_tile(layer), 1, 1),
            ("taps", passes.taps_tile(layer), 3, 1),
            ("filters", (1, 2, 4), 2, 4),
            ("filters", (2, 2, 2), 1, 2),
            ("filters", (1, 4, 2), 9, 3),
            ("filter_pairs", (1, 2, 4), 2, 4),
            ("filter_pairs", (2, 1, 6), 1, 2),
            ("filter_blocks", (2, 2, 4), 2, 4),
            ("filter_blocks", (2, 4, 2), 3, 2),
        )
        if sweep in ("taps", "filters")
        or (library.instruction_set() == "avx512" and (sweep == "filter_blocks" or layer.spread == (1, 1)))
    ]
    first, *others = (convolve(layer, 3, choice, source, values) for choice in choices)
    assert torch.isfinite(first).all()
    for choice, other in zip(choices[1:], others, strict=True):
        assert torch.equal(first, other), choice


@pytest.mark.parametrize("direction", [Layer.forward, Layer.transposed])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("filters", [40, 300])
def test_channel_by_channel_gives_the_bits_of_one_channel_to_a_block(
    filters: int, stride: int, direction: Callable[[Plan], Layer]
) -> None:
    made, x, values, dy = Case(SQUARES, filters, 70, 19, (9, 10), (stride,) * 2, (1, 1), 0.3, seed=1).operands()
    layer = direction(made)
    source = backend.pack(x if direction == Layer.forward else dy)
    want = convolve(layer, 3, passes.Choice("taps", passes.taps_tile(layer), 1, 1, 1), source, values)
    for tile, channel_block in (((1, 2, 2), 64), ((1, 2, 4), 16), ((1, 4, 2), 255), ((1, 4, 6), 1)):
        for sweep in ("channels", "channel_pairs"):
            choice = passes.Choice(sweep, tile, 1, channel_block, 4)
            if sweep == "channel_pairs" and (
                max(layer.spread) > 1 or tile[2] % 2 or library.instruction_set() != "avx512"
            ):
                continue
            assert torch.equal(convolve(layer, 3, choice, source, values), want), choice


@pytest.mark.parametrize("name", library.INSTRUCTION_SETS)
def test_every_instruction_set_of_this_machine(name: str) -> None:
    program = (
        "from tests.kernels.test_cpu_backend import CASES, run, expected, relative_error\n"
        "for case in CASES.values():\n"
        "    want, got = expected(*case.operands()), run(case)\n"
        "    assert all(relative_error(got[name], want[name]) < 1e-5 for name in want)\n"
    )
    environment = {**os.environ, "CLICKTRAIN_ISA": name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if f"CLICKTRAIN_ISA={name}: this machine does not have it" in done.stderr:
        pytest.skip(f"no {name} here")
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKTRAIN_ISA", "mmx")
    library.instruction_set.cache_clear()
    assert "CLICKTRAIN_ISA=mmx: expected one of avx512, avx2, portable" in str(backend.available())
    library.instruction_set.cache_clear()


@pytest.mark.parametrize("images", [1, 7, 8, 9, 20])
def test_pack_and_unpack_are_inverse_and_fill_with_zeros(images: int) -> None:
    x = torch.randn(images, 3, 5, 7)
    xb = backend.pack(x)
    assert xb.shape == (-(-images // 8), 3, 5, 7, 8)
    assert torch.equal(backend.unpack(xb, images), x)
    by_image = xb.permute(0, 4, 1, 2, 3).reshape(-1, 3, 5, 7)
    assert torch.equal(by_image[:images], x)
    assert not by_image[images:].any()


def test_padding_lanes_stay_zero() -> None:
    made, x, values, _ = Case(SQUARES, 20, 20, 3, (6, 6), (1, 1), (1, 1), 0.5, seed=1).operands()
    y = backend.forward_blocked(backend.pack(x), values, made)
    assert not y[..., 3:].any()


def one_pattern(index: list[list[int]]) -> Plan:
    return plan(torch.tensor(index, dtype=torch.uint8), SQUARES, (2, len(index[0]), 5, 5), 1, 1)


@pytest.mark.parametrize(
    "index",
    [[[PRUNED] * 3] * 4, [[0] * 3] * 4, [[1, 2, 3], [PRUNED] * 3, [0, PRUNED, PRUNED]], [[PRUNED, 1], [PRUNED, 2]]],
    ids=["all pruned", "nothing pruned", "a filter without kernels", "an unused channel"],
)
def test_degenerate_layers(index: list[list[int]]) -> None:
    made = one_pattern(index)
    x, values, dy = torch.randn(made.input_shape), torch.randn(made.values_shape), torch.randn(made.output_shape)
    want = expected(made, x, values, dy)
    assert relative_error(backend.forward(x, values, made), want["forward"]) < 1e-5
    assert relative_error(backend.grad_input(dy, values, made), want["grad_input"]) < 1e-5
    assert relative_error(backend.grad_values(x, dy, made), want["grad_values"]) < 1e-5


def test_empty_batch_gives_empty_results() -> None:
    made = plan(torch.zeros(4, 3, dtype=torch.uint8), SQUARES, (0, 3, 5, 5), 1, 1)
    x, values, dy = torch.zeros(made.input_shape), torch.ones(made.values_shape), torch.zeros(made.output_shape)
    assert backend.forward(x, values, made).shape == (0, 4, 5, 5)
    assert backend.grad_input(dy, values, made).shape == (0, 3, 5, 5)
    assert not backend.grad_values(x, dy, made).any()
    assert backend.forward_blocked(backend.pack(x), values, made).shape == (0, 4, 5, 5, 8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_input_spreads_through_kept_taps_only(bad: float) -> None:
    made, x, values, _ = Case(SQUARES, 9, 10, 9, (6, 6), (1, 1), (1, 1), 0.3, seed=5).operands()
    x[1, 2, 3, 3] = bad
    want = expected(made, x, values, torch.zeros(made.output_shape))["forward"]
    got = backend.forward(x, values, made)
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))
    finite = torch.isfinite(want)
    assert torch.allclose(got[finite].double(), want[finite], atol=1e-5)
    assert not finite.all()


def test_tuned_choices_survive_a_checkpoint() -> None:
    made, x, values, _ = Case(SQUARES, 40, 70, 9, (8, 8), (1, 1), (1, 1), 0.3, seed=1).operands()
    xb = backend.pack(x)
    (chosen,) = runtime.tune([made])
    assert set(chosen) == {"forward", "grad_input"}
    y = backend.forward_blocked(xb, values, made)
    stored = tuning.export_choices()
    layer = Layer.forward(made)
    assert tuning.choice_for(layer, 2) == chosen["forward"]

    other = passes.Choice("taps", passes.taps_tile(layer), 1, 8, 1)
    tuning.import_choices({tuning.fingerprint(layer, 2): asdict(other)})
    runtime.forget()
    assert not torch.equal(backend.forward_blocked(xb, values, made), y)  # another order of sums
    tuning.import_choices(stored)
    runtime.forget()
    assert torch.equal(backend.forward_blocked(xb, values, made), y)
    assert runtime.tune([made]) == [chosen]  # from disk


@pytest.mark.parametrize(
    "fields", [{}, {"sweep": "magic", "tile": [1, 2, 4], "band": 1, "channel_block": 8, "group": 1}, None,
               {"sweep": "taps", "tile": [1, 2, 4], "band": 1, "channel_block": 70000, "group": 1},
               {"sweep": "channel_pairs", "tile": [1, 2, 3], "band": 1, "channel_block": 8, "group": 1},
               {"sweep": "channels", "tile": [2, 2, 2], "band": 1, "channel_block": 8, "group": 1}],
)  # fmt: skip
def test_choices_of_a_damaged_checkpoint_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="choice some-key"):
        tuning.import_choices({"some-key": fields})


def test_choices_of_older_files_are_understood() -> None:
    fields = {"sweep": "pairs", "tile": [1, 2, 4], "band": 1, "channel_block": 8, "group": 4}
    tuning.import_choices({"old": fields})
    assert tuning.export_choices()["old"] == {**fields, "sweep": "channel_pairs", "tile": (1, 2, 4)}
    tuning.forget()


def test_bad_operands_are_named() -> None:
    made, x, values, dy = Case(SQUARES, 9, 10, 9, (6, 6), (1, 1), (1, 1), 0.3, seed=5).operands()
    with pytest.raises(InvalidArgument, match=r"x is torch.float64: .* torch.float32"):
        backend.forward(x.double(), values, made)
    with pytest.raises(InvalidArgument, match=r"x is torch.int32"):
        backend.grad_values(x.int(), dy, made)
    with pytest.raises(InvalidArgument, match="x is on meta: the cpu backend"):
        backend.forward(x.to("meta"), values, made)
    with pytest.raises(InvalidArgument, match=r"x has shape \(9, 9, 6, 6\): the plan expects \(9, 10, 6, 6\)"):
        backend.forward(x[:, :9], values, made)
    with pytest.raises(InvalidArgument, match="values has shape"):
        backend.grad_input(dy, values[1:], made)
    with pytest.raises(InvalidArgument, match="xb has shape"):
        backend.forward_blocked(backend.pack(x)[:1], values, made)
    with pytest.raises(InvalidArgument, match="n=3: xb holds 2 blocks"):
        backend.unpack(backend.pack(x), 3)


def test_operands_need_not_be_contiguous() -> None:
    made, x, values, dy = LARGE.operands()
    y = backend.forward(x, values, made)
    assert torch.equal(backend.forward(x.to(memory_format=torch.channels_last), values.T.contiguous().T, made), y)
    assert torch.equal(backend.grad_values(x.transpose(2, 3).contiguous().transpose(2, 3), dy, made),
                       backend.grad_values(x, dy, made))  # fmt: skip


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
