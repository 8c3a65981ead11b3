"""Speed of the kernels, as the benchmarks measured it and `bench/evidence` keeps it: read, never measured here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reproductions import paths
from reproductions.claims import Claim
from reproductions.verdicts import QUICK_BENCHMARK, Verdict, judge

FUNCTION = "forward"
"""What the claims are about."""

_FLOAT32 = ("cuDNN fp32", "cuBLAS im2col", "cuSPARSE im2col")
"""Whole convolutions: what a bare product of matrices takes is no convolution's time."""


@dataclass(frozen=True)
class Layer:
    """One layer at one compression.

    Attributes
    ----------
    name : str
        Network, layer and sparsity.
    least : float
        Times that the sparse kernel is faster, forward, than the fastest library in float32, median over rounds.
    speedups : dict of str to float
        The same for each of the libraries, where only medians are known from these.
    """

    name: str
    least: float
    speedups: dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """One stored measurement of many layers.

    Attributes
    ----------
    name : str
        File it comes from.
    machine : str
        What it ran on.
    on_gpu : bool
        Whether that was a GPU.
    quick : bool
        Whether it was a short run, which proves that the benchmark works and nothing else.
    layers : list of Layer
        What was measured.
    """

    name: str
    machine: str
    on_gpu: bool
    quick: bool
    layers: list[Layer]

    def verdict(self, claim: Claim) -> Verdict:
        """Judge a claim about kernels by the layer in which the fastest library is left behind farthest."""
        verdict = judge(claim, {0: max(layer.least for layer in self.layers)}, {})
        return Verdict(QUICK_BENCHMARK, verdict.estimate) if self.quick else verdict


def stored() -> list[Benchmark]:
    """Return the benchmarks of kernels that come with the suite."""
    records = {path.name: json.loads(path.read_text()) for path in sorted(paths.BENCHMARKS.glob("*.json"))}
    found = [read(name, record) for name, record in records.items()]
    return [benchmark for benchmark in found if benchmark is not None]


def read(name: str, record: Any) -> Benchmark | None:
    """Return what `bench.cpu` or `bench.gpu` measured; None for a record of another kind."""
    rows = record.get("rows", []) if isinstance(record, dict) else []
    layers = [layer for row in rows if (layer := _layer(row))]
    if not layers:
        return None
    gpu, cpu = (record["provenance"][device] for device in ("gpu", "cpu"))
    machine = gpu["model"] if gpu else f"{cpu['model']}, {record['provenance']['threads']['torch']} threads"
    return Benchmark(name, machine, bool(gpu), record.get("quick", False), layers)


def _layer(row: dict[str, Any]) -> Layer | None:
    if row.get("function") != FUNCTION:
        return None
    if "speedup_blocked" in row:
        times = {timing["name"]: timing["median_ms"] for timing in row["timings"]}
        dense = [name for name in ("NCHW", "channels_last") if name in times]
        speedups = {f"torch {name}": times[name] / times["blocked"] for name in dense}
        return Layer(row["workload"], row["speedup_blocked"], speedups)
    float32 = {name: value for name, value in row.get("speedups", {}).items() if name in _FLOAT32}
    return Layer(row["workload"], min(float32.values()), float32) if float32 else None
