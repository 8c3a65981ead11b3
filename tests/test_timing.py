"""The timer: what it refuses, what it reports, and that its numbers mean what they say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clicktrain import timing
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu import library


def compare(contenders: dict[str, Callable[[], object] | timing.Contender], truth: Tensor | None) -> timing.Comparison:
    return timing.compare(contenders, truth, warmup_seconds=0, rounds=3)


class TestRefusals:
    truth = torch.arange(1.0, 5.0)

    @pytest.mark.parametrize(
        "result",
        [torch.zeros(4), torch.full((4,), float("nan")), torch.arange(1.0, 6.0), torch.ones(2, 2), None, 3.0],
    )
    def test_a_wrong_contender_is_named_and_nothing_is_timed(self, result: object) -> None:
        calls = {"right": 0}

        def right() -> Tensor:
            calls["right"] += 1
            return self.truth

        with pytest.raises(timing.WrongResult, match=r"^broken"):
            compare({"right": right, "broken": lambda: result}, self.truth)
        assert calls["right"] == 1, "only its check ran"

    def test_an_error_within_the_tolerance_is_reported(self) -> None:
        times = compare({"near": lambda: self.truth * (1 + 5e-5)}, self.truth)
        assert times["near"].error == pytest.approx(5e-5, rel=1e-2)

    def test_infinities_must_stand_at_the_same_places(self) -> None:
        truth = torch.tensor([1.0, float("inf"), 2.0])
        assert timing.relative_error(truth.clone(), truth) == 0
        assert timing.relative_error(truth.nan_to_num(posinf=1e30), truth) == float("inf")

    @pytest.mark.parametrize(
        "arguments",
        [{"contenders": {}}, {"contenders": {"a": int}, "rounds": 0}, {"contenders": {"a": int}, "device": "tpu"}],
    )
    def test_arguments_that_make_no_sense(self, arguments: dict[str, object]) -> None:
        with pytest.raises(InvalidArgument):
            timing.compare(reference=None, **arguments)  # type: ignore[arg-type]


class TestResults:
    def test_the_result_of_a_contender_is_what_its_conversion_makes_of_it(self) -> None:
        truth = torch.arange(6.0).view(2, 3)
        times = compare({"transposed": timing.Contender(lambda: truth.T, lambda y: y.T)}, truth)  # type: ignore[attr-defined]
        assert times["transposed"].error == 0

    def test_without_a_result_there_is_no_error_to_report(self) -> None:
        times = compare({"yardstick": timing.Contender(lambda: None, None)}, torch.ones(1))
        assert times["yardstick"].error is None
        assert compare({"step": lambda: None}, None)["step"].error is None

    def test_times_and_ratios(self) -> None:
        times = compare({"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.02)}, None)
        assert times["short"].n == len(times["short"].samples_ms) == 3
        assert 4 <= times["short"].p20_ms <= times["short"].median_ms <= times["short"].p80_ms
        assert times["long"].median_ms >= 20
        assert times.best("long", "short") == "short"
        ratios = sorted(times.ratios("long", "short"))
        assert times.speedup("long", "short") == ratios[1] > 1

    def test_rounds_are_interleaved_and_each_starts_with_another_contender(self) -> None:
        order: list[str] = []

        def contender(name: str) -> Callable[[], None]:
            return lambda: (order.append(name), time.sleep(0.003))[1]  # longer than a sample: one call each

        compare({"a": contender("a"), "b": contender("b")}, None)
        assert order[-6:] == ["a", "b", "b", "a", "a", "b"]

    def test_short_contenders_are_repeated_within_a_sample(self) -> None:
        calls = 0

        def short() -> None:
            nonlocal calls
            calls += 1

        times = compare({"short": short}, None)
        assert calls > 100
        assert 0 < times["short"].median_ms < 1

    def test_settings_are_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_PROC_BIND", "true")
        times = compare({"a": lambda: None}, None)
        assert times.threads.used == torch.get_num_threads()
        assert times.threads.cores >= 1
        assert times.threads.environment["OMP_PROC_BIND"] == "true"
        assert times["a"].as_dict()["n"] == 3


class TestCeilings:
    @pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")
    def test_multiply_adds_are_done_by_all_threads(self) -> None:
        peak = timing.peak(1e-4)
        assert peak.source == "registers"
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = timing.peak(1e-4)
        finally:
            torch.set_num_threads(before)
        per_round = 2 * 8 * 12
        assert one.flops % per_round == 0
        assert peak.flops % (before * per_round) == 0

    def test_without_the_extension_torch_is_the_yardstick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "available", lambda: "no compiler")
        ceilings = timing.ceilings(rounds=1)
        assert ceilings.source == "matrix product"
        assert ceilings.gflops > 0
        assert ceilings.gigabytes_per_second > 0
        assert ceilings.threads == torch.get_num_threads()
        assert ceilings.core_round_trip_ns is None

    @pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")
    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_round_trip_takes_two_cores(self, threads: int) -> None:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            found = timing.ceilings(rounds=1).core_round_trip_ns
        finally:
            torch.set_num_threads(before)
        if threads < 2 or len(os.sched_getaffinity(0)) < 2:
            assert found is None
        else:
            assert found is not None
            assert 1 < found < 1e6


@pytest.mark.gpu
def test_cuda_times_are_those_of_the_device() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    times = timing.compare({"matmul": lambda: a @ a, "copy": a.clone}, None, device="cuda", rounds=5)
    assert times.device == "cuda"
    assert times["matmul"].median_ms > times["copy"].median_ms > 0
