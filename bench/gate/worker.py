"""A process that times one commit: reads one request a line, answers each with a line of JSON.

Started by `measuring`, with a commit's sources and `bench` on the path, so that `suite`, of the working tree, times
the library of that commit. Requests: ["setup", "module:Class.method", parameters] answers the milliseconds of a call;
["sample", calls] those of one call, measured over so many on one core.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

WARM_UP_SECONDS = 0.03


class Worker:
    """What is set up at the moment.

    Parameters
    ----------
    core : int or None
        Where samples are taken.
    """

    def __init__(self, core: int | None) -> None:
        self._cores = os.sched_getaffinity(0)
        self._core = self._cores if core is None else {core}
        self._run: Callable[[], object] = lambda: None

    def setup(self, benchmark: str, parameters: list[Any]) -> float:
        """Make a benchmark ready and warm it up."""
        os.sched_setaffinity(0, self._cores)
        module, _, path = benchmark.partition(":")
        class_name, _, method = path.partition(".")
        found = getattr(import_module(f"suite.{module}"), class_name)()
        found.setup(*parameters)
        run = getattr(found, method)
        self._run = lambda: run(*parameters)
        start, durations = time.perf_counter(), list[float]()
        while len(durations) < 2 or time.perf_counter() - start < WARM_UP_SECONDS:
            durations.append(_milliseconds(self._run, 1))
        return sorted(durations)[len(durations) // 2]

    def sample(self, calls: int) -> float:
        """Time some calls; short ones after one that brings the caches back to this process."""
        os.sched_setaffinity(0, self._core)
        if calls > 1:
            self._run()
        return _milliseconds(self._run, calls) / calls


def _milliseconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3


def main(tree: str, core: str) -> None:
    """Serve until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the library prints is no answer
    try:
        import torch

        import clicktrain

        if not str(clicktrain.__file__).startswith(tree):
            raise ImportError(f"clicktrain comes from {clicktrain.__file__}, expected from {tree}")
        torch.set_num_threads(1)
        worker = Worker(int(core) if core else None)
        print(json.dumps({"answer": "ready"}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": _text(error), "kind": type(error).__name__}), file=answers, flush=True)
        return
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"answer": getattr(worker, name)(*arguments)}
        except Exception as error:
            answer = {"error": _text(error), "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main(*sys.argv[1:])
