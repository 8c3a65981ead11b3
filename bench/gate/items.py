"""What the gate measures, and which changes can make it slower."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bench.suite.cases import FUNCTIONS
from bench.suite.workloads import MEASURED

KERNEL_SOURCES = (
    "setup.py", "clicktrain/kernels/", "clicktrain/patterns.py", "clicktrain/errors.py", "clicktrain/files.py",
    "clicktrain/processor.py",
)  # fmt: skip
"""What compute kernels are made of; a prefix stands for all files below."""
_CPU = "clicktrain/kernels/cpu/"
_NEVER_USED = ("clicktrain/kernels/cuda/", "clicktrain/kernels/reference.py")
_NOT_FOR_KERNELS = (*_NEVER_USED, f"{_CPU}blocked_ops", f"{_CPU}ceilings.h")
_SWEEPS = tuple(_CPU + name for name in (
    "taps.h", "codegen.py", "sweeps.py", "filter_sweeps.py", "channel_sweeps.py", "reorder.py", "estimates.py",
    "tuning.py",
))  # fmt: skip
_PACKING, _GRADIENT, _CONVOLUTION = f"{_CPU}layout.h", f"{_CPU}gradient.h", f"{_CPU}convolution.h"
_NOT_FOR_NETWORKS = (
    *_NEVER_USED, "clicktrain/data/", "clicktrain/training/", "clicktrain/deploy/", "clicktrain/cli.py",
    "clicktrain/config.py", "clicktrain/provenance.py",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One of asv's `time_` benchmarks with its parameters.

    Attributes
    ----------
    kernel, layer : str
        For the reader.
    benchmark : str
        "module:Class.method" in `bench/suite`.
    parameters : tuple
        Of the benchmark.
    uses, unused : tuple of str
        Paths or prefixes of paths that its speed can depend on, and exceptions among them. A file that nobody thought
        of is therefore used.
    """

    kernel: str
    layer: str
    benchmark: str
    parameters: tuple[str | int, ...]
    uses: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.kernel} of {self.layer}"

    def is_affected(self, changed: Collection[str]) -> bool:
        """Tell whether a change of these files can change the item's speed."""
        return any(path.startswith(self.uses) and not path.startswith(self.unused) for path in changed)


def _kernel(function: str, workload: str) -> Item:
    unused = _NOT_FOR_KERNELS + ((*_SWEEPS,) if function == "grad_values" else (_GRADIENT,))
    if MEASURED[workload].batch >= 8:  # on blocked activations; smaller batches are packed and unpacked
        unused += (_PACKING,)
    return Item(function, workload, "kernels:Time.time_kernel", (workload, function), KERNEL_SOURCES, unused)


def _packing(function: str) -> Item:
    unused = (*_NOT_FOR_KERNELS, *_SWEEPS, _GRADIENT, _CONVOLUTION)
    return Item(function, "64x32x32@32", f"kernels:Packing.time_{function}", (), KERNEL_SOURCES, unused)


def _network(kernel: str, layer: str, benchmark: str, *parameters: str | int) -> Item:
    return Item(kernel, layer, f"network:{benchmark}", parameters, ("setup.py", "clicktrain/"), _NOT_FOR_NETWORKS)


ITEMS = (
    *(_kernel(function, workload) for function in FUNCTIONS for workload in MEASURED),
    *(_packing(function) for function in ("pack", "unpack")),
    _network("inference", "vgg13@1 9x", "Inference.time_forward", "sparse", 1),
    _network("training step", "vgg13 x0.5@64 9x", "Training.time_step", "sparse"),
)
"""Everything that can be measured."""
