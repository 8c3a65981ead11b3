"""The directory of one run: the names of its files, and the lock that keeps it to one process."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clicktrain.config import RunConfig
from clicktrain.errors import CheckpointError, ConfigError, InvalidArgument
from clicktrain.files import write_atomic


class RunDirectory:
    """Names and guards the files of one run; nothing else spells these names.

    Parameters
    ----------
    path : path-like
        The directory; created by `claim`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.provenance = self.path / "provenance.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.checkpoints = self.path / "checkpoints"
        self.shared = self.path / "shared"
        self.tensorboard = self.path / "tensorboard"
        self.lock = self.path / "lock"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Create the directory and hold it against every other process until the block ends.

        The kernel gives the lock back however the process dies, so there is none to clean up.

        Raises
        ------
        InvalidArgument
            The directory cannot be written, or another process trains in it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InvalidArgument(f"cannot write the run directory {self.path}: {error.strerror}") from None
        try:
            self._lock(handle)
            for leaving in self.path.rglob(".*.tmp"):  # of processes that were killed while writing
                leaving.unlink()
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode() or "unknown"
            raise InvalidArgument(f"{self.path} is in use: process {owner} trains in it") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)

    def read_config(self) -> RunConfig:
        """Return the configuration the run was started with.

        Raises
        ------
        ConfigError
            The directory holds no run.
        """
        if not self.config.exists():
            raise ConfigError(f"{self.path} holds no run: there is no {self.config.name} in it")
        return RunConfig.from_toml(self.config)

    def read_record(self) -> dict[str, Any]:
        """Return the provenance record of the run.

        Raises
        ------
        CheckpointError
            The record is missing or unreadable.
        """
        try:
            record: dict[str, Any] = json.loads(self.provenance.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.provenance}: cannot read the record of the run: {error}") from None
        return record

    def read_result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None where it is not finished."""
        if not self.result.exists():
            return None
        result: dict[str, Any] = json.loads(self.result.read_text())
        return result

    def enroll(self, config: RunConfig, seed: int) -> bool:
        """Check that a run already in the directory is this one, and tell whether there is one.

        Returns
        -------
        bool
            Whether the run was begun before.

        Raises
        ------
        ConfigError
            The run here has another configuration or seed (the message names the first key that differs), or
            files of a run lie here without their configuration. Nothing is changed.
        """
        if not self.config.exists():
            if self.metrics.exists() or any(self.checkpoints.iterdir()):
                raise ConfigError(f"{self.path} holds files of a run but no {self.config.name}: use another --out")
            return False
        difference = config.first_difference(self.read_config())
        if difference is None and self.provenance.exists() and (theirs := self.read_record()["seed"]) != seed:
            difference = f"seed = {seed}, not {theirs}"
        if difference:
            raise ConfigError(f"{self.path} holds a run of another configuration: {difference}; use another --out")
        return True

    def begin(self, config: RunConfig, origin: dict[str, Any], began_from: dict[str, Any] | None = None) -> None:
        """Write provenance and then the configuration, with which the directory belongs to this run."""
        self._write_json(self.provenance, {**origin, "began_from": began_from, "resumed": []})
        write_atomic(self.config, config.to_toml())

    def note_resumed(self, origin: dict[str, Any], **changes: Any) -> None:
        """Add the provenance of a process that takes the run up again, and what it decides anew in the record.

        Raises
        ------
        CheckpointError
            The data are no longer those that the run began with.
        """
        record = self.read_record()
        if origin["data_fingerprint"] != record["data_fingerprint"]:
            raise CheckpointError(f"{self.path}: the data set has changed since this run began; use another --out")
        record["resumed"].append(origin)
        self._write_json(self.provenance, record | changes)

    def shared_seconds(self) -> float:
        """Return the time of the epochs that the run took over from another; 0.0 where it took none."""
        began_from = self.read_record().get("began_from")
        return began_from["seconds"] if began_from else 0.0

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result, with which the run is done."""
        self._write_json(self.result, result)

    @staticmethod
    def _write_json(path: Path, values: dict[str, Any]) -> None:
        write_atomic(path, json.dumps(values, indent=2) + "\n")
