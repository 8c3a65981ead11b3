"""A process that trains the toy run and can be made to stop in the middle of writing a checkpoint.

Started through multiprocessing's fork server, so that each start costs milliseconds; a kill is a real SIGKILL.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it, which takes seconds: here it is once for all victims

import clicktrain.data
import clicktrain.models
from clicktrain import files
from clicktrain.config import RunConfig
from clicktrain.training import Callback, checkpoint, train
from clicktrain.training.metrics import read_metrics
from tests.helpers import toy

MOMENTS = ("file made", "half written", "before rename", "after rename")
"""Where in the writing of a checkpoint a victim can be made to stop."""

_PATIENCE = 300  # seconds, for machines that are busy with other things

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Victim:
    """A run in a process of its own.

    Parameters
    ----------
    config : RunConfig
        Of the toy data set and network.
    out : Path
        Run directory.
    stop : (str, int), optional
        One of `MOMENTS`, and in which checkpoint of this process.
    **options
        More arguments of `train`.
    """

    def __init__(self, config: RunConfig, out: Path, stop: tuple[str, int] | None = None, **options: Any) -> None:
        self._signals, child = _context.Pipe(duplex=False)
        self._process: BaseProcess = _context.Process(target=_work, args=(config, out, child, stop, options))
        self._process.start()
        child.close()

    def wait_for(self, signals: int) -> None:
        """Wait for so many signals: one for each record, one for having stopped."""
        for _ in range(signals):
            assert self._signals.poll(_PATIENCE), "the victim is silent"
            self._signals.recv()

    def kill(self) -> None:
        """Kill the process, which must still be alive."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL

    def finish(self) -> None:
        """Wait until the run is done."""
        self._process.join(_PATIENCE)
        assert self._process.exitcode == 0


def fingerprint(out: Path) -> dict[str, str]:
    """Return a hash of each part of a finished run that must not depend on how often it was killed."""
    (newest, *_) = sorted((out / "checkpoints").glob("*.pt"), reverse=True)
    state = torch.load(newest, weights_only=True)["trainer"]
    parts = {key: _plain(state[key]) for key in ("model", "optimizer", "rng", "method", "meter")}
    parts["metrics"] = [toy.without_times(record) for record in read_metrics(out / "metrics.jsonl")]
    result = json.loads((out / "result.json").read_text())
    of_machine = ("seconds", "stages", "peak_memory_bytes")
    parts["result"] = {key: value for key, value in result.items() if key not in of_machine}
    return {key: hashlib.sha256(pickle.dumps(value)).hexdigest() for key, value in parts.items()}


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return (str(state.dtype), tuple(state.shape), state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state


class _Signals(Callback):
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def on_step(self, record: dict[str, Any]) -> None:
        self._pipe.send(record["step"])

    def on_epoch(self, record: dict[str, Any]) -> None:
        self._pipe.send(record["epoch"])


def _work(
    config: RunConfig, out: Path, pipe: Connection, stop: tuple[str, int] | None, options: dict[str, Any]
) -> None:
    clicktrain.data.load, clicktrain.models.create = toy.load_data, toy.create_model
    if stop is None:
        train(config, out, callbacks=[_Signals(pipe)], **options)
    else:
        _stop_in_write(*stop, lambda: pipe.send("stopped"))
        train(config, out, callbacks=[], **options)


def _stop_in_write(moment: str, number: int, tell: Callable[[], None]) -> None:
    """Make the `number`-th checkpoint that this process writes stop for good at a moment."""
    original, replace, fdopen = files.write_atomic, os.replace, os.fdopen
    written = 0

    def stop() -> None:
        tell()
        time.sleep(600)

    def write_atomic(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == number:
            os.replace, os.fdopen = replace_and_stop, fdopen_and_stop
        original(path, data)

    def replace_and_stop(source: str, target: Path) -> None:
        if moment == "after rename":
            replace(source, target)
        stop()

    def fdopen_and_stop(handle: int, mode: str) -> Any:
        if moment == "file made":
            stop()
        if moment == "half written":
            return _HalfWritten(handle, stop)
        return fdopen(handle, mode)

    checkpoint.write_atomic = write_atomic


class _HalfWritten:
    """A file that stops after half of what is written to it."""

    def __init__(self, handle: int, stop: Callable[[], None]) -> None:
        self._handle, self._stop = handle, stop

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, data: bytes) -> None:
        os.write(self._handle, data[: len(data) // 2])
        os.fsync(self._handle)
        self._stop()
