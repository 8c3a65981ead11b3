"""A script for torchrun: trains toy runs one after another in the processes that share it.

Takes a JSON file: a list of runs with the ``config`` (a dictionary), the run directory ``out``, the ``network``, and
optionally ``die_at``, the step before which all processes end at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clicktrain.data
import clicktrain.models
from clicktrain import distributed
from clicktrain.config import RunConfig
from clicktrain.errors import OutOfStep
from clicktrain.training import step, train
from tests.helpers import toy

CLONE = Path(__file__).parent.parent.parent
OUT_OF_TIME = 200


def network(kind: str, num_classes: int) -> nn.Module:
    """Return a toy network without dropout: with batch norm, with group norm, or batch norm on halves of a batch."""
    layers = [module for module in toy.ToyNet(num_classes) if not isinstance(module, nn.Dropout)]
    if kind == "group":
        layers = [nn.GroupNorm(2, m.num_features) if isinstance(m, nn.BatchNorm2d) else m for m in layers]
    return Halves(*layers) if kind == "halves" else nn.Sequential(*layers)


class Halves(nn.Sequential):
    """Runs both halves of a training batch on their own, as two processes do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        middle = len(x) // 2
        return torch.cat([super(Halves, self).forward(half) for half in (x[:middle], x[middle:])])


def use(kind: str) -> None:
    """Make the toy data and a network the only ones."""
    clicktrain.data.load = toy.load_data
    clicktrain.models.create = lambda name, num_classes, **_: network(kind, num_classes)


def launch(folder: Path, runs: list[dict[str, Any]], processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Train the runs in so many processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    return subprocess.run(
        [sys.executable, *command, str(folder / "runs.json")],
        env=os.environ | {"PYTHONPATH": str(CLONE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=OUT_OF_TIME,
    )  # fmt: skip


def _die_before(number: int) -> None:
    """End this process at once before its step of that number."""
    original, done = step.Stepper.step, 0

    def counted(*arguments: Any) -> tuple[float, float]:
        nonlocal done
        if done == number:
            torch.distributed.barrier()  # whoever is first would end the others while they store their checkpoint
            os._exit(9)
        done += 1
        return original(*arguments)

    step.Stepper.step = counted


def main(file: str) -> None:
    """Train what the file says."""
    _record_checks()
    with distributed.group():
        _disagree(Path(file).parent)
        for run in json.loads(Path(file).read_text()):
            use(run["network"])
            if "die_at" in run:
                _die_before(run["die_at"])
            out, config = Path(run["out"]), RunConfig.from_dict(run["config"])
            seen.clear()
            train(config, out, callbacks=[])
            (out / f"checked_{distributed.rank()}.json").write_text(json.dumps(seen))


seen: list[tuple[str, str]] = []
"""What processes compared during a run, and its hash."""


def _disagree(folder: Path) -> None:
    """Compare what differs, and write down what comes of it."""
    try:
        distributed.check_equal("a number", [bytes([distributed.rank()])])
    except OutOfStep as error:
        (folder / f"disagreed_{distributed.rank()}.txt").write_text(str(error))


def _record_checks() -> None:
    original = distributed.check_equal

    def recorded(what: str, parts: Iterable[bytes | memoryview]) -> None:
        content = b"".join(bytes(part) for part in parts)
        seen.append((what, hashlib.sha256(content).hexdigest()))
        original(what, [content])

    distributed.check_equal = recorded


if __name__ == "__main__":
    main(sys.argv[1])
