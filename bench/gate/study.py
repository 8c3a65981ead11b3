"""How often the gate is wrong: `python -m bench.gate.study collect FILE RUN...`, then `resample FILE`.

`collect` puts the raw rounds of gates (`--out`) into one file. `resample` draws sessions from the stored ones, as many
as gates of equal commits would take, and counts the gates that find something slower. A gate draws whole sessions, all
items of one together, since what disturbs one item often disturbs the next.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gate.decision import decide
from bench.gate.items import ITEMS, Item
from bench.gate.measuring import Rounds

DIGITS = 5
START_SECONDS, ITEM_SECONDS = 4.0, 0.45
"""What a session takes, for the clock of resampled gates."""

Session = Mapping[str, Rounds]
"""Rounds by name of the item."""


@dataclass(frozen=True)
class Rate:
    """How many of `n` gates did something, with a 95 % interval (Wilson's).

    Attributes
    ----------
    count, n : int
        Gates that did, and all.
    """

    count: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the share."""
        z, share = 1.96, self.count / self.n
        middle = share + z * z / (2 * self.n)
        half = z * math.sqrt(share * (1 - share) / self.n + z * z / (4 * self.n**2))
        return max(0.0, (middle - half) / (1 + z * z / self.n)), min(1.0, (middle + half) / (1 + z * z / self.n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.n} ({self.count / self.n:.2%}, 95 % interval {low:.2%} to {high:.2%})"


class Resampled:
    """Stands for the machine on which sessions were stored.

    Parameters
    ----------
    sessions : sequence of Session
        To draw from.
    seed : int
        Of the draws.
    """

    def __init__(self, sessions: Sequence[Session], seed: int) -> None:
        self._sessions, self._random, self.seconds = sessions, np.random.default_rng(seed), 0.0

    def __call__(self, items: Sequence[Item]) -> Session:
        """Return a stored session, drawn at random, of these items."""
        self.seconds += START_SECONDS + ITEM_SECONDS * len(items)
        drawn = self._sessions[int(self._random.integers(len(self._sessions)))]
        return {item.name: drawn[item.name] for item in items}

    def clock(self) -> float:
        """Return how many seconds the sessions so far would have taken."""
        return self.seconds


def full_sessions(runs: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[Session]:
    """Return the stored sessions that have all items; later ones of a run have only those that were hard to decide."""
    return [
        {name: run["rounds"][name][number] for name in names}
        for run in runs
        for number in range(min(len(rounds) for rounds in run["rounds"].values()))
    ]


def false_alarms(sessions: Sequence[Session], gates: int, seconds: float) -> tuple[Rate, list[float]]:
    """Return how many resampled gates did not pass, and how long each took."""
    items = [item for item in ITEMS if item.name in sessions[0]]
    failed, times = 0, []
    for seed in range(gates):
        machine = Resampled(sessions, seed)
        verdicts, _ = decide(items, machine, seconds, clock=machine.clock)
        failed += any(verdict.state != "not slower" for verdict in verdicts.values())
        times.append(machine.seconds)
    return Rate(failed, gates), times


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a collected file."""
    return json.loads(gzip.decompress(path.read_bytes()))["runs"]  # type: ignore[no-any-return]


def collect(target: Path, files: Sequence[Path]) -> None:
    """Put runs into one file, times to five digits, without command lines: those name files of the machine."""
    runs = [json.loads(path.read_text(), parse_float=lambda text: float(f"{float(text):.{DIGITS}g}")) for path in files]
    for run in runs:
        run.get("provenance", {}).pop("argv", None)
    target.write_bytes(gzip.compress(json.dumps({"schema": 1, "runs": runs}).encode(), mtime=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect runs, or resample collected ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="put the JSON files of gates into one file")
    collecting.add_argument("file", type=Path)
    collecting.add_argument("runs", type=Path, nargs="+")
    resampling = commands.add_parser("resample", help="count false alarms of gates drawn from runs of equal commits")
    resampling.add_argument("file", type=Path)
    resampling.add_argument("--gates", type=int, default=1000)
    resampling.add_argument("--seconds", type=float, default=100)
    options = parser.parse_args(arguments)
    if options.command == "collect":
        collect(options.file, options.runs)
        return 0
    runs = read(options.file)
    sessions = full_sessions(runs, runs[0]["rounds"])
    rate, times = false_alarms(sessions, options.gates, options.seconds)
    print(f"{len(runs)} runs of equal commits, {len(sessions)} sessions of {len(sessions[0])} items")
    print(f"false alarms: {rate}")
    print(f"seconds of a gate, building apart: median {np.median(times):.0f}, longest {max(times):.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
