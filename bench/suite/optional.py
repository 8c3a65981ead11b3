"""Names that a commit may lack: a benchmark that needs one is skipped there, and says why."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

STRICT = "CLICKTRAIN_BENCH_STRICT"
"""Environment variable: with it, a missing name is an error. For the present commit, which must have them all."""


def need(name: str) -> Any:
    """Return a public module or name of `clicktrain` or `baselines`, for instance "clicktrain.timing:compare".

    Raises
    ------
    NotImplementedError
        If this commit does not have it; from a benchmark's `setup`, asv then skips the benchmark.
    """
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
        return getattr(found, attribute) if attribute else found
    except (ImportError, AttributeError) as error:
        if os.environ.get(STRICT):
            raise
        raise NotImplementedError(f"this commit has no {name}: {error}") from error


def need_backend(name: str) -> Any:
    """Return a backend's module.

    Raises
    ------
    NotImplementedError
        If the commit does not have it, or the machine cannot use it.
    """
    module = need(f"clicktrain.kernels.{name}.backend")
    if (reason := module.available()) is not True:
        raise NotImplementedError(f"the {name} backend is not available: {reason}")
    return module
