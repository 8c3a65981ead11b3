"""Where the worker processes of a study run: on this machine, or on a Ray cluster."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clicktrain.errors import ConfigError

DIED = -signal.SIGKILL
"""Exit code of a worker of which nobody can tell how it ended."""

_PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """Runs the command lines of workers, one a thread that calls it."""

    def execute(
        self, command: Sequence[str], log: Path, settings: Mapping[str, str], say: Callable[[str], None]
    ) -> int:
        """Run a worker to its end.

        Parameters
        ----------
        command : sequence of str
            Command line.
        log : Path
            File to which its output is appended.
        settings : mapping of str to str
            Variables that its environment has beside those of the machine.
        say : callable
            Takes each line of its output, as far as that can be had here.

        Returns
        -------
        int
            Exit code; negative: the signal that ended it.
        """

    def stop(self) -> None:
        """End the workers that still run."""


class Local:
    """Processes of this machine."""

    def __init__(self) -> None:
        self._workers: set[subprocess.Popen[str]] = set()

    def execute(
        self, command: Sequence[str], log: Path, settings: Mapping[str, str], say: Callable[[str], None]
    ) -> int:
        """Run a worker to its end; see `Executor.execute`."""
        with log.open("a") as file, _start(command, settings) as worker:
            self._workers.add(worker)
            assert worker.stdout is not None
            for line in worker.stdout:
                file.write(line)
                say(line.rstrip())
        self._workers.discard(worker)
        return worker.returncode

    def stop(self) -> None:
        """End the workers that still run."""
        for worker in list(self._workers):
            worker.terminate()


class Ray:
    """Tasks of a Ray cluster: the one that `RAY_ADDRESS` or this machine knows, or else one of this machine alone.

    Every node needs this project, its environment and the results directory under the same paths. A worker or a
    node that dies costs the run it was at, which its next attempt takes up from its last checkpoint.

    Parameters
    ----------
    jobs : int
        Runs at the same time; each gets its share of the cluster's CPUs.
    gpus : float, optional
        GPUs of a run; unset: one where the cluster has any.

    Raises
    ------
    ConfigError
        The package ray is not installed, or there is no cluster to be had.
    """

    def __init__(self, jobs: int, gpus: float | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "--executor ray needs the package ray, which is not installed: pip install 'clicktrain[distributed]'"
            ) from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(f"--executor ray: {error}") from None
        there = ray.cluster_resources()
        share = max(1, int(there.get("CPU", 1)) // jobs)
        wanted = min(1.0, there.get("GPU", 0.0)) if gpus is None else gpus
        if wanted > there.get("GPU", 0.0):
            raise ConfigError(f"--gpus {wanted:g}: the Ray cluster has {there.get('GPU', 0.0):g} GPUs")
        self._ray = ray
        self._task = ray.remote(num_cpus=share, num_gpus=wanted, max_retries=0)(_work)
        self._running: set[Any] = set()

    def execute(
        self, command: Sequence[str], log: Path, settings: Mapping[str, str], say: Callable[[str], None]
    ) -> int:
        """Run a worker to its end; see `Executor.execute`. Its output is in the log only."""
        task = self._task.remote(list(command), str(log.resolve()), dict(settings), os.getcwd())
        self._running.add(task)
        try:
            code: int = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            say(f"its Ray worker ended: {type(error).__name__}")
            code = DIED
        finally:
            self._running.discard(task)
        return code

    def stop(self) -> None:
        """Cancel the tasks that still run."""
        for task in list(self._running):
            self._ray.cancel(task, force=True)


def _work(command: list[str], log: str, settings: dict[str, str], folder: str) -> int:
    """Run a command on a node of the cluster."""
    with open(log, "a") as file, _start(command, settings, cwd=folder, preexec_fn=_die_with_parent) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            file.write(line)
            file.flush()
    return worker.returncode


def _start(command: Sequence[str], settings: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **settings},  # the last words of a killed worker are in its log
        **options,
    )


def _die_with_parent() -> None:
    """Make the kernel kill this process when its Ray worker dies: no two may work on one run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
