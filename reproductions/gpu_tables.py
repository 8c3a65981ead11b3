"""The README's tables of what `bench.gpu` measured, from its stored report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reproductions import paths
from reproductions.wording import MISSING

_RIVALS = ("cuDNN fp32", "cuDNN tf32", "cuDNN bf16", "cuBLAS im2col", "cuSPARSE im2col", "cuSPARSE product")
_MEANS = (*_RIVALS, "best layer, cuDNN fp32", "worst layer, cuSPARSE im2col")
_SHARES = ("share of the FP32 rate", "share of copy bandwidth")
_SHARED = ("shared bf16 over cuDNN bf16", "shared bf16, batch last over cuDNN bf16")
Table = tuple[str, Sequence[str], list[Sequence[str]]]
"""Title, head, rows."""


def stored() -> list[Table]:
    """Return the tables of the stored report; none where there is none."""
    path = paths.BENCHMARKS / "gpu.json"
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    return [table for table in (_kernels(report), _training(report), _deployment(report)) if table[2]]


def _kernels(report: Any) -> Table:
    gpu = report["provenance"]["gpu"]["model"]
    networks = ", ".join(dict.fromkeys(row["workload"].split(".")[0] for row in report["rows"]))
    title = (
        f"Kernels on one {gpu}: times that the sparse float32 kernel is faster, geometric means over layers of "
        f"{networks}; the last two columns: tensor-core kernels of layers whose filters share kernels in blocks of 16, "
        "NCHW and batch last, over cuDNN in bfloat16. 'Product': without im2col."
    )
    head = ("function", "layers", *_MEANS, *_SHARES, "tensor cores, NCHW", "batch last")
    rows = []
    for name, means in report["summary"].items():
        function, compression = name.split()
        mine = [r for r in report["rows"] if (r["function"], f"{r['compression']:g}x") == (function, compression)]
        cells = [_times(means, key) for key in _MEANS] + [_percent(means, key) for key in _SHARES]
        rows.append((name, str(len(mine)), *cells, *(_times(means, key) for key in _SHARED)))
    return title, head, rows


def _training(report: Any) -> Table:
    runs = report["training"]
    title = (
        "Training of VGG-13 at 8x, batch 128, float32, on the same GPU: milliseconds of a step by stage (medians; "
        "forward and backward passes as CUDA graphs), accuracy after the last epoch:"
    )
    stages = list(dict.fromkeys(stage for run in runs for stage in run["step_ms"]))
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        steps = [f"{statistics.median(run['step_ms'][stage] for run in mine):.2f}" for stage in stages]
        accuracy = statistics.mean(run["accuracy"] for run in mine)
        rows.append((method, str(len(mine)), str(mine[0]["epochs"]), *steps, f"{100 * accuracy:.2f}"))
    return title, ("method", "runs", "epochs", *(f"{stage}, ms" for stage in stages), "accuracy, %"), rows


def _deployment(report: Any) -> Table:
    title = "VGG-13 at 9.0x deployed there, one CUDA graph (float32; 'recorded': the dense network in another graph):"
    rivals = list(dict.fromkeys(name for row in report.get("deployment", []) for name in row["speedups"]))
    rows = [
        (str(row["batch"]), f"{row['timings'][0]['median_ms']:.3f}", str(row["dense_layers"]),
         *(f"{row['speedups'][name]:.2f}x" for name in rivals), f"{row['timings'][0]['error']:.0e}")
        for row in report.get("deployment", [])
    ]  # fmt: skip
    return title, ("batch", "ms", "dense layers", *(f"over {name}" for name in rivals), "error"), rows


def _times(means: Mapping[str, float], key: str) -> str:
    return f"{means[key]:.2f}x" if key in means else MISSING


def _percent(means: Mapping[str, float], key: str) -> str:
    return f"{100 * means[key]:.0f} %"
