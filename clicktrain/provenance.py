"""Where a number comes from: code, versions, machine, load, data, and the command that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from clicktrain import distributed
from clicktrain.processor import processor

PACKAGES = ("clicktrain", "torch", "torchvision", "numpy", "fvcore", "pydantic", "cupy-cuda12x", "cupy-cuda13x")
"""Distributions whose versions are recorded; one that is absent is left out."""

COMMIT_FILE = "COMMIT"
"""File in the root of a copy without its history: the commit, and ``dirty`` after it where it was changed."""

_ROOT = Path(__file__).resolve().parent.parent
_T = TypeVar("_T")


def collect(
    *, seed: int | None = None, data_fingerprint: str | None = None, concurrent_runs: int | None = None
) -> dict[str, Any]:
    """Describe this process, its code and its machine.

    No probe can fail: what cannot be found out is None.

    Parameters
    ----------
    seed : int, optional
        Seed of the run.
    data_fingerprint : str, optional
        `fingerprint` of its data set.
    concurrent_runs : int, optional
        How many other runs share the machine on purpose; None: nobody said.

    Returns
    -------
    dict
        Plain values, ready for JSON.
    """
    return {
        "schema": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code": _guarded(commit),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": {
            **(_guarded(processor) or {"model": None, "signature": None}),
            "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)),
        },
        "gpu": _guarded(_gpu),
        "distributed": {"processes": distributed.processes()} if distributed.processes() > 1 else None,
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "concurrency": {"declared": concurrent_runs, "load": _guarded(lambda: list(os.getloadavg()))},
        "seed": seed,
        "data_fingerprint": data_fingerprint,
    }


def commit(root: Path = _ROOT) -> dict[str, Any] | None:
    """Return the commit of the source tree and whether it was changed since; None outside of any history.

    Parameters
    ----------
    root : Path
        Directory that holds ``.git``, or a `COMMIT_FILE` where the history was left behind.

    Returns
    -------
    dict or None
        ``{"commit": 40 hex digits, "dirty": bool}``.
    """
    if (root / ".git").exists():
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain"))}
    carried = root / COMMIT_FILE
    if carried.exists():
        name, *flags = carried.read_text().split()
        return {"commit": name, "dirty": "dirty" in flags}
    return None


def _guarded(probe: Callable[[], _T]) -> _T | None:
    """Return what `probe` finds, or None: a missing tool must never stop a run."""
    try:
        return probe()
    except Exception:
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def _version(distribution: str) -> str | None:
    return _guarded(lambda: importlib.metadata.version(distribution))


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "model": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": _guarded(_driver),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.split()[0]
