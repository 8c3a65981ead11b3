"""pytest-benchmark: what the machine can do at most belongs to every stored result."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clicktrain import timing


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """Add the measured ceilings and the threads."""
    machine_info["ceilings"] = asdict(timing.ceilings())
    machine_info["threads"] = asdict(timing.Threads.now())
