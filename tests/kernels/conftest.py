"""Tests of the kernels compile what they specialise."""

import pytest


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
