"""The metrics file of a run: one JSON object a line, cut back to the last checkpoint when the run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clicktrain.errors import CheckpointError


class MetricsLog:
    """Appends records to a JSON lines file.

    Parameters
    ----------
    path : Path
        The file; created if absent.
    size : int
        Bytes that belong to the run so far (0 for a new run). What a killed process wrote after that is cut
        off: the steps it describes will be run, and written, again.

    Raises
    ------
    CheckpointError
        The file holds fewer bytes than that.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  # closed by close()
        if self._file.tell() < size:
            raise CheckpointError(f"{path} has lost lines: the checkpoint was written at {size} bytes")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers JSON does not know (NaN, infinities) become null."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}).encode() + b"\n")

    def sync(self) -> int:
        """Force everything written so far onto the disk and return the size of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
