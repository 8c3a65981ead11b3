"""The table of kernels: layers, compressions and functions, all contenders in the same rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bench.gpu.rivals import DENSE, FUNCTIONS, SHARED, SHARED_BATCH_LAST, SPARSE, Case
from bench.suite.workloads import RESNET18, RESNET50_POINTWISE, VGG13, Workload
from clicktrain import timing
from clicktrain.kernels.cuda import backend
from clicktrain.kernels.cuda.launch import compile_ahead

COMPRESSIONS = (8.0, 4.5, 2.25, 12.0)
"""The most important first, in case time runs out."""
TOLERANCE = 2e-2  # bf16 contenders are in the same rounds; `checks` holds each type to its own


@dataclass(frozen=True)
class Row:
    """One function of one workload.

    Attributes
    ----------
    speedups : dict
        Contender -> times that the sparse float32 kernel is faster, median over the rounds.
    gflops, gigabytes_per_second : float
        Rates of the sparse float32 kernel: of kept weights only, and of operands read or written once.
    """

    workload: str
    function: str
    compression: float
    speedups: dict[str, float]
    gflops: float
    gigabytes_per_second: float
    timings: list[dict[str, object]]

    def __str__(self) -> str:
        return f"{self.workload:42}{self.function:12}" + "".join(
            f"{self.speedups.get(name, math.nan):13.2f}"
            for name in (*DENSE, "cuSPARSE im2col", SHARED, SHARED_BATCH_LAST)
        )


def workloads() -> list[Workload]:
    """Return the layers at every compression, by importance."""
    layers = [(s, 128) for s in VGG13] + [(s, 64) for s in (*RESNET18, *RESNET50_POINTWISE)]
    return [Workload(shape, batch, compression) for compression in COMPRESSIONS for shape, batch in layers]


def prepare(cases: Sequence[Case]) -> None:
    """Compile what the kernels of some layers are chosen from, on all cores, and choose; not timed."""
    texts = []
    for case in cases:
        for dtype, candidates in ((torch.float32, None), (torch.bfloat16, 1)):
            texts += backend.units(case.plan, dtype, candidates)
        if case.shared_plan is not None:  # one format is chosen for by timing, the other one goes as estimated
            for batch_last, candidates in ((False, 1), (True, None)):
                texts += backend.units(case.shared_plan, torch.bfloat16, candidates, batch_last)
    compile_ahead(texts)
    backend.tune(case.plan for case in cases)
    shared = (case.shared_plan for case in cases)
    backend.tune((made for made in shared if made is not None), torch.bfloat16, batch_last=True)


@torch.inference_mode()
def measure(case: Case, rounds: int) -> list[Row]:
    """Check and time the three functions of a workload."""
    workload, rows = case.workload, []
    for function in FUNCTIONS:
        contenders = case.contenders(function)
        truth = contenders["cuDNN fp32"]
        assert truth.result is not None
        reference = cast(Tensor, truth.result(truth.run()))
        times = timing.compare(
            contenders, reference, tolerance=TOLERANCE, warmup_seconds=0.005, rounds=rounds, device="cuda"
        )
        seconds = times[SPARSE].median_ms / 1e3
        rows.append(
            Row(
                workload.name, function, workload.compression,
                {name: times.speedup(name, SPARSE) for name in contenders if name != SPARSE},
                case.flops / seconds / 1e9, case.bytes / seconds / 1e9,
                [timed.as_dict() for timed in times.timings.values()],
            )
        )  # fmt: skip
    return rows


def batches(limit: int | None = None) -> list[list[Workload]]:
    """Return the workloads, at most so many in all, by compression and network: what is compiled together."""
    todo, found = workloads()[:limit], dict[tuple[float, str], list[Workload]]()
    for workload in todo:
        found.setdefault((workload.compression, workload.shape.network), []).append(workload)
    return list(found.values())


def measure_all(layers: Sequence[Workload], rounds: int, end: float) -> Iterator[list[Row] | str]:
    """Compile for some workloads at once, then yield the rows of each, or what was wrong with it.

    Stops when `time.perf_counter()` reaches `end`.
    """
    start, cases = time.perf_counter(), [Case(workload) for workload in layers]
    prepare(cases)
    print(f"compiled and chose for {len(cases)} layers, {time.perf_counter() - start:.0f} s", flush=True)
    while cases and time.perf_counter() < end:
        try:
            rows = measure(cases.pop(0), rounds)
            print(*rows, sep="\n", flush=True)
            yield rows
        except timing.WrongResult as error:
            print(error, flush=True)
            yield str(error)
        torch.cuda.empty_cache()


def summary(rows: Sequence[Row], ceilings: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return by "function compression" the geometric means over the layers, and the best layer against float32.

    The kernels for shared filters are in there as a rival, and over cuDNN in the same type, where a layer has them.
    """
    found: dict[str, dict[str, float]] = {}
    for key in dict.fromkeys((row.function, row.compression) for row in rows):
        these = [row for row in rows if (row.function, row.compression) == key]
        names = [name for name in these[0].speedups if all(name in row.speedups for row in these)]
        means = {n: _mean([row.speedups[n] for row in these]) for n in names}
        means["share of the FP32 rate"] = _mean([row.gflops for row in these]) / ceilings["fp32_gflops"]
        means["share of copy bandwidth"] = _mean([row.gigabytes_per_second for row in these]) / ceilings["copy_gbps"]
        means["best layer, cuDNN fp32"] = max(row.speedups["cuDNN fp32"] for row in these)
        for name in ("cuSPARSE im2col", "cuSPARSE product"):
            means[f"worst layer, {name}"] = min(row.speedups[name] for row in these)
        for name in (SHARED, SHARED_BATCH_LAST):
            shared = [row.speedups[DENSE[-1]] / row.speedups[name] for row in these if name in row.speedups]
            if shared:
                means[f"{name} over {DENSE[-1]}"] = _mean(shared)
        found[f"{key[0]} {key[1]:g}x"] = means
    return found


def _mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
