"""Stored runs of a study: read, never written here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from clicktrain.errors import ConfigError, DataError
from clicktrain.training.metrics import read_metrics
from clicktrain.training.rundir import RunDirectory
from reproductions import paths, preset
from reproductions.paths import StudyDirectory
from reproductions.preset import Preset, RunSpec

RESULT_SCHEMA = 1


class State(StrEnum):
    """How far a run has come."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    BROKEN_OFF = "broken off"
    TO_COME = "to come"


@dataclass(frozen=True)
class Figures:
    """The figures of a finished run that studies compare.

    Attributes
    ----------
    accuracy : float
        Test accuracy after the last epoch, percent.
    accuracy_best : float
        Test accuracy of the best epoch, chosen on the validation split, percent.
    compression : float
        Convolution weights / kept ones, the paper's definition.
    inference_flops_saved : float
        Percent of the dense network's.
    training_flops : float
        Spent on the whole run.
    seconds : float
        Time of training: steps times median step time of each stage, and what selecting patterns took.
    peak_memory : float
        Most megabytes (10^6 bytes) in use, see `clicktrain.memory.peak`; NaN for runs of before it was measured.
    """

    accuracy: float
    accuracy_best: float
    compression: float
    inference_flops_saved: float
    training_flops: float
    seconds: float
    peak_memory: float

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> Figures:
        """Take the figures from the trainer's result record."""
        steps = sum(stage["steps"] * stage["median_step_seconds"] for stage in result["stages"])
        return cls(
            accuracy=result["accuracy"]["last"],
            accuracy_best=result["accuracy"]["best"],
            compression=result["compression"]["paper"],
            inference_flops_saved=result["inference_flops_saved_percent"],
            training_flops=result["training_flops"]["used"],
            seconds=steps + result["seconds"]["select"],
            peak_memory=result.get("peak_memory_bytes", math.nan) / 1e6,
        )


FIGURES = tuple(field.name for field in fields(Figures))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    spec: RunSpec
    directory: RunDirectory
    result: dict[str, Any]
    provenance: dict[str, Any]

    @cached_property
    def figures(self) -> Figures:
        """The figures that studies compare."""
        return Figures.from_result(self.result)

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The epoch records of the run's metrics, in order."""
        return [record for record in read_metrics(self.directory.metrics) if record["kind"] == "epoch"]

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Provenance of each process that worked on the run."""
        return [self.provenance, *self.provenance["resumed"]]

    @property
    def began_from(self) -> dict[str, Any] | None:
        """Whose first epochs the run took over instead of training them, and how they were trained."""
        record: dict[str, Any] | None = self.provenance.get("began_from")  # absent before runs could share epochs
        return record

    @property
    def machine(self) -> tuple[str, ...]:
        """What its times depend on, beside the code."""
        return tuple(str(self.provenance.get(fact)) for fact in ("platform", "cpu", "gpu", "threads"))

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU trained it."""
        return self.provenance["gpu"] is not None

    @property
    def exclusive(self) -> bool:
        """Whether all processes that trained its epochs were said to have the machine to themselves."""
        declared = [segment["concurrency"]["declared"] for segment in self.segments]
        return all(count == 0 for count in declared + (self.began_from["concurrent_runs"] if self.began_from else []))


@dataclass(frozen=True)
class Study:
    """A study as it stands: its preset and its finished runs."""

    directory: StudyDirectory
    preset: Preset
    runs: tuple[Run, ...]

    def of(self, method: str) -> list[Run]:
        """Return the finished runs of a method."""
        return [run for run in self.runs if run.spec.method == method]

    def sample(self, method: str, figure: str) -> dict[int, float]:
        """Return a figure of a method by seed, of the runs that know it.

        Time and memory are those of runs on the same kind of device as the study's first run: a mean over CPUs and
        GPUs would say nothing of either. Times are those of runs that had the machine to themselves, if there are any.
        """
        runs = self.of(method)
        if figure in ("seconds", "peak_memory"):
            runs = [run for run in runs if run.on_gpu == self.runs[0].on_gpu]
        if figure == "seconds":
            runs = [run for run in runs if run.exclusive] or runs
        found = {run.spec.seed: getattr(run.figures, figure) for run in runs}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def sample_beside(self, method: str, reference: str, figure: str) -> dict[int, float]:
        """Return a figure to be set against that of another method.

        A time only where one machine trained both, and both had it to themselves or neither.
        """
        found = self.sample(method, figure)
        if figure != "seconds":
            return found
        ours, theirs = (
            {run.spec.seed: (run.machine, run.exclusive) for run in self.of(name)} for name in (method, reference)
        )
        return {seed: value for seed, value in found.items() if theirs.get(seed) == ours[seed]}


def load_study(directory: StudyDirectory) -> Study:
    """Read a study's finished runs.

    Raises
    ------
    ConfigError
        There is no study in the directory.
    DataError
        A run's files are damaged or of another version.
    """
    if not directory.preset.is_file():
        raise ConfigError(f"{directory.path} holds no study: there is no {directory.preset.name} in it")
    loaded = preset.load(directory.preset)
    return Study(directory, loaded, tuple(_finished(directory, loaded)))


def _finished(directory: StudyDirectory, loaded: Preset) -> Iterator[Run]:
    for spec in loaded.runs():
        run = directory.run(spec.config.config_id(), spec.seed)
        if run.result.exists():
            yield read_run(spec, run)


def read_run(spec: RunSpec, directory: RunDirectory) -> Run:
    """Read a finished run and check that it is what its place says.

    Raises
    ------
    DataError
        Its files are damaged, of another version, or of another run.
    """
    check_version(directory)
    try:
        result = json.loads(directory.result.read_text())
        run = Run(spec, directory, result, json.loads(directory.provenance.read_text()))
        found = (result["config_id"], result["seed"])
        run.figures  # noqa: B018  # a record that lacks a figure fails here, by name, not in a table
    except (OSError, ValueError) as error:
        raise DataError(f"{directory.path}: cannot read the run: {error}") from None
    except KeyError as error:
        raise DataError(f"{directory.result}: there is no {error} in it") from None
    expected = (spec.config.config_id(), spec.seed)
    if found != expected:
        raise DataError(f"{directory.result}: is of (config_id, seed) {found}, expected {expected}")
    return run


def check_version(directory: RunDirectory) -> None:
    """Refuse the result of a finished run that this version cannot read; a run without one passes.

    Raises
    ------
    DataError
        It is damaged or of another version.
    """
    if not directory.result.exists():
        return
    try:
        schema = json.loads(directory.result.read_text()).get("schema")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{directory.path}: cannot read the run: {error}") from None
    if schema is None:
        raise DataError(f"{directory.result}: there is no 'schema' in it")
    if schema != RESULT_SCHEMA:
        raise DataError(
            f"{directory.result} is of format {schema}, expected {RESULT_SCHEMA}: go on with the version that wrote "
            "it, or use another --results"
        )


def state(run: RunDirectory) -> State:
    """Tell how far a run has come."""
    if run.result.exists():
        return State.DONE
    if is_locked(run.lock):
        return State.RUNNING
    if paths.failure(run).exists():
        return State.FAILED
    return State.BROKEN_OFF if run.config.exists() else State.TO_COME


def is_locked(path: Path) -> bool:
    """Tell whether a process holds a lock on a file, without touching the lock (Linux)."""
    try:
        inode = path.stat().st_ino
        locks = Path("/proc/locks").read_text()
    except FileNotFoundError:
        return False
    return any(f":{inode} " in line for line in locks.splitlines())
