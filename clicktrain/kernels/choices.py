"""Which of several ways to compute a backend has chosen: to be kept, put back, or measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.backends import BACKENDS, select
from clicktrain.kernels.plan import Plan

Choices = dict[str, dict[str, Any]]


def choices() -> Choices:
    """Return all choices that this process has made so far, as plain data, by backend.

    They belong into a checkpoint: some decide in which order sums are added up, hence the last bits of results.
    """
    loaded = {name: sys.modules.get(backend.module) for name, backend in BACKENDS.items()}
    found: Choices = {name: getattr(module, "choices", dict)() for name, module in loaded.items()}
    return {name: made for name, made in found.items() if made}


def use_choices(made: Mapping[str, Mapping[str, Any]]) -> None:
    """Compute from now on as `choices` says, whatever this version or this machine would choose by itself.

    Choices hold for the whole process; what they say nothing about is chosen as before.

    Raises
    ------
    InvalidArgument
        If `made` is not what `choices` gives.
    """
    for name, entries in made.items():
        if name not in BACKENDS or not hasattr(import_module(BACKENDS[name].module), "use_choices"):
            raise InvalidArgument(f"choices of {name!r}: no backend of that name makes any")
        import_module(BACKENDS[name].module).use_choices(entries)


def tune(plans: Iterable[Plan], backend: str = "auto", device: str = "cpu") -> None:
    """Measure in which way each plan is computed fastest, and do it that way from now on.

    Trainers do not call it by themselves, because the estimate is about as good: on two shared cores, sparse steps of
    VGG-13 at batch 64 changed by -3.7 and +0.8 % (width 1) and by +0.4 and +18 % (width 0.25; the last while other
    work disturbed it), for 10 to 22 s of compiling and measuring the first time. Other layers and machines may gain.
    The result is kept on disk, so that the next process does not measure. Two measurements may choose differently: runs
    that were tuned are equal in all but the last bits. Backends that have no choice do nothing.

    Parameters
    ----------
    plans : iterable of Plan
        From `clicktrain.kernels.plan`; `clicktrain.preparation.plans` makes those of a model.
    backend, device : str
        As in `pattern_conv2d`, and where it is going to compute.
    """
    kernels = select(backend, torch.empty(0, device=device))
    if hasattr(kernels, "tune"):
        kernels.tune(plans)
