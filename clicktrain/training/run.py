"""Runs on disk: train in a directory from wherever the run stands, and evaluate what is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from clicktrain import distributed, memory, provenance
from clicktrain.config import RunConfig
from clicktrain.errors import CheckpointError, ClickTrainError, DivergedError, InvalidArgument
from clicktrain.training.callbacks import Callback, CallbackList, TensorBoard
from clicktrain.training.checkpoint import CHECKPOINT_SCHEMA, CheckpointStore, readable
from clicktrain.training.layout import faster_in_channels_last
from clicktrain.training.loop import Record, Trainer
from clicktrain.training.metrics import MetricsLog
from clicktrain.training.progress import console_progress
from clicktrain.training.result import size_figures, summarise
from clicktrain.training.rundir import RunDirectory
from clicktrain.training.session import Session, build
from clicktrain.training.sharing import DenseStart, take_over

_PROBE_IMAGES = 32  # enough on a CPU to tell which memory format is faster


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    callbacks: Sequence[Callback] | None = None,
    concurrent_runs: int | None = None,
    keep_epochs: Collection[int] = (),
    begin_from: str | os.PathLike[str] | None = None,
    or_from_start: bool = False,
) -> dict[str, Any]:
    """Train in a directory until the run is done, from its start or from its last checkpoint.

    Killed at any moment and called again with the same arguments, a run on a CPU ends with the same bits as
    one that was never killed. Called on a finished run, it returns its result and does nothing.

    Started in several processes by torchrun, they train one network together, see `clicktrain.distributed`: each
    computes on its share of every batch, and the first one writes the files. A run may go on in any other number of
    processes.

    Parameters
    ----------
    config : RunConfig
        What to train, and how.
    out : path-like
        Directory of the run, for this run alone; created if absent.
    seed : int
        At least 0.
    callbacks : sequence of Callback, optional
        Who watches; None: progress on the console.
    concurrent_runs : int, optional
        How many other runs share the machine on purpose, for the record.
    keep_epochs : collection of int
        Numbers of epochs, 1 to all, after which the state is kept for good, for other runs to begin from.
    begin_from : path-like, optional
        Directory of another run. A fresh run takes over from it the epochs that both train dense and that it
        kept: state, metrics and time. No number of the result changes but times, which are the other run's.
        A run that has a checkpoint of its own goes on from that.
    or_from_start : bool
        Where `begin_from` cannot be, say why and train from the start instead of raising.

    Returns
    -------
    dict
        The content of ``result.json``.

    Raises
    ------
    ClickTrainError
        The configuration cannot work here, the directory holds another run or cannot be written, every
        checkpoint is damaged, the run to begin from shares no epoch with this one, or the loss diverged.
    """
    with distributed.group():
        if distributed.rank() > 0:
            return _follow(config, seed)
        directory = RunDirectory(out)
        watch = CallbackList([console_progress()] if callbacks is None else callbacks)
        if config.train.tensorboard:
            watch = CallbackList([watch, TensorBoard(directory.tensorboard)])
        with ExitStack() as held:
            try:
                held.enter_context(directory.claim())
                found, session = _find(config, seed, directory, watch, concurrent_runs, begin_from, or_from_start)
            except (ClickTrainError, OSError) as error:
                distributed.send(_Found(error=error))
                raise
            distributed.send(found)
            if session is not None:
                return distributed.send(_lead(session, directory, watch, found, keep_epochs))
            watch.on_note(f"{directory.path}: this run is done, nothing left to do")
            assert found.result is not None
            return found.result


@dataclass(frozen=True)
class _Found:
    """What the first process finds in the directory of a run, and tells the others.

    Attributes
    ----------
    begin : dict, DenseStart or None
        Checkpoint or other run from which training goes on; None: it begins.
    origin : dict
        Provenance of the first process.
    is_known : bool
        Whether the directory held the run before.
    channels_last : bool
        Memory format of a run that begins.
    result : dict or None
        Result of a run that is done.
    error : Exception or None
        Why the first process gives up.
    """

    begin: dict[str, Any] | DenseStart | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    is_known: bool = False
    channels_last: bool = False
    result: dict[str, Any] | None = None
    error: Exception | None = None


def _find(
    config: RunConfig,
    seed: int,
    directory: RunDirectory,
    watch: Callback,
    concurrent_runs: int | None,
    begin_from: str | os.PathLike[str] | None,
    or_from_start: bool,
) -> tuple[_Found, Session | None]:
    """Look where a run stands, and build what it is made of unless it is done."""
    known = directory.enroll(config, seed)
    if (result := directory.read_result()) is not None:
        return _Found(result=result), None
    session = build(config, seed)
    origin = provenance.collect(seed=seed, data_fingerprint=session.data.fingerprint, concurrent_runs=concurrent_runs)
    begin: dict[str, Any] | DenseStart | None = _load(CheckpointStore(directory.checkpoints), watch)
    if begin_from is not None and begin is None:
        begin = _start(lambda: take_over(session, begin_from, origin, watch.on_note), or_from_start, watch)
    return _Found(begin, origin, known, channels_last=begin is None and _channels_last(session)), session


def _lead(
    session: Session, directory: RunDirectory, watch: Callback, found: _Found, keep_epochs: Collection[int]
) -> dict[str, Any]:
    """Train and write the files."""
    # what cannot work fails here, before the directory is taken
    run = _Run(directory, session, watch, found, keep_epochs)
    began_from = found.begin.origin if isinstance(found.begin, DenseStart) else None
    if not found.is_known:
        directory.begin(session.config, found.origin, began_from)
    elif isinstance(found.begin, dict):
        directory.note_resumed(found.origin)
    else:  # killed before its first checkpoint: where the run begins is decided now
        directory.note_resumed(found.origin, began_from=began_from)
    if session.config.data.eval_on == "test":
        watch.on_note("the best epoch is chosen on the test set, as in the official code: optimistic")
    return run.finish()


def _follow(config: RunConfig, seed: int) -> dict[str, Any]:
    """Train beside the first process, and write nothing."""
    found: _Found = distributed.receive()
    if found.error is not None:
        raise found.error
    if found.result is not None:
        return found.result
    trainer = _trainer(build(config, seed), found)
    for _ in trainer.records():
        pass
    result: dict[str, Any] = distributed.receive()
    return result


def _trainer(session: Session, found: _Found) -> Trainer:
    """Return the trainer that goes on from what was found."""
    if isinstance(found.begin, DenseStart):
        return Trainer.from_dense_state(session, found.begin.trainer)
    if found.begin is None:
        return Trainer(session, channels_last=found.channels_last)
    return Trainer.from_state(session, found.begin["trainer"])


def evaluate_run(out: str | os.PathLike[str], callback: Callback | None = None) -> dict[str, Any]:
    """Evaluate the last checkpoint of a run, finished or not.

    Parameters
    ----------
    out : path-like
        Directory of the run; nothing in it is changed.
    callback : Callback, optional
        Told of damaged checkpoints.

    Returns
    -------
    dict
        ``step`` and ``epoch`` done, ``stage``, ``accuracy`` (percent by split), and the sizes as in
        ``result.json``: compression, inference MACs, parameters.

    Raises
    ------
    ClickTrainError
        The directory holds no run, or no checkpoint that is whole.
    """
    session, trainer, network = _restore(out, callback or Callback())
    return {
        "step": trainer.position.step,
        "epoch": trainer.position.epoch,
        "stage": trainer.method.stage,
        "accuracy": {
            "validation": trainer.evaluate(session.validation, network),
            "test": trainer.evaluate(session.test, network),
        },
        **size_figures(trainer, network),
    }


def trained_network(out: str | os.PathLike[str], callback: Callback | None = None) -> tuple[nn.Module, Tensor]:
    """Return the network of a run's last checkpoint on the CPU, and normalised test images as an example input.

    Parameters and errors as `evaluate_run`.
    """
    session, _, network = _restore(out, callback or Callback())
    images, _ = next(session.eval_batches(session.test))
    return network.cpu().eval(), images.cpu()


def _restore(out: str | os.PathLike[str], callback: Callback) -> tuple[Session, Trainer, nn.Module]:
    """Return a run as its last checkpoint left it, and its network."""
    directory = RunDirectory(out)
    session = build(directory.read_config(), directory.read_record()["seed"])
    state = _load(CheckpointStore(directory.checkpoints), callback)
    if state is None:
        raise CheckpointError(f"{directory.path} holds no checkpoint yet")
    trainer = Trainer.from_state(session, state["trainer"])
    return session, trainer, trainer.method.finish() if trainer.is_done else trainer.method.model


class _Run:
    """A run in progress: connects the trainer with the files and with those who watch."""

    def __init__(
        self,
        directory: RunDirectory,
        session: Session,
        watch: Callback,
        found: _Found,
        keep_epochs: Collection[int],
    ) -> None:
        begin = found.begin
        self._started = time.perf_counter()
        self._directory, self._watch, self._config = directory, watch, session.config
        self._store = CheckpointStore(directory.checkpoints, session.config.train.keep)
        self._shared = CheckpointStore(directory.shared, keep=None)
        self._has_checkpoint = isinstance(begin, dict)
        self._taken_over: list[Record] = []
        self._earlier_seconds, self._earlier_memory, self._metrics_bytes = 0.0, 0, 0
        self._trainer = _trainer(session, found)
        if isinstance(begin, DenseStart):
            self._taken_over = list(begin.records_of(self._trainer))
            self._earlier_seconds, self._earlier_memory = begin.seconds, begin.peak_memory
        elif begin is not None:
            self._earlier_seconds, self._metrics_bytes = begin["seconds"], begin["metrics_bytes"]
            self._earlier_memory = begin.get("peak_memory", 0)  # absent before it was measured
        self._keep_epochs = _checked_epochs(keep_epochs, self._trainer.timeline.epochs)

    def finish(self) -> dict[str, Any]:
        """Train to the end, write the result and return it."""
        trainer, watch = self._trainer, self._watch
        if self._taken_over:
            watch.on_note(f"begins with {trainer.position.epoch} epochs of another run: {self._earlier_seconds:.1f} s")
        elif trainer.position.step:
            watch.on_note(f"going on after step {trainer.position.step} of {trainer.total_steps}")
        if self._keep_epochs:
            self._directory.shared.mkdir(exist_ok=True)
        metrics = MetricsLog(self._directory.metrics, self._metrics_bytes)
        watch.on_start(trainer.position.step, trainer.total_steps)
        try:
            for record in self._taken_over:
                metrics.write(record)
            if not self._has_checkpoint:
                self._checkpoint(metrics)  # keeps the memory format that was chosen, and what was taken over
            elif self._is_to_be_kept and trainer.position.step not in self._shared.steps():
                self._checkpoint(metrics)  # an earlier process, not told to keep it, wrote the checkpoint
            for record in trainer.records():
                self._take(record, metrics)
        except DivergedError as error:
            raise DivergedError(f"{error}; last good checkpoint: {self._store.latest()}") from None
        finally:
            metrics.close()
            watch.on_end()
        network, shared_seconds = trainer.method.finish(), self._directory.shared_seconds()
        result = summarise(
            trainer, network, self._directory.metrics, self._seconds(), shared_seconds, self._peak_memory()
        )
        self._directory.write_result(result)
        return result

    def _take(self, record: Record, metrics: MetricsLog) -> None:
        """Write a record and, where one is due, a checkpoint; only then tell those who watch."""
        metrics.write(record)
        every = self._config.train.checkpoint_every
        if record["kind"] == "epoch":
            self._checkpoint(metrics)
            self._watch.on_epoch(record)
        else:
            if every and self._trainer.position.step % every == 0:
                self._checkpoint(metrics)
            self._watch.on_step(record)

    def _checkpoint(self, metrics: MetricsLog) -> None:
        self._trainer.check_finite()
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "config_id": self._config.config_id(),
            "seed": self._trainer.session.seed,
            "metrics_bytes": metrics.sync(),
            "seconds": self._seconds(),
            "peak_memory": self._peak_memory(),
            "trainer": self._trainer.state_dict(),
        }
        if self._is_to_be_kept:  # first: once the checkpoint is there, no restart comes by here again
            self._shared.save(self._trainer.position.step, state)
        self._store.save(self._trainer.position.step, state)

    @property
    def _is_to_be_kept(self) -> bool:
        """Whether the run stands at the end of an epoch that others may begin from."""
        position = self._trainer.position
        return position.batch == 0 and position.epoch in self._keep_epochs

    def _seconds(self) -> float:
        """Return the wall-clock time of all segments of the run so far."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def _peak_memory(self) -> int:
        """Return the most bytes that a process used that worked on the run so far."""
        return max(self._earlier_memory, memory.peak(self._trainer.session.device))


def _load(store: CheckpointStore, watch: Callback) -> dict[str, Any] | None:
    """Return the newest state that is whole, if it is one that this version can read."""
    state = store.load(watch.on_note)
    return None if state is None else readable(state, store.folder)


def _start(find: Callable[[], DenseStart], or_from_start: bool, watch: Callback) -> DenseStart | None:
    """Return the start that another run offers; None where it offers none and that was foreseen."""
    try:
        return find()
    except ClickTrainError as error:
        if not or_from_start:
            raise
        watch.on_note(f"{error}; trains from the start")
        return None


def _checked_epochs(keep: Collection[int], epochs: int) -> frozenset[int]:
    for epoch in keep:
        if not 1 <= epoch <= epochs:
            raise InvalidArgument(
                f"keep_epochs={sorted(keep)}: expected numbers from 1 to {epochs}, the epochs of the run"
            )
    return frozenset(keep)


def _channels_last(session: Session) -> bool:
    """Decide the memory format as the configuration says, by measurement where it leaves that open."""
    train = session.config.train
    if train.channels_last != "auto":
        return train.channels_last == "on"
    images = train.batch_size if session.device.type == "cuda" else min(train.batch_size, _PROBE_IMAGES)
    return faster_in_channels_last(session.model, session.example_input(images))
