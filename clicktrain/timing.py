"""The one timer: contenders are checked, warmed up, and timed in interleaved rounds of one process.

Clocks of shared machines drift by tens of percent within seconds, so every round runs every contender once,
each round starting with the next one, and ratios are taken round by round. Nothing is timed before its result has
been compared with the reference.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clicktrain.errors import ClickTrainError, InvalidArgument

CPU_SAMPLE_SECONDS = 2e-3
"""A CPU sample repeats its contender until it lasts about so long, far above the clock's resolution."""
CUDA_FLUSH_BYTES, CUDA_FLUSHES = 256 << 20, 4
"""Written before each CUDA sample, and how often: once, and the second-level cache holds nothing of the contender's
operands; several times, and the host has a third of a millisecond to enqueue all kernels of the contender."""


class WrongResult(ClickTrainError):
    """A contender's result differs from the reference: it is not timed."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes
    ----------
    run : callable
        The timed part; takes nothing.
    result : callable
        Makes the tensor to be compared out of what `run` returned, for instance by unpacking it. Not timed.
        None: there is no result (a yardstick such as `Peak`).
    """

    run: Callable[[], object]
    result: Callable[[object], object] | None = lambda returned: returned


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes
    ----------
    name : str
        The contender.
    samples_ms : tuple of float
        Milliseconds for one call, one value a round.
    error : float or None
        Norm-wise relative error against the reference; None where nothing was compared.
    """

    name: str
    samples_ms: tuple[float, ...]
    error: float | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median in milliseconds."""
        return self.percentile_ms(50)

    @property
    def p20_ms(self) -> float:
        """20th percentile in milliseconds."""
        return self.percentile_ms(20)

    @property
    def p80_ms(self) -> float:
        """80th percentile in milliseconds."""
        return self.percentile_ms(80)

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the samples in milliseconds."""
        return float(np.percentile(self.samples_ms, percent))

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON: median, p20, p80, n and error."""
        return {
            "name": self.name, "median_ms": self.median_ms, "p20_ms": self.p20_ms, "p80_ms": self.p80_ms,
            "n": self.n, "error": self.error,
        }  # fmt: skip


@dataclass(frozen=True)
class Threads:
    """How many threads the timings had.

    Attributes
    ----------
    used, interop : int
        torch's own settings, within an operator and between operators.
    cores : int
        Cores that the process may run on.
    environment : dict
        Variables that pin or number threads, where set.
    """

    used: int
    interop: int
    cores: int
    environment: dict[str, str]

    @classmethod
    def now(cls) -> Threads:
        """Return the present settings."""
        variables = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}
        return cls(torch.get_num_threads(), torch.get_num_interop_threads(), len(os.sched_getaffinity(0)), variables)


@dataclass(frozen=True)
class Comparison:
    """Timings of contenders from the same rounds.

    Attributes
    ----------
    timings : dict
        Contender -> Timing.
    threads : Threads
        Settings during the rounds.
    device : str
        "cpu" or "cuda".
    """

    timings: dict[str, Timing]
    threads: Threads
    device: str

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def best(self, *names: str) -> str:
        """Return the one of `names` with the smallest median."""
        return min(names, key=lambda name: self.timings[name].median_ms)

    def ratios(self, slow: str, fast: str) -> tuple[float, ...]:
        """Return by how much `fast` is faster than `slow`, round by round."""
        pairs = zip(self.timings[slow].samples_ms, self.timings[fast].samples_ms, strict=True)
        return tuple(one / other for one, other in pairs)

    def speedup(self, slow: str, fast: str) -> float:
        """Return the median over the rounds of time(slow) / time(fast)."""
        return float(np.median(self.ratios(slow, fast)))


def compare(
    contenders: Mapping[str, Callable[[], object] | Contender],
    reference: Callable[[], Tensor] | Tensor | None,
    *,
    tolerance: float = 1e-4,
    warmup_seconds: float = 0.2,
    rounds: int = 15,
    device: str = "cpu",
    settle_seconds: float = 0.0,
) -> Comparison:
    """Check every contender against a reference, then time them in interleaved rounds.

    Parameters
    ----------
    contenders : mapping
        Name -> what to time; a callable is a Contender that returns its result.
    reference : callable or Tensor or None
        The right result. None only for what has no result of its own, such as a training step.
    tolerance : float
        Largest norm-wise relative error ``|result - reference| / |reference|``.
    warmup_seconds : float
        Each contender runs at least so long, and at least twice, before the first round.
    rounds : int
        Samples of each contender.
    device : str
        "cpu" takes the wall clock; "cuda" takes events on the current stream, with cold second-level cache.
    settle_seconds : float
        Pause before each sample, followed by one call that is not timed: for contenders with threads of their own,
        which go on spinning for a while after a call and would take the cores from the next contender.

    Returns
    -------
    Comparison

    Raises
    ------
    WrongResult
        If a result differs from the reference by more than the tolerance, or has another shape.
    InvalidArgument
        If there is nothing to time.
    """
    if not contenders or rounds < 1:
        raise InvalidArgument(f"contenders={sorted(contenders)}, rounds={rounds}: expected at least one of each")
    if device not in ("cpu", "cuda"):
        raise InvalidArgument(f"device={device!r}: expected 'cpu' or 'cuda'")
    known = {name: c if isinstance(c, Contender) else Contender(c) for name, c in contenders.items()}
    truth = reference() if callable(reference) else reference
    errors = {name: _error(name, c, truth, tolerance) for name, c in known.items()}

    sample = _cpu_sample if device == "cpu" else _CudaSample()
    calls = {name: _warm_up(c.run, warmup_seconds, device) for name, c in known.items()}
    samples: dict[str, list[float]] = {name: [] for name in known}
    names = list(known)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if settle_seconds:
                time.sleep(settle_seconds)
                known[name].run()
            samples[name].append(sample(known[name].run, calls[name]))
    timings = {name: Timing(name, tuple(samples[name]), errors[name]) for name in names}
    return Comparison(timings, Threads.now(), device)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return ``|result - truth| / |truth|`` in float64; infinite where only one of them is finite."""
    result = result.detach().double()
    truth = truth.detach().to(result.device).double()
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(result)):
        return float("inf")
    scale = float(truth[finite].norm())
    difference = float((result - truth)[finite].norm())
    return difference / scale if scale else difference


def _error(name: str, contender: Contender, truth: Tensor | None, tolerance: float) -> float | None:
    if truth is None or contender.result is None:
        return None
    result = contender.result(contender.run())
    if not isinstance(result, Tensor) or result.shape != truth.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise WrongResult(f"{name} gives {shape}, the reference {tuple(truth.shape)}: not timed")
    error = relative_error(result, truth)
    if not error <= tolerance:
        raise WrongResult(f"{name} is wrong: relative error {error:.3g}, tolerance {tolerance:g}: not timed")
    return error


def _warm_up(run: Callable[[], object], seconds: float, device: str) -> int:
    """Run for some seconds; return how many calls make a CPU sample."""
    durations: list[float] = []
    start = time.perf_counter()
    while len(durations) < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - before)
    return max(1, round(CPU_SAMPLE_SECONDS / float(np.median(durations))))


def _cpu_sample(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


class _CudaSample:
    """One call between two events, after another call and after the second-level cache was overwritten.

    The first call is there because a contender was seen to take some ten microseconds longer right after another
    library's kernels (H100); presumably the device divides the first-level cache and shared memory anew. In a network a
    convolution mostly follows kernels that do not care.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The overwriting also keeps the device busy while the host enqueues the call, so that what the host takes
        # for it is not timed.
        run()
        for _ in range(CUDA_FLUSHES):
            self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, with torch's threads, as measured just now.

    Attributes
    ----------
    gflops : float
        10^9 floating-point operations a second (a multiply-add is two).
    gigabytes_per_second : float
        10^9 bytes read and written a second by a copy far larger than any cache.
    threads : int
        Threads used.
    source : str
        What `gflops` was measured with: "registers" (multiply-adds of the CPU extension) or, without the extension,
        "matrix product" of torch, which is somewhat lower.
    core_round_trip_ns : float or None
        Time for a value to go from one core to another and back; None without the extension or a second thread. On a
        virtual machine it may change by the minute: 50 where cores share a cache, 350 where they do not, and small
        operations on several threads then take twice as long.
    """

    gflops: float
    gigabytes_per_second: float
    threads: int
    source: str
    core_round_trip_ns: float | None


@dataclass(frozen=True)
class Peak:
    """A contender that computes as fast as the machine can: in the same rounds as a kernel, it tells its share.

    Attributes
    ----------
    run : callable
        Takes a few milliseconds.
    flops : int
        Floating-point operations of one call.
    source : str
        See `Ceilings`.
    """

    run: Callable[[], object]
    flops: int
    source: str


def peak(seconds: float = CPU_SAMPLE_SECONDS) -> Peak:
    """Return a `Peak` whose calls take about so many seconds with the present number of threads."""
    from clicktrain.kernels.cpu import library

    threads = torch.get_num_threads()
    if library.available() is not True:
        matrix = torch.randn(768, 768)
        return Peak(lambda: matrix @ matrix, 2 * 768**3, "matrix product")
    function = library.load()[f"clicktrain_{library.instruction_set()}_multiply_adds"]
    function.argtypes = (ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_int)
    result = ctypes.c_float()

    def multiply_adds(rounds: int) -> int:
        # factor * sum + summand settles at 1: neither an overflow nor a denormal slows it down.
        return int(function(rounds, 0.5, 0.5, ctypes.addressof(result), threads))

    rounds = 10_000
    while min(_duration(multiply_adds, rounds) for _ in range(3)) < seconds:
        rounds *= 2
    return Peak(lambda: multiply_adds(rounds), 2 * rounds * threads * multiply_adds(1), "registers")


def ceilings(rounds: int = 15) -> Ceilings:
    """Measure the machine's ceilings; takes about a second and 256 MB."""
    best = peak()
    source = torch.ones(32 << 20)
    target = torch.empty_like(source)
    measured = compare({"peak": best.run, "copy": lambda: target.copy_(source)}, None, rounds=rounds)
    return Ceilings(
        gflops=best.flops / measured["peak"].median_ms / 1e6,
        gigabytes_per_second=2 * source.nbytes / measured["copy"].median_ms / 1e6,
        threads=measured.threads.used,
        source=best.source,
        core_round_trip_ns=_core_round_trip_ns(),
    )


def _core_round_trip_ns(rounds: int = 2000) -> float | None:
    from clicktrain.kernels.cpu import library

    cores = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    if library.available() is not True or cores < 2:
        return None
    function = library.load()[f"clicktrain_{library.instruction_set()}_round_trips"]
    function.argtypes, function.restype = (ctypes.c_int64,), None
    return min(_duration(function, rounds) for _ in range(5)) / rounds * 1e9


def _duration(run: Callable[[int], object], argument: int) -> float:
    start = time.perf_counter()
    run(argument)
    return time.perf_counter() - start
