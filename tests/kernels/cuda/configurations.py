"""Ways to cut up convolutions that are compiled once for the CPU and then tried on many shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import backend, gradient_tiling, tiling, window_tiling
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype, GradientSpec
from clicktrain.patterns import PatternPool, all_patterns, full_pool, official_pool
from tests.kernels.cases import Case, expected, relative_error

Pair = tuple[int, int]
TOLERANCES: dict[Dtype, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Norm-wise, as DESIGN promises them."""


@dataclass(frozen=True)
class Configuration:
    """Fixed code for any shape: what is compiled in is here, everything else is drawn.

    Attributes
    ----------
    tile, patch : (int, int)
        Output pixels of a lane in the convolutions, and in the gradient of the values, which divide outputs.
    lanes : (int, int, int)
        Patches of a block along images, rows and columns in the convolutions.
    columns : int
        Widths of outputs are multiples of this, and that many columns are written at once.
    """

    pool: PatternPool
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    tile: Pair = (2, 2)
    patch: Pair = (1, 2)
    slots: int = 2
    images: int = 1
    warps: int = 2
    channels: int = 3
    columns: int = 1
    lanes: tuple[int, int, int] = (4, 2, 3)

    def convolution(self, layer: Layer, dtype: Dtype) -> ConvolutionSpec:
        """Return the specification for either direction."""
        tile = tuple(-(-t // s) * s for t, s in zip(self.tile, layer.spread, strict=True))
        made = tiling.cut(layer, dtype, tile, self.slots, self.images, self.lanes, self.warps, trim=False)
        pairs = ((0, 1),) if self.slots == 2 else ()
        sets = (*((slot,) for slot in range(self.slots)), *pairs)
        return replace(made, warps=self.warps, channels=self.channels, sets=sets, vector=self.columns)

    def gradient(self, layer: Layer, dtype: Dtype) -> GradientSpec:
        """Return the specification for the gradient of the values."""
        made = gradient_tiling.cut(
            layer, dtype, self.patch, self.images, (3, 1, 1), 2, 3, self.warps, tiling.Limits(64 << 10, 4)
        )
        return replace(made, filters=3, channels=self.channels, planes=(0, 0), grid=(0, 0))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the backend cut everything up like this."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                tiling, "convolution_spec", lambda layer, images, dtype, limits: self.convolution(layer, dtype)
            )
            patch.setattr(window_tiling, "spec", lambda *context: None)
            patch.setattr(gradient_tiling, "spec", lambda layer, images, dtype, limits: self.gradient(layer, dtype))
            backend.forget()
            yield
        backend.forget()

    def draw(self, random: np.random.Generator) -> Case:
        """Draw a small convolution of any shape."""
        k, sizes = self.pool.kernel_size, []
        for stride, padding, patch in zip(self.stride, self.padding, self.patch, strict=True):
            out = patch * int(random.integers(1, 8 // patch + 1))
            sizes.append(max(1, (out - 1) * stride + k - 2 * padding + int(random.integers(0, stride))))
        if self.columns > 1:  # both directions write whole vectors
            sizes[1] = self.columns * int(random.integers(1, 4))
        filters, channels = (int(random.integers(1, 12)) for _ in range(2))
        density = float(random.choice((0.0, 0.1, 0.3, 0.6, 1.0), p=(0.05, 0.2, 0.3, 0.25, 0.2)))
        return Case(
            self.pool, filters, channels, int(random.integers(1, 7)), (sizes[0], sizes[1]), self.stride, self.padding,
            density, int(random.integers(0, 2**32)),
        )  # fmt: skip


CONFIGURATIONS = {
    "squares": Configuration(official_pool(4), tile=(2, 3), patch=(2, 2)),
    "squares, whole vectors": Configuration(official_pool(4), tile=(1, 4), columns=4, warps=1),
    "squares, stride 2": Configuration(official_pool(4), stride=(2, 2), tile=(2, 2)),
    "twelve patterns, much padding": Configuration(official_pool(12), padding=(3, 2), slots=1, images=2),
    "single taps, mixed strides": Configuration(all_patterns(1), stride=(1, 2), padding=(0, 1), images=2, patch=(1, 1)),
    "all nine taps": Configuration(all_patterns(9), tile=(3, 1), padding=(0, 0), warps=3),
    "odd entries, stride 3": Configuration(
        PatternPool(tuple(all_patterns(7))[:5]), stride=(3, 3), padding=(1, 0), slots=1, warps=8, channels=2
    ),
    "pointwise": Configuration(full_pool(1), padding=(0, 0), tile=(2, 4), channels=5),
    "pointwise, stride 2": Configuration(full_pool(1), padding=(0, 0), stride=(2, 2), images=2),
    "five by five": Configuration(full_pool(5), padding=(2, 2), tile=(1, 3), patch=(1, 1), slots=1),
}
NARROW = ("squares", "squares, stride 2", "twelve patterns, much padding", "pointwise")
"""Configurations that are tried in float16 and bfloat16 too."""


def run(case: Case, dtype: Dtype = "float32", batch_last: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the three functions give for a case, in a format, and what they should give."""
    made, *operands = case.operands()
    x, values, dy = (operand.to(getattr(torch, dtype)) for operand in operands)
    if batch_last:
        x, dy = backend.as_batch_last(x), backend.as_batch_last(dy)
    got = {
        "forward": backend.forward(x, values, made),
        "grad_input": backend.grad_input(dy, values, made),
        "grad_values": backend.grad_values(x, dy, made),
    }
    return got, expected(made, x, values, dy)


def check(case: Case, dtype: Dtype = "float32", batch_last: bool = False) -> int:
    """Compare all three functions with the reference; return how many that were."""
    got, want = run(case, dtype, batch_last)
    for name, result in got.items():
        assert relative_error(result.double(), want[name]) < TOLERANCES[dtype], f"{name} in {dtype} of {case}"
    return len(got)
