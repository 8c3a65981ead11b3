"""Libraries of specialised sweeps."""

from __future__ import annotations

from itertools import product

from clicktrain.kernels.build import Library
from clicktrain.kernels.cpu import channel_sweeps, codegen, filter_sweeps
from clicktrain.kernels.cpu.codegen import SweepSpec, TileShape


def library(spec: SweepSpec, shapes: tuple[TileShape, ...]) -> Library:
    """Return the library with `clicktrain_sweep_<i>`, numbered by group of patterns and shape."""
    return Library("sweep", (("sweep.cpp", render(spec, shapes)),), codegen.FLAGS)


def render(spec: SweepSpec, shapes: tuple[TileShape, ...]) -> str:
    """Return the translation unit with the sweeps of all shapes."""
    lines = codegen.header(spec.instruction_set)
    write = channel_sweeps.write if codegen.goes_by_channel(spec.sweep) else filter_sweeps.write
    for number, (patterns, shape) in enumerate(product(spec.groups(), shapes)):
        lines += ["", *write(f"clicktrain_sweep_{number}", patterns, spec, shape)]
    return "\n".join(lines) + "\n"
