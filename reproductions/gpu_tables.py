"""Tables of what `bench.gpu` measured, from its stored report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reproductions import paths
from reproductions.wording import MISSING, Table

_REPORTS = {
    "gpu.json": "",
    "gpu_gradient.json": "Newer (`gpu_gradient.json`; its description says what was disturbed): ",
    "gpu_h200.json": "Newer, another GPU (`gpu_h200.json`; its description says what is missing): ",
}
_RIVALS = ("cuDNN fp32", "cuDNN tf32", "cuDNN bf16", "cuBLAS im2col", "cuSPARSE im2col", "cuSPARSE product")
_MEANS = (*_RIVALS, "best layer, cuDNN fp32", "worst layer, cuSPARSE im2col")
_SHARES = ("share of the FP32 rate", "share of copy bandwidth")
_SHARED = ("shared bf16 over cuDNN bf16", "shared bf16, batch last over cuDNN bf16")
_IMPORTANT = 8.0
"""Compression that the goals are set for."""


def stored() -> list[Table]:
    """Return the tables of the stored reports."""
    return [table for name, prefix in _REPORTS.items() for table in _tables(paths.BENCHMARKS / name, prefix)]


def _tables(path: Path, prefix: str) -> list[Table]:
    """Return the tables of a report; none where there is none."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    made = (_kernels(report), _networks(report), _steps(report), _training(report), _deployment(report))
    return [(prefix + title, head, rows) for title, head, rows in made if rows]


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


def _networks(report: Any) -> Table:
    """Return the most important compression network by network; nothing where there is one network."""
    title = f"The same at {_IMPORTANT:g}x, network by network (resnet50: its 1x1 convolutions):"
    rivals = (*_RIVALS[:3], _RIVALS[4])
    mine = [row for row in report["rows"] if row["compression"] == _IMPORTANT]
    keys = dict.fromkeys((row["function"], row["workload"].split(".")[0]) for row in mine)
    if len({network for _, network in keys}) < 2:
        return title, (), []
    rows = []
    for function, network in keys:
        found = [r["speedups"] for r in mine if r["function"] == function and r["workload"].startswith(f"{network}.")]
        means = [f"{statistics.geometric_mean(row[name] for row in found):.2f}x" for name in rivals]
        best = max(row["cuDNN fp32"] for row in found)
        rows.append((f"{function}, {network}", str(len(found)), *means, f"{best:.2f}x"))
    return title, ("function, network", "layers", *rivals, "best layer, cuDNN fp32"), sorted(rows)


def _steps(report: Any) -> Table:
    steps = report.get("steps")
    title = "A training step of VGG-13 at 9.0x there, batch 128; recorded: forward and backward passes as CUDA graphs:"
    if not steps:
        return title, (), []
    times = {timed["name"]: timed["median_ms"] for timed in steps["timings"]}
    sparse = times[steps["best_sparse"]]
    rows = [(name, f"{ms:.2f}", f"{ms / sparse:.2f}x") for name, ms in times.items()]
    rows += [(name, MISSING, reason) for name, reason in steps["left_out"].items()]
    return title, ("step", "ms", "times the best sparse one"), rows


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
