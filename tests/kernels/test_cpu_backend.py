"""The CPU backend: threads, instruction sets, layouts, degenerate layers, tuned choices, bad operands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.kernels import Plan, plan
from clicktrain.kernels.cpu import backend, gradients, library, passes, runtime, tiles, tuning
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.patterns import PRUNED, PatternPool, all_patterns, full_pool, official_pool
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
    monkeypatch.setattr(tiles, "STREAMED_BYTES", 0)
    runtime.forget()
    made = case.plan()
    prepared = runtime.runtime_of(made).forward.structure
    streamed = run(case)
    runtime.forget()
    assert prepared.streaming
    for name, tensor in stored.items():
        assert torch.equal(streamed[name], tensor), name


def convolve(layer: Layer, blocks: int, choice: tiles.Choice, xb: Tensor, values: Tensor) -> Tensor:
    return run_pass(passes.prepare(layer, blocks, choice), layer, xb, values)


def run_pass(prepared: passes.Prepared, layer: Layer, xb: Tensor, values: Tensor) -> Tensor:
    y = torch.full((len(xb), layer.filters, *layer.out_size, 8), torch.nan)
    library.function("convolve")(prepared.address, xb.data_ptr(), values.data_ptr(), y.data_ptr(), 2)
    return y


@pytest.mark.parametrize("direction", [Layer.forward, Layer.transposed])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_bits_depend_on_the_channel_block_only(stride: int, direction: Callable[[Plan], Layer]) -> None:
    made, x, values, dy = Case(SQUARES, 40, 70, 19, (9, 10), (stride,) * 2, (1, 1), 0.3, seed=1).operands()
    layer = direction(made)
    source = backend.pack(x if direction == Layer.forward else dy)
    choices = [
        tiles.Choice(sweep, tile, band, 32, group)
        for sweep, tile, band, group in (
            ("taps", tiles.taps_tile(layer), 1, 1),
            ("taps", tiles.taps_tile(layer), 3, 1),
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
    want = convolve(layer, 3, tiles.Choice("taps", tiles.taps_tile(layer), 1, 1, 1), source, values)
    for tile, channel_block in (((1, 2, 2), 64), ((1, 2, 4), 16), ((1, 4, 2), 255), ((1, 4, 6), 1)):
        for sweep in ("channels", "channel_pairs"):
            choice = tiles.Choice(sweep, tile, 1, channel_block, 4)
            if sweep == "channel_pairs" and (
                max(layer.spread) > 1 or tile[2] % 2 or library.instruction_set() != "avx512"
            ):
                continue
            assert torch.equal(convolve(layer, 3, choice, source, values), want), choice


@pytest.mark.parametrize("direction", [Layer.forward, Layer.transposed])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("entries", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("channel_block", [30, 8])
def test_weights_read_from_the_values_give_the_bits_of_gathered_ones(
    channel_block: int, entries: int, stride: int, direction: Callable[[Plan], Layer]
) -> None:
    pool = PatternPool(all_patterns(entries).patterns[:4])
    made, x, values, dy = Case(pool, 45, 30, 8, (3, 4), (stride,) * 2, (1, 1), 0.4, seed=7).operands()
    layer = direction(made)
    source, name = (x, "forward") if direction == Layer.forward else (dy, "grad_input")
    choice = tiles.Choice("channels", (1, 3, 4), 1, channel_block, len(pool))
    from_values, gathered = (passes.prepare(layer, 1, choice, packed=packed) for packed in (False, True))
    assert (from_values.structure.reads_values, gathered.structure.reads_values) == (1, 0)
    got = run_pass(from_values, layer, backend.pack(source), values)
    assert torch.equal(got, run_pass(gathered, layer, backend.pack(source), values))
    assert relative_error(backend.unpack(got, 8), expected(made, x, values, dy)[name]) < 1e-5


@pytest.mark.parametrize(
    ("tile", "size", "reads_values"),
    [((1, 2, 4), (4, 8), True), ((1, 2, 4), (5, 8), False), ((1, 2, 2), (4, 2), True), ((1, 2, 2), (4, 4), False)],
)
def test_few_tiles_read_the_values(tile: tuple[int, int, int], size: tuple[int, int], reads_values: bool) -> None:
    layer = Layer.forward(Case(SQUARES, 8, 8, 8, size, (1, 1), (1, 1), 0.5, seed=8).plan())
    prepared = passes.prepare(layer, 1, tiles.Choice("channels", tile, 1, 8, 4))
    assert prepared.structure.reads_values == reads_values


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

    other = tiles.Choice("taps", tiles.taps_tile(layer), 1, 8, 1)
    tuning.import_choices({tuning.fingerprint(layer, 2): asdict(other)})
    runtime.forget()
    assert not torch.equal(backend.forward_blocked(xb, values, made), y)  # another order of sums
    tuning.import_choices(stored)
    runtime.forget()
    assert torch.equal(backend.forward_blocked(xb, values, made), y)
    assert runtime.tune([made]) == [chosen]  # from disk


def test_a_processor_does_not_take_what_was_measured_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Case(SQUARES, 16, 24, 9, (4, 4), (1, 1), (1, 1), 0.3, seed=2).operands()[0]
    fastest = Mock(wraps=tuning._fastest)
    monkeypatch.setattr(tuning, "_fastest", fastest)
    for model, measured in (("some", 2), ("some", 2), ("other", 4)):  # they share a home directory
        monkeypatch.setattr(tuning, "processor", partial(dict, model=model, signature=None))
        runtime.tune([made])
        assert fastest.call_count == measured


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
