"""asv: the compute kernels, how long they take and what they reach."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from .cases import FUNCTIONS, Case, Figures, figures
from .optional import need, need_backend
from .units import unit
from .workloads import LAYERS, MEASURED, Workload


class Time:
    """A function of a layer, blocked as in networks (NCHW to NCHW at batch 1); checked before it is timed."""

    params = (list(MEASURED), list(FUNCTIONS))
    param_names = ("workload", "function")
    version = "1"

    def setup(self, workload: str, function: str) -> None:
        self._run = Case(MEASURED[workload]).checked(function).run

    def time_kernel(self, workload: str, function: str) -> None:
        self._run()


class Reached:
    """Speed of the same functions, relative to dense layers and to the machine."""

    params = Time.params
    param_names = Time.param_names
    version = "1"
    timeout = 300

    def setup_cache(self) -> dict[tuple[str, str], Figures | str]:
        measured: dict[tuple[str, str], Figures | str] = {}
        for name, workload in MEASURED.items():
            for function in FUNCTIONS:
                try:
                    measured[name, function] = figures(workload, function)
                except NotImplementedError as reason:
                    measured[name, function] = str(reason)
        return measured

    def setup(self, measured: dict[tuple[str, str], Figures | str], workload: str, function: str) -> None:
        found = measured[workload, function]
        if isinstance(found, str):
            raise NotImplementedError(found)
        self._found = found

    @unit("times the best dense layout")
    def track_speedup(self, measured: object, workload: str, function: str) -> float:
        return self._found.speedup

    @unit("GFLOP/s of kept weights")
    def track_effective_gflops(self, measured: object, workload: str, function: str) -> float:
        return self._found.gflops

    @unit("of the multiply-add peak")
    def track_share_of_peak(self, measured: object, workload: str, function: str) -> float:
        return self._found.share_of_peak


class Ceilings:
    """What the machine could do at most while all this was measured."""

    version = "1"

    def setup_cache(self) -> Any:
        try:
            return need("clicktrain.timing:ceilings")()
        except NotImplementedError:
            return None

    def setup(self, measured: Any) -> None:
        if measured is None:
            raise NotImplementedError("this commit measures no ceilings")

    @unit("GFLOP/s")
    def track_gflops(self, measured: Any) -> float:
        return float(measured.gflops)

    @unit("GB/s")
    def track_gigabytes_per_second(self, measured: Any) -> float:
        return float(measured.gigabytes_per_second)


class Packing:
    """Between NCHW and blocked memory, 32 images of 64 x 32 x 32."""

    version = "1"

    def setup(self) -> None:
        self._backend = need_backend("cpu")
        self._x = Workload(LAYERS["vgg13.64x32"], 32, 8.1).operands()[0]
        self._xb = self._backend.pack(self._x)
        if not torch.equal(self._backend.unpack(self._xb, 32), self._x):
            raise RuntimeError("what was packed is not what is unpacked: not timed")

    def time_pack(self) -> None:
        self._backend.pack(self._x)

    def time_unpack(self) -> None:
        self._backend.unpack(self._xb, 32)


class Plans:
    """From an assignment to something that runs, with all kernels compiled already."""

    params = (["vgg13.512x4", "resnet18.128-256x28/2"],)
    param_names = ("layer",)
    version = "1"
    number, repeat, warmup_time = 1, (5, 20, 5.0), 0
    _seeds = count(1)

    def setup(self, layer: str) -> None:
        if not hasattr(self, "_build"):
            self._workload, self._build = Workload(LAYERS[layer], 32, 8.1), layer_builder()
            self._build(self._workload, next(self._seeds))  # compiles
        self._seed = next(self._seeds)  # plans of equal content are built once

    def time_plan(self, layer: str) -> None:
        self._build(self._workload, self._seed)


class Compiling:
    """The specialised kernels of a layer, with an empty cache."""

    version = "1"

    @unit("s")
    def track_compile_seconds(self) -> float:
        build = layer_builder()
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CLICKTRAIN_CACHE_DIR"] = cache
            start = time.perf_counter()
            build(Workload(LAYERS["vgg13.128x16"], 32, 8.1), 0)
            return time.perf_counter() - start


class Importing:
    """The library, in a fresh interpreter."""

    version = "1"

    def timeraw_import(self) -> str:
        return "import clicktrain"


def layer_builder() -> Callable[[Workload, int], None]:
    """Return a function that plans a layer and lays out all three functions."""
    need_backend("cpu")
    plan, prepare = need("clicktrain.kernels:plan"), need("clicktrain.kernels:prepare")

    def build(workload: Workload, seed: int) -> None:
        shape = workload.shape
        prepare([plan(workload.assignment(seed), None, workload.input_shape, shape.stride, shape.padding)])

    return build
