"""Base and head in processes of their own, timed in turns on one core.

Three processes take part: base, head, and base once more, whose difference from the first is the machine's own noise.
They time the same item in rounds, in changing order. Where a process has its memory makes it
faster or slower for good, so every session starts new ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.gate.items import Item
from clicktrain.errors import ClickTrainError

SIDES = ("base", "head", "twin")
"""The processes of a session; the twin is base once more."""
SAMPLE_MS, ITEM_MS = 3.0, 300.0
MIN_ROUNDS, MAX_ROUNDS = 5, 15
_BENCH = Path(__file__).parents[1]

Rounds = Mapping[str, list[float]]
"""Side -> milliseconds of one call, one value a round."""


class BenchmarkFailed(ClickTrainError):
    """A benchmark raised, or its process ended."""


class NotInThisCommit(ClickTrainError):
    """A commit lacks something that a benchmark needs."""


class Build:
    """The exported sources of a commit, and where its compiled kernels are kept.

    Parameters
    ----------
    name : str
        For messages.
    tree : Path
        Directory that holds `clicktrain`.
    cache : Path
        Compiled kernels by content, of any number of commits.
    """

    def __init__(self, name: str, tree: Path, cache: Path) -> None:
        self.name, self.tree, self.cache = name, tree, cache

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that computes with this build."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLICKTRAIN_", "PYTHON", "OMP_", "GOMP_"))}
        return kept | {
            "PYTHONPATH": f"{self.tree}{os.pathsep}{_BENCH}",
            "CLICKTRAIN_CACHE_DIR": str(self.cache),
            "CLICKTRAIN_BENCH_STRICT": "1" if self.name == "head" else "",
            "OMP_NUM_THREADS": "1",
        }


class Process:
    """A running `worker` of a build.

    Parameters
    ----------
    build : Build
        What it computes with.
    core : int or None
        Where it takes samples; None: wherever the system likes.
    """

    def __init__(self, build: Build, core: int | None) -> None:
        self._build, self._is_ready, self._messages = build, False, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(build.tree)]
        self._process = subprocess.Popen(
            [*command, "" if core is None else str(core)], cwd=build.tree, env=build.environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def ask(self, *request: object) -> None:
        """Send a request without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why

    def answer(self, what: str) -> Any:
        """Wait for the answer to the oldest open request, about `what`."""
        if not self._is_ready:
            self._is_ready = True
            self.answer("start")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._messages.seek(0)
            last = (self._messages.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            raise BenchmarkFailed(f"{what} ended the process of {self._build.name}: {last}")
        reply = json.loads(line)
        if reply.get("kind") == "NotImplementedError":
            raise NotInThisCommit(f"{what} cannot be measured on {self._build.name}: {reply['error']}")
        if "error" in reply:
            raise BenchmarkFailed(f"{what} raised on {self._build.name}: {reply['error']}")
        return reply["answer"]


class Measurer:
    """Measures sessions of two builds.

    Parameters
    ----------
    base, head : Build
        What is compared.
    """

    def __init__(self, base: Build, head: Build) -> None:
        self._builds = {"base": base, "head": head, "twin": base}
        self._core = max(os.sched_getaffinity(0))

    def prepare(self, items: Sequence[Item]) -> dict[str, str]:
        """Compile what both builds need, and run every item once on each, its result checked.

        Returns
        -------
        dict
            Name of an item that base does not have -> why.

        Raises
        ------
        BenchmarkFailed
            If an item raises.
        """
        missing = {}
        with Process(self._builds["base"], None) as base, Process(self._builds["head"], None) as head:
            for item in items:
                for process in (base, head):
                    process.ask("setup", item.benchmark, item.parameters)
                try:
                    base.answer(item.name)
                except NotInThisCommit as reason:
                    missing[item.name] = str(reason)
                try:
                    head.answer(item.name)
                except NotInThisCommit as reason:
                    raise BenchmarkFailed(str(reason)) from None
        return missing

    def __call__(self, items: Sequence[Item]) -> dict[str, Rounds]:
        """Time items in one session, that is in processes of their own; returns the rounds by name of the item."""
        with ExitStack() as stack:
            processes = {side: stack.enter_context(Process(build, self._core)) for side, build in self._builds.items()}
            return {item.name: _rounds(processes, item) for item in items}


def _rounds(processes: Mapping[str, Process], item: Item) -> Rounds:
    for process in processes.values():
        process.ask("setup", item.benchmark, item.parameters)
    call_ms = max(min(process.answer(item.name) for process in processes.values()), 1e-3)
    calls = max(1, round(SAMPLE_MS / call_ms))
    rounds = int(ITEM_MS / (len(SIDES) * calls * call_ms))
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        first = index % len(SIDES)
        order = SIDES[first:] + SIDES[:first]
        for side in order if index % 2 else reversed(order):  # each comes after each other equally often
            processes[side].ask("sample", calls)
            samples[side].append(processes[side].answer(item.name))
    return samples
