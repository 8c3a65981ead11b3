from __future__ import annotations

import io

import pytest

from clicktrain.training.callbacks import Callback, CallbackList
from clicktrain.training.progress import ProgressBar, ProgressLines, console_progress, epoch_line

STEP = {"kind": "step", "stage": "dense", "loss": 1.5}
EPOCH = {
    "epoch": 2,
    "stage": "regularized",
    "train_loss": 0.51234,
    "val_accuracy": 87.5,
    "test_accuracy": None,
    "lr": 0.05,
    "train_seconds": 12.34,
}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_stream_decides_on_the_display() -> None:
    assert isinstance(console_progress(io.StringIO()), ProgressLines)
    assert isinstance(console_progress(_Terminal()), ProgressBar)


def test_an_epoch_is_one_line_with_what_was_evaluated() -> None:
    line = epoch_line(EPOCH)
    assert line == "epoch   3  regularized loss 0.5123  val 87.50 %  lr 0.05  12.3 s"


def test_plain_lines_say_how_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("clicktrain.training.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    display = ProgressLines(stream)
    display.on_start(10, 7210)
    for now in (1.0, 2.0):  # noqa: B007  # read by the clock
        display.on_step(STEP)
    assert stream.getvalue() == ""
    display.on_epoch(EPOCH)
    assert stream.getvalue() == f"{epoch_line(EPOCH)}  left 1:59:58\n"


def test_long_epochs_say_something_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("clicktrain.training.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    display = ProgressLines(stream, interval=60)
    display.on_start(0, 4)
    for now in (50.0, 100.0, 120.0):  # noqa: B007  # read by the clock
        display.on_step(STEP)
    assert stream.getvalue() == "step 2/4  loss 1.5000  left 1:40\n"


def test_the_bar_shows_steps_and_prints_epochs_above() -> None:
    from rich.console import Console

    stream = _Terminal()
    display = ProgressBar(Console(file=stream, force_terminal=True, width=100))
    display.on_note("going on after step 3 of 5")
    display.on_start(3, 5)
    display.on_step(STEP)
    display.on_epoch(EPOCH)
    display.on_end()
    shown = stream.getvalue()
    assert "going on after step 3 of 5" in shown
    assert epoch_line(EPOCH) in shown
    assert "4/5" in shown


def test_a_list_passes_everything_on() -> None:
    heard: list[tuple[object, ...]] = []

    class Listener(Callback):
        def on_note(self, text: str) -> None:
            heard.append(("note", text))

        def on_start(self, step: int, total_steps: int) -> None:
            heard.append(("start", step, total_steps))

        def on_step(self, record: dict[str, object]) -> None:
            heard.append(("step", record["loss"]))

        def on_epoch(self, record: dict[str, object]) -> None:
            heard.append(("epoch", record["epoch"]))

        def on_end(self) -> None:
            heard.append(("end",))

    both = CallbackList([Listener(), Listener()])
    both.on_note("hello")
    both.on_start(0, 5)
    both.on_step(STEP)
    both.on_epoch(EPOCH)
    both.on_end()
    expected = [("note", "hello"), ("start", 0, 5), ("step", 1.5), ("epoch", 2), ("end",)]
    assert heard == [event for event in expected for _ in range(2)]
