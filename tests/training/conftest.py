"""Every test of the trainer may use the toy data set and network by the name "toy"."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import toy


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("clicktrain.data.load", toy.load_data)
    monkeypatch.setattr("clicktrain.models.create", toy.create_model)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
