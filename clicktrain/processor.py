"""Which processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

_SIGNATURE = {"cpu family": "family", "model": "model", "stepping": "stepping"}
"""Lines of /proc/cpuinfo that tell processors of one name apart, and what they are called here."""


def processor() -> dict[str, str | None]:
    """Return the processor's name, and its signature: clouds call several generations by one name."""
    facts = _facts()
    numbers = [f"{name} {facts[key]}" for key, name in _SIGNATURE.items() if key in facts]
    return {"model": facts.get("model name") or platform.processor() or None, "signature": ", ".join(numbers) or None}


def _facts() -> dict[str, str]:
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:  # not Linux
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
