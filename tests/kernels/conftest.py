"""Tests of the kernels compile what they specialise."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    yield
