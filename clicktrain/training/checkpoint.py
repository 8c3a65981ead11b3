"""Checkpoints that are whole or not there: written atomically, named by their digest, checked before use."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clicktrain.errors import CheckpointError
from clicktrain.files import sha256_file, write_atomic

CHECKPOINT_SCHEMA = 1
"""Version of what a checkpoint holds."""

_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointStore:
    """The checkpoints of one run.

    A file is called ``step-<number>-<digest>.pt``, with the first 16 digits of its own SHA-256: name and
    content change in one rename, and a file damaged later no longer fits its name. Each is an ordinary
    ``torch.save`` file of tensors and plain Python values, readable with ``weights_only=True``.

    Parameters
    ----------
    folder : Path
        Directory that holds nothing else.
    keep : int or None
        Newest checkpoints that are kept; None: all.
    """

    def __init__(self, folder: Path, keep: int | None = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step` steps and remove what is older than the newest `keep`.

        Raises
        ------
        CheckpointError
            The file cannot be written; earlier checkpoints are untouched.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self.folder / f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        try:
            write_atomic(path, content)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {error}") from None
        self._remove_old(path)
        return path

    def latest(self) -> Path | None:
        """Return the newest checkpoint, whole or not, or None."""
        paths = self._newest_first()
        return paths[0] if paths else None

    def load(self, note: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the state of the newest checkpoint that is whole, on the CPU; None where there is none.

        Parameters
        ----------
        note : callable
            Told of every damaged checkpoint that is passed over.

        Raises
        ------
        CheckpointError
            There are checkpoints, but all of them are damaged.
        """
        paths = self._newest_first()
        for path in paths:
            state = _read(path)
            if state is not None:
                return state
            note(f"checkpoint {path.name} is damaged (its digest does not fit): using the one before it")
        if paths:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged: train again into another directory")
        return None

    def steps(self) -> set[int]:
        """Return the numbers of steps after which there are checkpoints, whole or not."""
        return {_step(path) for path in self._newest_first()}

    def load_step(self, step: int) -> dict[str, Any]:
        """Return the state after `step` steps, on the CPU.

        Raises
        ------
        CheckpointError
            There is no such checkpoint, or it is damaged.
        """
        for path in self._newest_first():
            if _step(path) == step:
                state = _read(path)
                if state is not None:
                    return state
                raise CheckpointError(f"checkpoint {path} is damaged (its digest does not fit)")
        raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}")

    def _newest_first(self) -> list[Path]:
        paths = [path for path in self.folder.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(paths, key=_step, reverse=True)

    def _remove_old(self, newest: Path) -> None:
        """Keep `newest` and those before it; one of the same or a later step was damaged or superseded."""
        older = [path for path in self._newest_first() if _step(path) < _step(newest)]
        for path in self._newest_first():
            if path != newest and path not in (older if self.keep is None else older[: self.keep - 1]):
                path.unlink()


def readable(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a state of `folder` if this version can read it.

    Raises
    ------
    CheckpointError
        It was written by another version.
    """
    if state["schema"] != CHECKPOINT_SCHEMA:
        raise CheckpointError(
            f"{folder} holds checkpoints of format {state['schema']}, expected {CHECKPOINT_SCHEMA}: "
            "go on with the version that wrote them"
        )
    return state


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a file holds, or None where that no longer fits its name."""
    if _digest(path) != sha256_file(path)[:16]:
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _step(path: Path) -> int:
    return int(_parts(path)[0])


def _digest(path: Path) -> str:
    return _parts(path)[1]


def _parts(path: Path) -> tuple[str, str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match[1], match[2]
