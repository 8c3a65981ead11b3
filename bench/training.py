"""Sparse training on the CPU against dense training: `python -m bench.training [--quick] [--out FILE]`.

Two parts, both on VGG-13 at the official 9.0x. The losses of the first steps, with the CPU backend and with the masked
reference, on equal batches. The time of a step: dense in each way that torch has, and sparse,
in the same rounds.

The sparse step keeps the memory of its activations; torch hands memory back to the system, and pays for every page
anew. To tell one from the other, the steps are timed twice, in two processes: as torch is, and with a C library
told to keep what it has (`--memory` times one of them only).
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clicktrain
from bench.suite.cases import DENSE
from bench.suite.networks import Setting, Step
from bench.suite.workloads import STEP_GOAL
from clicktrain import memory, provenance, timing
from clicktrain.errors import ClickTrainError
from clicktrain.files import write_atomic
from clicktrain.kernels.cpu import backend

LOSS_STEPS, LOSS_TOLERANCE = 20, 1e-4
"""Steps whose losses are compared, and by how much they may differ, relative to the reference."""
NAME_WIDTH = 44


@dataclass(frozen=True)
class Losses:
    """Losses of the same steps with several backends.

    Where a rounding error turns the sign of one activation, gradients jump, and from then on two runs drift apart,
    whoever computes them: the reference drifts from itself by as much if its first weights change in the last bit.
    So two things are compared, each against the same goal: every step from equal weights, those of the reference's run
    and those of the CPU backend's own, which tells whether the arithmetic is right, and runs on their own, beside the
    drift of the reference from itself.

    Attributes
    ----------
    reference : tuple of float
        By step: the masked reference in float32.
    cpu : tuple of float
        The CPU backend, each step from the reference's weights and momentum.
    updates : tuple of float
        Norm of the difference of the weights after these steps, relative to that of the reference's update.
    cpu_alone, nudged_alone : tuple of float
        The CPU backend, and the reference from weights that are one bit larger, each going on from its own weights.
    beside_alone : tuple of float
        The reference, each step from the weights and momentum of `cpu_alone`.
    """

    reference: tuple[float, ...]
    cpu: tuple[float, ...]
    updates: tuple[float, ...]
    cpu_alone: tuple[float, ...]
    nudged_alone: tuple[float, ...]
    beside_alone: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Largest difference of the CPU backend from equal weights, relative to the reference."""
        return max(self._from_reference(self.cpu), _largest(self.cpu_alone, self.beside_alone))

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            **asdict(self), "difference": self.difference, "at_most": LOSS_TOLERANCE,
            "drift": self._from_reference(self.cpu_alone), "drift_nudged": self._from_reference(self.nudged_alone),
        }  # fmt: skip

    def _from_reference(self, curve: tuple[float, ...]) -> float:
        return _largest(curve, self.reference)

    def __str__(self) -> str:
        ends = f"loss {self.reference[0]:.4f} to {self.reference[-1]:.4f} in {len(self.cpu)} steps, difference"
        drift = self._from_reference(self.cpu_alone)
        return (
            f"{ends:{NAME_WIDTH}}{self.difference:8.1e}  {_against_goal(self.difference)}\n"
            f"{'of the weights, relative to the update':{NAME_WIDTH}}{max(self.updates):8.1e}\n"
            f"{'of losses of runs on their own':{NAME_WIDTH}}{drift:8.1e}  {_against_goal(drift)} "
            f"(reference, one bit changed: {self._from_reference(self.nudged_alone):.1e})"
        )


def _largest(curve: tuple[float, ...], reference: tuple[float, ...]) -> float:
    return max(abs(c - r) / abs(r) for c, r in zip(curve, reference, strict=True))


def _against_goal(difference: float) -> str:
    return f"goal {LOSS_TOLERANCE:.0e}  {'reached' if difference <= LOSS_TOLERANCE else 'MISSED'}"


def losses(setting: Setting, steps: int = LOSS_STEPS) -> Losses:
    """Train with the CPU backend and with the masked reference, from equal weights and on equal batches."""

    def run(step: Step, seed: int) -> float:
        torch.manual_seed(seed)  # dropout
        x, y = setting.images(seed)
        if step is cpu or step is alone:
            return step(x, y)
        with clicktrain.blocked.disabled():  # else dense layers would run on the CPU kernels beside the reference
            return step(x, y)

    cpu, alone = Step(setting.sparse("cpu")), Step(setting.sparse("cpu"))
    reference, nudged, beside = (Step(setting.sparse("reference")) for _ in range(3))
    with torch.no_grad():
        for parameter in nudged.model.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps)
    rows = []
    for seed in range(steps):
        cpu.take_state(reference)
        beside.take_state(alone)
        before = reference.weights()
        wanted, got = run(reference, seed), run(cpu, seed)
        update = (cpu.weights() - reference.weights()).norm() / (reference.weights() - before).norm()
        rows.append((wanted, got, float(update), *(run(step, seed) for step in (alone, nudged, beside))))
    return Losses(*zip(*rows, strict=True))


@dataclass(frozen=True)
class StepTimes:
    """Times of a step, and whether the sparse one is as much faster than the best dense one as it should be."""

    name: str
    dense: str
    reached: float
    at_least: float
    timings: list[dict[str, object]]

    def __str__(self) -> str:
        lines = [f"{t['name']:{NAME_WIDTH}}{t['median_ms']:8.1f} ms  (p20 {t['p20_ms']:.1f}, p80 {t['p80_ms']:.1f})"
                 for t in self.timings]  # fmt: skip
        mark = "reached" if self.reached >= self.at_least else "MISSED"
        return "\n".join([*lines, f"{self.name:{NAME_WIDTH}}{self.reached:7.2f}x  goal {self.at_least:.1f}x  {mark}"])


def step_times(setting: Setting, memory: str, rounds: int, compiled: bool) -> StepTimes:
    """Time a training step, dense in each way that torch has, and sparse.

    Parameters
    ----------
    setting : Setting
        The network and the batch.
    memory : {"torch", "kept"}
        What the process does with freed memory: for the name only.
    rounds : int
        Samples of each contender.
    compiled : bool
        Whether torch.compile takes part.
    """
    dense, _ = setting.model()
    x, y = setting.images(0)
    steps = {}
    for name, layout in DENSE.items():
        model = copy.deepcopy(dense).to(memory_format=layout)  # type: ignore[call-overload]
        steps[name] = _bound(Step(model), x.contiguous(memory_format=layout), y)
    if compiled:
        steps["compiled"] = _bound(Step(copy.deepcopy(dense), compiled=True), x, y)
    contenders = {**steps, "sparse": _bound(Step(setting.sparse("cpu")), x, y)}
    times = timing.compare(contenders, None, warmup_seconds=1, rounds=rounds)
    best = times.best(*steps)
    return StepTimes(
        f"VGG-13 step, batch {setting.batch}, memory: {memory}", best, times.speedup(best, "sparse"), STEP_GOAL,
        [timed.as_dict() for timed in times.timings.values()],
    )  # fmt: skip


def _bound(step: Step, x: Tensor, y: Tensor) -> timing.Contender:
    return timing.Contender(lambda: step(x, y))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 where the CPU backend is not available."""
    options = _parse(arguments)
    if (reason := backend.available()) is not True:
        print(f"error: the CPU backend is not available: {reason}", file=sys.stderr)
        return 2
    if options.memory == "kept" and not memory.keep():
        raise ClickTrainError("memory=kept: needs glibc's mallopt")
    setting = Setting(0.25, 16) if options.quick else Setting(options.width, options.batch)
    report: dict[str, Any] = {
        "schema": 1,
        "quick": options.quick,
        "setting": asdict(setting),
        "provenance": provenance.collect(),
        "ceilings": asdict(timing.ceilings()),
        "threads": asdict(timing.Threads.now()),
    }
    if not options.no_losses:
        compared = losses(setting)
        print(compared, flush=True)
        report["losses"] = compared.as_dict()
    if not options.no_times:
        first = "kept" if options.memory == "kept" else "torch"
        times = step_times(
            setting, first, 2 if options.quick else options.rounds, not (options.quick or options.no_compile)
        )
        print(times, flush=True)
        report["times"] = {first: asdict(times)}
        if options.memory == "both":
            report["times"] |= _times_with_kept_memory(arguments)
    if options.out is not None:
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the width, batch 16: proves that it runs")
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of the channels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (default %(default)s)")
    parser.add_argument("--no-losses", action="store_true", help="only time steps")
    parser.add_argument("--no-times", action="store_true", help="only compare losses")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--memory", choices=("torch", "kept", "both"), default="both", help="what happens to freed memory: see above"
    )
    parser.add_argument("--keep-memory", action="store_const", dest="memory", const="kept", help="--memory kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    return parser.parse_args(arguments)


def _times_with_kept_memory(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Time the steps in another process: what malloc has mapped once stays so."""
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kept.json"
        changed = ["--no-losses", "--memory", "kept", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "bench.training", *given, *changed], check=True)
        times: dict[str, Any] = json.loads(out.read_text())["times"]
    return times


if __name__ == "__main__":
    sys.exit(main())
