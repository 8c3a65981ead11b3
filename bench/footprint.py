"""What an engine costs beside time: `python -m bench.footprint ENGINE FILE BATCH SIZE`.

Loads a model in this process, which does nothing else, and runs it on two batches of SIZE x SIZE pixels. Prints a
line of JSON: milliseconds to load, and the most memory in use, in megabytes beyond what the process had after it
imported the engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import engines
from clicktrain import memory

ROOT = Path(__file__).resolve().parent.parent
CLEAR = Path("/proc/self/clear_refs")
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Footprint:
    """What it costs to have a model ready.

    Attributes
    ----------
    load_ms : float
        Time from the file to a model that can run.
    peak_mb : float
        Memory while loading and running, at its most.
    """

    load_ms: float
    peak_mb: float


def measure(engine: str, path: Path, batch: int, size: int) -> Footprint:
    """Measure in this process; only the first call in a process means something."""
    if engine in engines.IMPORTS:
        engines.IMPORTS[engine]()
    x = torch.randn(batch, 3, size, size)
    CLEAR.write_text("5")  # the peak starts from here
    before = memory.counted("VmRSS")
    start = time.perf_counter()
    run = engines.ENGINES[engine](path, x)
    load_ms = (time.perf_counter() - start) * 1e3
    run(x)
    run(x)
    return Footprint(load_ms, (memory.counted("VmHWM") - before) / 2**20)


def in_new_process(engine: str, path: Path, batch: int, size: int) -> Footprint:
    """Measure in a process of its own; raises OSError with the process's last words if it fails."""
    command = [sys.executable, "-m", "bench.footprint", engine, str(path), str(batch), str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    measured = measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(asdict(measured)))
