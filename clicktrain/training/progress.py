"""Progress on the console: a bar with the time left on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from clicktrain.training.callbacks import Callback

if TYPE_CHECKING:
    from rich.console import Console


def console_progress(stream: TextIO | None = None) -> Callback:
    """Return the progress display that suits a stream (standard output by default)."""
    stream = stream or sys.stdout
    return ProgressBar() if stream.isatty() else ProgressLines(stream)


class ProgressLines(Callback):
    """One line an epoch, and one a minute within long epochs.

    Parameters
    ----------
    stream : TextIO
        Where the lines go.
    interval : float
        Seconds without a line after which a step is worth one.
    """

    def __init__(self, stream: TextIO, interval: float = 60.0) -> None:
        self._stream = stream
        self._interval = interval
        self._last = time.monotonic()
        self._clock = _Clock()

    def on_note(self, text: str) -> None:
        """Print the message."""
        self._print(text)

    def on_start(self, step: int, total_steps: int) -> None:
        """Start the clock."""
        self._clock.start(step, total_steps)

    def on_step(self, record: dict[str, Any]) -> None:
        """Print a line if there was none for long."""
        self._clock.step()
        if time.monotonic() - self._last > self._interval:
            self._print(f"step {self._clock.done}/{self._clock.total}  loss {record['loss']:.4f}  {self._left()}")

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Print the line of the epoch."""
        self._print(f"{epoch_line(record)}  {self._left()}")

    def _left(self) -> str:
        return f"left {_minutes(self._clock.seconds_left())}"

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=self._stream, flush=True)


class ProgressBar(Callback):
    """A bar over all steps of the run, with the line of each epoch above it.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where it is drawn; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, speed_estimate_period=120)
        self._task = self._progress.add_task("starting", start=False)

    def on_note(self, text: str) -> None:
        """Print the message above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def on_start(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._progress.update(self._task, total=total_steps, completed=step)
        self._progress.start_task(self._task)
        self._progress.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Move the bar."""
        description = f"{record['stage']}  loss {record['loss']:.4f}"
        self._progress.update(self._task, advance=1, description=description)

    def on_epoch(self, record: dict[str, Any]) -> None:
        """Print the line of the epoch."""
        self.on_note(epoch_line(record))

    def on_end(self) -> None:
        """Take the bar away."""
        self._progress.stop()


class _Clock:
    """Counts steps and says how long the rest will take at the pace since `start`."""

    def start(self, step: int, total_steps: int) -> None:
        self.first = self.done = step
        self.total = total_steps
        self._started = time.monotonic()

    def step(self) -> None:
        self.done += 1

    def seconds_left(self) -> float:
        pace = (time.monotonic() - self._started) / max(1, self.done - self.first)
        return pace * (self.total - self.done)


def epoch_line(record: dict[str, Any]) -> str:
    """Return the figures of an epoch record as one line."""
    parts = [f"epoch {record['epoch'] + 1:3d}  {record['stage']:<12}loss {record['train_loss']:.4f}"]
    accuracies = {split: record[f"{split}_accuracy"] for split in ("val", "test")}
    parts += [f"{split} {percent:.2f} %" for split, percent in accuracies.items() if percent is not None]
    parts.append(f"lr {record['lr']:.4g}  {record['train_seconds']:.1f} s")
    return "  ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
