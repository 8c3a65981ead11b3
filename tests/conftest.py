"""What every test starts from: fixed seeds, and no cache but its own; and which files `pytest -m gpu` reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

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


# A machine with a GPU may have torch, CuPy and pytest and nothing else: there, `pytest -m gpu` must not import files
# without such a test. Those of the trainer need pydantic, since its configuration does.
TRAINER = Path(__file__).with_name("training")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is left out."""
    left_out = _asks_for_gpu(config) and not _has_pydantic()
    return f"pydantic is not installed: {TRAINER.name} is left out" if left_out else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tell whether a file or folder is not to be read; None: as usual."""
    if not _asks_for_gpu(config):
        return None
    if collection_path.is_dir():
        return True if collection_path == TRAINER and not _has_pydantic() else None
    return True if "mark.gpu" not in collection_path.read_text() else None


def _asks_for_gpu(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "gpu")


def _has_pydantic() -> bool:
    try:
        return find_spec("pydantic") is not None
    except ValueError:  # someone put None in its place
        return False
