"""What every test starts from: fixed seeds, and no cache but its own."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled and tuned kernels of this machine out of the tests, and theirs out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CLICKTRAIN_DISABLE_JIT", "1")  # the generic kernels do; tests/kernels compiles its own
        yield


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that draw from the old global generator
    torch.manual_seed(0)
