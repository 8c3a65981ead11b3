"""Ways to cut up convolutions for tensor cores, compiled once for the CPU and then tried on many shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from clicktrain.kernels import Plan, plan
from clicktrain.kernels.cuda import backend, tensor_tiling
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.tensor_geometry import Geometry
from clicktrain.kernels.cuda.tensor_text import TensorSpec
from clicktrain.patterns import PRUNED, PatternPool, all_patterns, full_pool, official_pool
from tests.kernels.cases import Case
from tests.kernels.cuda.host import SMALL

Pair = tuple[int, int]
CHOICES = ("forward_spec", "input_spec", "values_spec")
SQUARES = official_pool(4)


class SharedCase(Case):
    """A convolution whose filters share channels and patterns in blocks of 16."""

    def plan(self) -> Plan:
        """Draw the assignment and plan it."""
        random = np.random.default_rng(self.seed)
        index = random.integers(0, len(self.pool), (self.filters // 16, self.channels)).astype(np.uint8)
        index[random.random(index.shape) >= self.density] = PRUNED
        shared = torch.from_numpy(index).repeat_interleave(16, 0)
        return plan(shared, self.pool, (self.images, self.channels, *self.size), self.stride, self.padding)


@dataclass(frozen=True)
class Configuration:
    """Fixed code for any shape: what is compiled in is here, everything else is drawn.

    Attributes
    ----------
    width : int
        Pixels that are read at once, at most: widths of x and y are multiples of it.
    vector : int
        Pixels that are written at once; 0: as many as are read, up to 2.
    buffers : int
        Tiles in shared memory; of NCHW images up to 2.
    all_rows : bool
        Forward: as in `TensorSpec`.
    """

    pool: PatternPool
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    rect: Pair = (2, 2)
    groups: int = 1
    width: int = 1
    warps: int = 2
    parts: int = 1
    blocks: int = 2
    channels: int = 3
    columns: int = 1
    vector: int = 0
    buffers: int = 3
    all_rows: bool = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the backend cut everything up like this."""
        with pytest.MonkeyPatch.context() as patch:
            for choice in CHOICES:
                patch.setattr(tensor_tiling, choice, getattr(self, choice))
            backend.forget()
            yield
        backend.forget()

    def _geometry(self, stride: Pair, spread: Pair, padding: Pair, batch_last: bool) -> Geometry:
        """Return a geometry of images so large that no rectangle holds all of them."""
        size = (999, {1: 999, 2: 998, 4: 996}[self.width])
        return Geometry(size, size, stride, spread, padding, self.pool.kernel_size, batch_last)

    def _buffers(self, batch_last: bool) -> int:
        return self.buffers if batch_last else min(2, self.buffers)

    def _positions(self) -> int:
        return self.groups * self.rect[0] * self.rect[1]

    def forward_spec(self, made: Plan, dtype: Dtype, limits: object, batch_last: bool = False) -> TensorSpec:
        """Return the specification of the forward pass."""
        geometry = self._geometry(self.stride, (1, 1), self.padding, batch_last)
        tiles = -(-self._positions() // self.parts)
        return TensorSpec(
            "forward", dtype, self.pool.entries, self.warps, self.warps // self.parts, self.parts, tiles + tiles % 2,
            self.rect, self.stride, self.padding, geometry.tile(self.rect, self.groups, self.channels),
            vector=1 if batch_last else self.vector or min(2, self.width), batch_last=batch_last,
            buffers=self._buffers(batch_last), all_rows=self.all_rows,
        )  # fmt: skip

    def input_spec(self, made: Plan, dtype: Dtype, limits: object, batch_last: bool = False) -> TensorSpec:
        """Return the specification of the input gradient."""
        last = self.pool.kernel_size - 1
        padding = (last - self.padding[0], last - self.padding[1])
        geometry = self._geometry((1, 1), self.stride, padding, batch_last)
        return TensorSpec(
            "grad_input", dtype, self.pool.entries, self.warps, self.blocks, self.parts,
            -(-self._positions() // (2 * self.parts)), self.rect, (1, 1), padding,
            geometry.tile(self.rect, self.groups, 16 * self.blocks), channels=2 * self.channels, columns=self.columns,
            vector=1 if batch_last else self.vector or min(2, self.width), batch_last=batch_last,
            buffers=self._buffers(batch_last),
        )  # fmt: skip

    def values_spec(self, made: Plan, dtype: Dtype, limits: object, batch_last: bool = False) -> TensorSpec:
        """Return the specification of the gradient of the values."""
        geometry = self._geometry(self.stride, (1, 1), self.padding, batch_last)
        return TensorSpec(
            "grad_values", dtype, self.pool.entries, self.warps, self.blocks, self.parts, 2, self.rect, self.stride,
            self.padding, geometry.tile(self.rect, self.groups, self.channels),
            tensor_tiling._output_tile(geometry, self.rect, self.groups, self.blocks), batch_last=batch_last,
            buffers=self._buffers(batch_last),
        )  # fmt: skip

    def draw(self, random: np.random.Generator, batch_last: bool = False) -> SharedCase:
        """Draw a small convolution of any shape."""
        k, sizes = self.pool.kernel_size, []
        for stride, padding, rect in zip(self.stride, self.padding, self.rect, strict=True):
            out = int(random.integers(rect, max(7, rect + 1)))
            sizes.append(max(1, (out - 1) * stride + k - 2 * padding + int(random.integers(0, stride))))
        if self.width > 1:  # both directions copy and write words
            multiple = max(self.width, self.vector)
            least = -(-self.rect[1] // multiple)
            sizes[1] = multiple * int(random.integers(least, least + 2))
        filters, channels = 16 * int(random.integers(1, 4)), int(random.integers(1, 12))
        density = float(random.choice((0.0, 0.1, 0.3, 0.6, 1.0), p=(0.05, 0.2, 0.3, 0.25, 0.2)))
        images = 8 * int(random.integers(1, 5)) if batch_last else int(random.integers(8, 20))
        return SharedCase(
            self.pool, filters, channels, images, (sizes[0], sizes[1]), self.stride, self.padding, density,
            int(random.integers(0, 2**32)),
        )  # fmt: skip

    def small(self, **other: object) -> Configuration:
        """Return the configuration with other fields."""
        return replace(self, **other)  # type: ignore[arg-type]


CONFIGURATIONS = {
    "squares": Configuration(official_pool(4), rect=(2, 3)),
    "squares, words": Configuration(official_pool(4), rect=(2, 4), width=2, parts=2, columns=2, all_rows=True),
    "squares, two groups": Configuration(official_pool(4), rect=(1, 2), groups=2, width=2, warps=4, parts=2),
    "squares, four pixels at once": Configuration(official_pool(4), rect=(1, 10), width=4, channels=4, all_rows=True),
    "squares, eight pixels written at once": Configuration(
        official_pool(4), rect=(1, 16), width=4, warps=4, parts=2, vector=8
    ),
    "squares, sectors exchanged": Configuration(official_pool(4), rect=(2, 16), width=4, parts=2, vector=8),
    "squares, stride 2": Configuration(official_pool(4), stride=(2, 2), rect=(2, 2), warps=4, parts=2),
    "single taps, much padding": Configuration(all_patterns(1), padding=(3, 2), rect=(1, 3), channels=5),
    "nine taps, no padding": Configuration(all_patterns(9), padding=(0, 0), rect=(1, 2), channels=2, all_rows=True),
    "odd entries, mixed strides": Configuration(
        PatternPool(tuple(all_patterns(3))[::20]), stride=(1, 2), padding=(1, 0), rect=(3, 1)
    ),
    "pointwise": Configuration(full_pool(1), padding=(0, 0), rect=(2, 2), width=2, channels=7, columns=2),
    "pointwise, four pixels at once": Configuration(
        full_pool(1), padding=(0, 0), rect=(1, 4), width=4, channels=12, buffers=1, all_rows=True
    ),
    "pointwise, stride 2": Configuration(full_pool(1), padding=(0, 0), stride=(2, 2), rect=(1, 2), channels=6),
    "five by five": Configuration(full_pool(5), padding=(2, 2), rect=(1, 1), channels=2, buffers=1),
}
BATCH_LAST = {
    "squares": Configuration(official_pool(4), rect=(2, 3), buffers=4, all_rows=True),
    "squares, two groups": Configuration(
        official_pool(4), rect=(1, 2), groups=2, warps=4, parts=2, columns=2, channels=12, buffers=2, all_rows=True
    ),
    "squares, four groups": Configuration(
        official_pool(4), rect=(2, 1), groups=4, warps=4, parts=4, channels=4, buffers=2
    ),
    "squares, three groups": Configuration(official_pool(4), rect=(3, 1), groups=3, warps=2, blocks=1),
    "squares, eight groups": Configuration(
        official_pool(4), rect=(1, 1), groups=8, warps=4, parts=2, channels=12, buffers=1, all_rows=True
    ),
    "squares, stride 2": Configuration(official_pool(4), stride=(2, 2), rect=(2, 2), groups=2, warps=4, parts=2),
    "single taps, much padding": Configuration(
        all_patterns(1), padding=(3, 2), rect=(1, 3), channels=5, blocks=3, buffers=6, all_rows=True
    ),
    "nine taps, no padding": Configuration(all_patterns(9), padding=(0, 0), rect=(1, 2), groups=2, channels=2),
    "odd entries, mixed strides": Configuration(
        PatternPool(tuple(all_patterns(3))[::20]), stride=(1, 2), padding=(1, 0), rect=(3, 1), buffers=2, all_rows=True
    ),
    "pointwise": Configuration(full_pool(1), padding=(0, 0), rect=(2, 2), groups=2, channels=7, columns=2, buffers=4),
    "pointwise, stride 2": Configuration(
        full_pool(1), padding=(0, 0), stride=(2, 2), rect=(1, 2), channels=6, buffers=1
    ),
    "five by five": Configuration(full_pool(5), padding=(2, 2), rect=(1, 1), groups=2, channels=2),
}
"""The same for images that are batch last; `draw` knows it."""
USED = CONFIGURATIONS["squares, stride 2"].small(stride=(1, 1), blocks=4, channels=6)
CASE = SharedCase(SQUARES, 80, 17, 17, (3, 5), (1, 1), (1, 1), 0.6, seed=8)
"""Several chunks of channels, sets, blocks of filters, groups and shares, cut unevenly, and warps of unequal work."""
SHARED = replace(SMALL, multiprocessors=16)
"""Blocks of threads of the forward pass have several views each, some one less than others."""
