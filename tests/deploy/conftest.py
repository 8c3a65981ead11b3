"""Tests of deployment."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet_tracing() -> Iterator[None]:
    """Spare torch.export the log that it writes where anything listens, as pytest does: it takes most of the time."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before
