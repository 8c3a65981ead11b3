"""The CPU backend against the best dense layout of torch: `python -m bench.cpu [--quick] [--out FILE]`.

Two parts: every function of every layer of the goals, blocked and NCHW to NCHW, with its share of the machine's
peak; and the goals, as geometric means. All that is compared is timed in the same rounds. Whole training steps are
the matter of `python -m bench.training`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.suite.cases import DENSE, TOLERANCE, Case
from bench.suite.workloads import GOALS, Goal, Workload
from clicktrain import provenance, timing
from clicktrain.files import write_atomic
from clicktrain.kernels.cpu import backend

SHAPE_WIDTH = 44


@dataclass(frozen=True)
class Row:
    """One function of one workload.

    Attributes
    ----------
    workload, function : str
        What was measured.
    dense : str
        The dense layout that was fastest.
    speedup_blocked, speedup_nchw : float
        Times faster than that, with blocked activations, and with packing and unpacking.
    share_of_peak : float
        Multiply-adds done, blocked, over those that the machine could do in registers in the same time.
    timings : list of dict
        Of every contender.
    """

    workload: str
    function: str
    dense: str
    speedup_blocked: float
    speedup_nchw: float
    share_of_peak: float
    timings: list[dict[str, object]]

    def speedup(self, layout: str) -> float:
        """Return the speed-up for "blocked" or "nchw"."""
        return self.speedup_blocked if layout == "blocked" else self.speedup_nchw

    def __str__(self) -> str:
        return (
            f"{self.workload:{SHAPE_WIDTH}}{self.function:12}{self.speedup_blocked:7.2f}x{self.speedup_nchw:7.2f}x"
            f"{self.share_of_peak:7.0%}  {self.dense}"
        )


@torch.inference_mode()
def measure(workload: Workload, function: str, rounds: int) -> Row:
    """Check and time one function of a workload against the dense layouts."""
    case, peak = Case(workload), timing.peak()
    contenders = {name: case.dense(function, layout) for name, layout in DENSE.items()}
    contenders |= {
        "blocked": case.blocked(function),
        "nchw": case.nchw(function),
        "peak": timing.Contender(peak.run, None),
    }
    times = timing.compare(contenders, case.reference(function), tolerance=TOLERANCE, warmup_seconds=0.1, rounds=rounds)
    best = times.best(*DENSE)
    return Row(
        workload.name, function, best, times.speedup(best, "blocked"), times.speedup(best, "nchw"),
        times.speedup("peak", "blocked") * case.flops / peak.flops, [t.as_dict() for t in times.timings.values()],
    )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A goal and what was reached: the geometric mean of the speed-ups."""

    name: str
    reached: float
    at_least: float

    def __str__(self) -> str:
        mark = "reached" if self.reached >= self.at_least else "MISSED"
        return f"{self.name:{SHAPE_WIDTH}}{self.reached:7.2f}x  goal {self.at_least:.1f}x  {mark}"


def check_goals(goals: Sequence[Goal], rounds: int, limit: int | None) -> tuple[list[Row], list[Verdict]]:
    """Measure what the goals are about, each function of a workload once; at most `limit` workloads for a goal."""
    rows: dict[tuple[str, str], Row] = {}
    verdicts = []
    for goal in goals:
        speedups = []
        for workload in goal.workloads()[:limit]:
            key = (workload.name, goal.function)
            if key not in rows:
                rows[key] = measure(workload, goal.function, rounds)
                print(rows[key], flush=True)
            speedups.append(rows[key].speedup(goal.layout))
        verdicts.append(Verdict(goal.name, math.exp(sum(map(math.log, speedups)) / len(speedups)), goal.at_least))
    return list(rows.values()), verdicts


def _apart(nanoseconds: float | None) -> str:
    return "" if nanoseconds is None else f", {nanoseconds:.0f} ns from core to core and back"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 where the CPU backend is not available."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one layer a goal, few rounds: proves that it runs, no more"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (default %(default)s)")
    parser.add_argument("--goals", default="", metavar="TEXT", help="only goals whose name contains this")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(arguments)
    if (reason := backend.available()) is not True:
        print(f"error: the CPU backend is not available: {reason}", file=sys.stderr)
        return 2
    rounds = 3 if options.quick else options.rounds

    ceilings = timing.ceilings()
    print(
        f"{ceilings.gflops:.0f} GFLOP/s ({ceilings.source}), {ceilings.gigabytes_per_second:.0f} GB/s, "
        f"{ceilings.threads} threads{_apart(ceilings.core_round_trip_ns)}\n"
    )
    print(f"{'':{SHAPE_WIDTH + 12}}{'blocked':>8}{'NCHW':>8}{'peak':>7}  dense")
    goals = [goal for goal in GOALS if options.goals in goal.name]
    rows, verdicts = check_goals(goals, rounds, 1 if options.quick else None)
    print("", *verdicts, sep="\n")
    if options.out is not None:
        report = {
            "schema": 1,
            "quick": options.quick,
            "provenance": provenance.collect(),
            "ceilings": asdict(ceilings),
            "threads": asdict(timing.Threads.now()),
            "rows": [asdict(row) for row in rows],
            "goals": [asdict(verdict) for verdict in verdicts],
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
