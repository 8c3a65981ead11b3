"""`python -m bench.gpu [--minutes M] [--out FILE]`: checks, kernel table and a training run, on this machine's GPU.

Ends with a short table. Where there is no GPU it says so in one line and returns 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clicktrain import provenance, timing
from clicktrain.files import write_atomic
from clicktrain.kernels.cuda import codegen, launch

SANITIZED_CONVOLUTIONS = 6
LEAST_SANITIZER_SECONDS = 15
SHARES = {"checks": 0.15, "deployment": 0.1, "steps": 0.2, "training": 0.25, "sanitizer": 0.1}
"""Of the minutes, about; the table of kernels takes the rest."""
LATER = ("deployment", "steps", "training", "sanitizer")
"""What comes after the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, 1 where a kernel or sanitizer complains, 2 where there is no GPU to use."""
    options = _options(arguments)
    if (reason := launch.available()) is not True:
        print(f"not run on this hardware: {reason}")
        return 2
    from bench.gpu import ceilings, checks

    end = time.perf_counter() + options.minutes * 60
    checked = checks.check(options.convolutions, SHARES["checks"] * options.minutes * 60)
    print(checked, flush=True)
    if options.checks_only:
        return 0
    report: dict[str, Any] = {
        "schema": 2, "provenance": provenance.collect(), "kernel_sources": sources(), "checks": checked.as_dict(),
        "ceilings": ceilings.measure(options.rounds), "rows": [], "wrong": [], "left_out": [], "summary": {},
        "training": [], "steps": {}, "deployment": [], "sanitizer": {},
    }  # fmt: skip
    seconds = {part: SHARES[part] * options.minutes * 60 for part in LATER if not getattr(options, f"no_{part}")}
    measure(report, options, end - sum(seconds.values()))
    add_later_parts(report, options, seconds, end)
    _save(report, options.out)
    print_report(report)
    complaints = [said for said in report["sanitizer"].values() if not _clean(said)]
    return int(bool(report["wrong"] or complaints))


def measure(report: dict[str, Any], options: argparse.Namespace, end: float) -> None:
    """Add the kernels of each layer, the most important first, as the time allows."""
    from bench.gpu import table

    rows: list[table.Row] = []
    preparing = 0.0  # seconds that the network before took until its first layer was measured
    for layers in table.batches(options.layers):
        seen, start = 0, time.perf_counter()
        if start + preparing < end:
            for found in table.measure_all(layers, options.rounds, end):
                preparing = preparing if seen else time.perf_counter() - start
                seen += 1
                if isinstance(found, str):
                    report["wrong"].append(found)
                    continue
                rows += found
                report["rows"] += [asdict(row) for row in found]
                report["summary"] = table.summary(rows, report["ceilings"])
                _save(report, options.out)
        report["left_out"] += [workload.name for workload in layers[seen:]]


def add_later_parts(
    report: dict[str, Any], options: argparse.Namespace, seconds: Mapping[str, float], end: float
) -> None:
    """Add those parts of the report that have seconds."""
    from bench.gpu import deployment, steps

    parts: dict[str, Callable[[], Any]] = {
        "deployment": lambda: deployment.measure(options.rounds), "steps": lambda: steps.measure(options.rounds),
    }  # fmt: skip
    for name, measured in parts.items():
        if name in seconds:
            try:
                report[name] = measured()
            except timing.WrongResult as error:
                report["wrong"].append(f"{name}: {error}")
            _save(report, options.out)
    if "training" in seconds:
        report["training"] = training(options, end - seconds.get("sanitizer", 0) - time.perf_counter())
        _save(report, options.out)
    if "sanitizer" in seconds:
        report["sanitizer"] = {tool: sanitize(tool, end - time.perf_counter()) for tool in ("memcheck", "racecheck")}


def sanitize(tool: str, seconds: float) -> str:
    """Run a few convolutions under a tool of compute-sanitizer; return its last line, or why it was not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not on the PATH"
    if seconds < LEAST_SANITIZER_SECONDS:
        return "not run: the time was over"
    mine = [sys.executable, "-m", "bench.gpu", "--checks-only", "--convolutions", str(SANITIZED_CONVOLUTIONS)]
    try:
        done = subprocess.run([program, "--tool", tool, *mine], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not run to its end: {seconds:.0f} s were over"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next((line for line in reversed(lines) if "SUMMARY" in line), "no summary: " + " ".join(lines[-1:]))


def training(options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """Train pairs of seeds as long as the time allows, or take finished runs from the evidence file."""
    from bench.gpu.training import METHODS, PAIRED, train

    done = _finished(options.out) if options.resume else []
    start = time.perf_counter()
    wanted = [(method, seed) for seed in range(options.seeds) for method in PAIRED]
    wanted += [(method, 0) for method in METHODS if method not in PAIRED]
    for method, seed in wanted:
        if any((run["method"], run["seed"], run["epochs"]) == (method, seed, options.epochs) for run in done):
            continue
        if time.perf_counter() - start > seconds and not options.resume:
            print(f"{method}, seed {seed}: not trained, the time was over")
            continue
        done.append(asdict(train(method, seed, options.epochs, options.data)))
        print(done[-1], flush=True)
        if options.resume and options.out is not None:
            write_atomic(_runs_file(options.out), json.dumps(done))
    return done


def print_report(report: dict[str, Any]) -> None:
    """Print the short table that comes last."""
    from bench.gpu import deployment, steps

    print(f"\n{report['provenance']['gpu']}\nsparse fp32 kernels, times faster (geometric means over layers);")
    print("the last numbers: tensor-core kernels for blocks of 16 filters that share their kernels, in the same type,")
    print("with images in NCHW and, as fast as they are meant to be, batch last")
    for name, means in report["summary"].items():
        print(f"  {name:22}" + "  ".join(f"{rival} {value:.2f}x" for rival, value in means.items()))
    for tool, said in report["sanitizer"].items():
        print(f"  {tool}: {said}")
    runs = report["training"]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        medians = {stage: statistics.median(run["step_ms"][stage] for run in mine) for stage in mine[0]["step_ms"]}
        accuracy = statistics.mean(run["accuracy"] for run in mine)
        print(f"  VGG-13 {method} (n={len(mine)}): accuracy {accuracy:.4f}, " +
              ", ".join(f"{stage} step {ms:.2f} ms" for stage, ms in medians.items()))  # fmt: skip
    if report["steps"]:
        print(f"  {steps.Steps(**report['steps'])}")
    for row in report["deployment"]:
        print(f"  {deployment.Deployed(**row)}")
    for wrong in report["wrong"]:
        print(f"  {wrong}")
    if report["left_out"]:
        print(f"  {len(report['left_out'])} workloads were left out, the time was over")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (default %(default)s)")
    parser.add_argument("--convolutions", type=int, default=600, help="random convolutions (default %(default)s)")
    parser.add_argument("--checks-only", action="store_true", help="compare with the reference and stop")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--no-training", action="store_true", help="leave the training run out")
    parser.add_argument("--no-steps", action="store_true", help="leave the single training steps out")
    parser.add_argument("--no-deployment", action="store_true", help="leave the deployed network out")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (default %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N workloads")
    parser.add_argument("--epochs", type=int, default=19, help="of a training run; 190 is the official length")
    parser.add_argument("--seeds", type=int, default=3, help="paired training runs (default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the whole Fashion-MNIST")
    parser.add_argument("--resume", action="store_true", help="train without a limit; keep finished runs beside --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    return parser.parse_args(arguments)


def sources() -> str:
    """Return a digest of the CUDA backend's files: where there is no history, it tells which commit was measured."""
    files = sorted(path for path in codegen.DIRECTORY.rglob("*") if path.suffix in (".py", ".cuh"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _clean(said: str) -> bool:
    return any(phrase in said for phrase in ("ERROR SUMMARY: 0 errors", "0 hazards", "not run"))


def _save(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_atomic(out, json.dumps(report, indent=1) + "\n")


def _runs_file(out: Path) -> Path:
    return out.with_suffix(".runs.json")


def _finished(out: Path | None) -> list[dict[str, Any]]:
    if out is None or not _runs_file(out).exists():
        return []
    runs: list[dict[str, Any]] = json.loads(_runs_file(out).read_text())
    return runs


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False  # cuBLAS computes in float32, cuDNN as each column says
    sys.exit(main())
