"""The backends that can compute a pattern convolution, and which of them serves a call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.kernels.plan import Plan

logger = logging.getLogger(__name__)


class Kernels(Protocol):
    """What a backend's module provides: three functions with one contract.

    A module may also have `available()`, where not every machine can use it; `preparations(plan, functions)`, a
    list of calls to be made, in any thread, before the first use of some of the three functions; and, where it can
    compute a plan in several ways that give different bits or speeds, `choices()`, `use_choices(choices)` and
    `tune(plan)`. See `clicktrain.kernels.prepare`, `choices`, `use_choices` and `tune`.
    """

    def forward(self, x: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Return y (N, C_out, H_out, W_out)."""
        ...

    def grad_input(self, dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
        """Return dx (N, C_in, H, W)."""
        ...

    def grad_values(self, x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
        """Return dvalues (kept_kernels, entries)."""
        ...


@dataclass(frozen=True)
class Backend:
    """One way to compute.

    Attributes
    ----------
    name : str
        As in `PatternConv2d(backend=name)`.
    module : str
        Module with the functions of `Kernels`, and `available()` unless it always is.
    device_types : tuple of str
        Devices that it computes on; empty = all.
    dtypes : tuple of torch.dtype
        Types that it computes in; empty = all floating types.
    """

    name: str
    module: str
    device_types: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def kernels(self) -> Kernels:
        """Import the backend's functions."""
        return cast(Kernels, import_module(self.module))

    def available(self) -> Literal[True] | str:
        """Return True, or why this machine cannot use the backend."""
        probe: Callable[[], Literal[True] | str] | None = getattr(import_module(self.module), "available", None)
        return True if probe is None else probe()

    def supports(self, x: Tensor) -> Literal[True] | str:
        """Return True, or why the backend cannot compute on a tensor like `x`."""
        if self.device_types and x.device.type not in self.device_types:
            return f"x is on {x.device}, the {self.name} backend computes on {' and '.join(self.device_types)}"
        if self.dtypes and x.dtype not in self.dtypes:
            return f"x is {x.dtype}, the {self.name} backend computes in {', '.join(map(str, self.dtypes))}"
        return True


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "clicktrain.kernels.cpu.backend", ("cpu",), (torch.float32,)),
        Backend("cuda", "clicktrain.kernels.cuda.backend", ("cuda",), (torch.float32, torch.float16, torch.bfloat16)),
        Backend("reference", "clicktrain.kernels.reference"),
    )
}
"""Every backend, fastest first."""


def available() -> dict[str, Literal[True] | str]:
    """Return for each backend True, or the reason why it cannot run on this machine."""
    return {name: availability(name) for name in BACKENDS}


@cache
def availability(name: str) -> Literal[True] | str:
    """Return True, or why a backend cannot run on this machine; found out once."""
    return BACKENDS[name].available()


def check_name(name: str) -> str:
    """Return `name` if it is "auto" or a backend; raise InvalidArgument otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise InvalidArgument(f"backend={name!r}: expected one of {', '.join(('auto', *BACKENDS))}")
    return name


def select(name: str, x: Tensor) -> Kernels:
    """Return the functions that serve a call on `x`.

    Parameters
    ----------
    name : str
        "auto" takes the first that can; a backend's name takes that one or raises.
    x : Tensor
        The input or the output gradient.

    Raises
    ------
    BackendUnavailable
        If the named backend cannot run on this machine.
    InvalidArgument
        If it cannot compute on `x`, or no backend has the name.
    """
    if name == "auto":
        return _first_supported(x.device.type, x.dtype).kernels()
    backend = BACKENDS[check_name(name)]
    if (reason := availability(name)) is not True:
        raise BackendUnavailable(f"backend={name!r}: {reason}")
    if (reason := backend.supports(x)) is not True:
        raise InvalidArgument(reason)
    return backend.kernels()


@cache
def _first_supported(device_type: str, dtype: torch.dtype) -> Backend:
    """Choose for a device and a type, once; say once why a faster backend had to be passed over."""
    probe = torch.empty(0, dtype=dtype, device="meta" if device_type == "meta" else device_type)
    for backend in BACKENDS.values():
        reason = availability(backend.name)
        if reason is True:
            reason = backend.supports(probe)
        if reason is True:
            return backend
        logger.info("backend %s is passed over: %s", backend.name, reason)
    raise BackendUnavailable(f"no backend computes in {dtype} on {device_type}")
