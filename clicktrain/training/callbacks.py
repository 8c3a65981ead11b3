"""Watching a run without being part of it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clicktrain.errors import ConfigError


class Callback:
    """Told what happens in a run; overrides what it cares about. Nothing a callback does changes the run.

    Records are the lines of ``metrics.jsonl`` as dictionaries.
    """

    def on_note(self, text: str) -> None:
        """Take a message for the user: one line."""

    def on_start(self, step: int, total_steps: int) -> None:
        """Begin, or go on, after `step` of `total_steps` steps."""

    def on_step(self, record: dict[str, Any]) -> None:
        """Take the record of a step."""

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Take the record of an epoch, evaluated where that was due."""

    def on_end(self) -> None:
        """Stop watching: the run has ended, or an error ended it."""


class CallbackList(Callback):
    """Passes everything on to several callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def on_note(self, text: str) -> None:
        """Pass on."""
        for callback in self._callbacks:
            callback.on_note(text)

    def on_start(self, step: int, total_steps: int) -> None:
        """Pass on."""
        for callback in self._callbacks:
            callback.on_start(step, total_steps)

    def on_step(self, record: dict[str, Any]) -> None:
        """Pass on."""
        for callback in self._callbacks:
            callback.on_step(record)

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Pass on."""
        for callback in self._callbacks:
            callback.on_epoch(record)

    def on_end(self) -> None:
        """Pass on."""
        for callback in self._callbacks:
            callback.on_end()


class TensorBoard(Callback):
    """Writes the numbers of each record as TensorBoard scalars.

    Parameters
    ----------
    folder : Path
        Directory of the event files.

    Raises
    ------
    ConfigError
        The package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError("train.tensorboard = true needs the package tensorboard: it is not installed")
        self._folder = folder
        self._writer: Any = None
        self._step = 0

    def on_start(self, step: int, total_steps: int) -> None:
        """Open the event file; what an earlier process logged beyond `step` is declared void."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and few runs need it

        self._step = step
        self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def on_step(self, record: dict[str, Any]) -> None:
        """Log the loss and the learning rate."""
        self._step = record["step"]
        self._add("step", record, ("loss", "lr"))

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Log every number of the epoch."""
        self._add("epoch", record, tuple(record))

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, group: str, record: dict[str, Any], keys: tuple[str, ...]) -> None:
        for key in keys:
            if isinstance(record[key], int | float):
                self._writer.add_scalar(f"{group}/{key}", record[key], self._step)
