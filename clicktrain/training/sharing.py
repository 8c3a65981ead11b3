"""Beginning a run from epochs that another run has trained: those in which both do nothing but dense training.

With equal seeds, data and settings such epochs are equal to the last bit, so the second run may take over the first
one's state, metrics and time instead of computing them again. Everything that could make them differ is compared
here, before anything of the new run is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from clicktrain.config import RunConfig, TrainConfig
from clicktrain.errors import CheckpointError, ConfigError
from clicktrain.method import Method
from clicktrain.training.checkpoint import CheckpointStore, readable
from clicktrain.training.loop import Record, Trainer
from clicktrain.training.metrics import read_metrics
from clicktrain.training.rundir import RunDirectory
from clicktrain.training.session import Session, build_method
from clicktrain.training.timeline import Timeline

_HARMLESS = ("checkpoint_every", "keep", "tensorboard")
"""Fields of the section train that change no number."""

_MACHINE = (
    ("cpu", "model"),
    ("cpu", "signature"),
    ("gpu", "model"),
    ("threads", "torch"),
    ("packages", "torch"),
    ("distributed", "processes"),
)
"""Where the provenance of a run says what could change bits or times between equal configurations."""


@dataclass(frozen=True)
class DenseStart:
    """What a run takes over from another.

    Attributes
    ----------
    trainer : dict
        The other's trainer state after the shared epochs.
    records : list of Record
        The other's metrics of these epochs.
    seconds : float
        Wall-clock time the other spent on them.
    peak_memory : int
        Most bytes that the other used for them.
    origin : dict
        For the provenance: whose epochs these are, how many, and under which conditions they were trained.
    """

    trainer: dict[str, Any]
    records: list[Record]
    seconds: float
    peak_memory: int
    origin: dict[str, Any]

    def records_of(self, trainer: Trainer) -> Iterator[Record]:
        """Return the records as `trainer`, begun from them, would have yielded them itself."""
        timeline, every = trainer.timeline, trainer.session.config.train.eval_every
        for record in self.records:
            own = record | {"stage": trainer.method.stage}
            if record["kind"] == "epoch":
                own["phase"] = timeline.phases[timeline.index(record["epoch"])].name
                is_due = (record["epoch"] + 1) % every == 0
                if not is_due and record["test_accuracy"] is not None:  # the other's last epoch, but not ours
                    own |= {"val_accuracy": None, "test_accuracy": None, "eval_seconds": 0.0}
            yield own


def differences(config: RunConfig, other: RunConfig) -> str | None:
    """Return the first field, outside of the method, in which two runs differ so that they share no epoch."""
    return _comparable(config).first_difference(_comparable(other))


def _comparable(config: RunConfig) -> RunConfig:
    defaults = TrainConfig()
    harmless = {name: getattr(defaults, name) for name in _HARMLESS}
    return config.model_copy(update={"method": RunConfig().method, "train": config.train.model_copy(update=harmless)})


def take_over(
    session: Session, path: str | os.PathLike[str], record: dict[str, Any], note: Callable[[str], None]
) -> DenseStart:
    """Return the start of a fresh run that a run in another directory offers.

    Parameters
    ----------
    session : Session
        Of the fresh run.
    path : path-like
        Directory of the other run, finished or not; nothing in it is changed.
    record : dict
        Provenance of this process.
    note : callable
        Told of damaged checkpoints that are passed over.

    Raises
    ------
    ConfigError
        There is no run, it shares no epoch with this one, or it kept none; the message says what differs.
    CheckpointError
        Its files are damaged.
    """
    donor = RunDirectory(path)
    config = donor.read_config()
    theirs = donor.read_record()
    if difference := _first_difference(session, record, config, theirs):
        raise ConfigError(f"cannot begin from {donor.path}: {difference}")
    method = build_method(config)
    timeline = Timeline(method.phases, config.train)
    steps = _steps(session, timeline)
    store = CheckpointStore(donor.shared, keep=None)
    epochs = _kept_epochs(session, method, steps, store)
    if not epochs:
        raise ConfigError(f"cannot begin from {donor.path}: {_why_none(session, method)}")
    if difference := _phase_difference(session, timeline, epochs[0]):
        raise ConfigError(f"cannot begin from {donor.path}: {difference}")
    epoch, state = _load(store, {epoch: steps[epoch - 1] for epoch in epochs}, note)
    segments = [theirs, *theirs["resumed"]]
    earlier = theirs.get("began_from") or {"concurrent_runs": [], "code": []}
    origin = {
        "config_id": config.config_id(),
        "seed": session.seed,
        "method": method.name,
        "epochs": epoch,
        "steps": steps[epoch - 1],
        "seconds": state["seconds"],
        "concurrent_runs": [segment["concurrency"]["declared"] for segment in segments] + earlier["concurrent_runs"],
        "code": [segment["code"] for segment in segments] + earlier["code"],
    }
    records = _records(donor, epoch, steps[epoch - 1])
    return DenseStart(state["trainer"], records, state["seconds"], state.get("peak_memory", 0), origin)


def _first_difference(
    session: Session, record: dict[str, Any], config: RunConfig, theirs: dict[str, Any]
) -> str | None:
    """Compare all that is known before phases and checkpoints are looked at."""
    if session.seed != theirs["seed"]:
        return f"seed = {session.seed}, not {theirs['seed']}"
    if difference := differences(session.config, config):
        return difference
    if record["data_fingerprint"] != theirs["data_fingerprint"]:
        return "its data set has other content"
    for section, key in _MACHINE:
        mine, other = ((each.get(section) or {}).get(key) for each in (record, theirs))
        if mine != other:
            return f"{section}.{key} of the machine is {mine!r}, not {other!r}"
    return None


def _steps(session: Session, timeline: Timeline) -> list[int]:
    """Return the number of steps done after each epoch."""
    lengths = [len(session.train_loader(phase)) for phase in timeline.phases]
    done, steps = 0, []
    for epoch in range(timeline.epochs):
        done += lengths[timeline.index(epoch)]
        steps.append(done)
    return steps


def _limit(session: Session, method: Method) -> int:
    """Return how many epochs both train dense; at least one epoch of a run is its own."""
    whole = sum(phase.epochs for phase in session.method.phases)
    return min(session.method.dense_epochs, method.dense_epochs, whole - 1)


def _kept_epochs(session: Session, method: Method, steps: list[int], store: CheckpointStore) -> list[int]:
    """Return after which of the shared epochs there is a checkpoint, the last one first."""
    kept = store.steps()
    shared = range(min(_limit(session, method), len(steps)), 0, -1)
    return [epoch for epoch in shared if steps[epoch - 1] in kept]


def _why_none(session: Session, method: Method) -> str:
    for each in (session.method, method):
        if each.dense_epochs < 1:
            return f"method {each.name} has no epoch of dense training at its start (dense_epochs = 0)"
    limit = _limit(session, method)
    return f"it kept none of its first {limit} epochs: train it with --keep-epoch {limit}"


def _phase_difference(session: Session, theirs: Timeline, epochs: int) -> str | None:
    """Compare what the phases of both runs say about the shared epochs."""
    train = session.config.train  # equal in both runs
    mine = Timeline(session.method.phases, train)
    for epoch in range(epochs):
        settings = [_settings(timeline, train, epoch) for timeline in (mine, theirs)]
        for key, value in settings[0].items():
            if value != settings[1][key]:
                return f"{key} of epoch {epoch} = {value!r}, not {settings[1][key]!r}"
        batches = len(session.train_loader(mine.phases[mine.index(epoch)]))
        for batch in range(batches):
            position = epoch + batch / batches
            if mine.lr(position) != theirs.lr(position):
                return f"learning rate at epoch {position:g} = {mine.lr(position):g}, not {theirs.lr(position):g}"
    return None


def _settings(timeline: Timeline, train: TrainConfig, epoch: int) -> dict[str, Any]:
    phase = timeline.phases[timeline.index(epoch)]
    return {
        "batch_size": phase.batch_size or train.batch_size,
        "optimizer": phase.optimizer or train.optimizer,
        "weight_decay": train.weight_decay if phase.weight_decay is None else phase.weight_decay,
        "begin of a phase": timeline.begins(epoch),
    }


def _load(store: CheckpointStore, steps: dict[int, int], note: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """Return the first epoch whose checkpoint is whole, and its state."""
    for epoch, step in steps.items():
        try:
            return epoch, readable(store.load_step(step), store.folder)
        except CheckpointError as error:
            failure = error
            note(f"{error}: passed over")
    raise failure


def _records(donor: RunDirectory, epochs: int, steps: int) -> list[Record]:
    """Return the metrics of the first epochs.

    Raises
    ------
    CheckpointError
        Some are missing, as in evidence, which holds no steps.
    """
    try:
        records = list(takewhile(lambda record: record["epoch"] < epochs, read_metrics(donor.metrics)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the metrics {donor.metrics}: {error}") from None
    counts = [sum(record["kind"] == kind for record in records) for kind in ("epoch", "step")]
    if counts != [epochs, steps]:
        raise CheckpointError(f"{donor.metrics} has lost lines: {counts[1]} steps of {epochs} epochs, expected {steps}")
    return records
