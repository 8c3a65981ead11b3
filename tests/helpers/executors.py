"""An executor for tests."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from clicktrain import cli
from reproductions.executors import Local


class InThisProcess(Local):
    """Trains without a process of its own, which would take longer to start than to train."""

    def execute(
        self, command: Sequence[str], log: Path, settings: Mapping[str, str], say: Callable[[str], None]
    ) -> int:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
            cli.main(list(command[command.index("clicktrain") + 1 :]))
        log.write_text(output.getvalue())
        return int(ended.value.code or 0)
