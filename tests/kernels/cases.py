"""Random pattern convolutions for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.kernels import Plan, plan, reference
from clicktrain.patterns import PRUNED, Pattern, PatternPool, all_patterns, full_pool, official_pool


@dataclass(frozen=True)
class Case:
    """A convolution; what is drawn at random derives from the seed."""

    pool: PatternPool
    filters: int
    channels: int
    images: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    density: float
    seed: int

    @property
    def is_large(self) -> bool:
        """Whether it crosses a channel block, a tile and a block of eight images."""
        return min(self.filters, self.channels) > 64 and self.images > 8 and min(self.size) > 2

    def plan(self) -> Plan:
        """Draw the assignment and plan it."""
        random = np.random.default_rng(self.seed)
        index = random.integers(0, len(self.pool), (self.filters, self.channels)).astype(np.uint8)
        index[random.random(index.shape) >= self.density] = PRUNED
        shape = (self.images, self.channels, *self.size)
        return plan(torch.from_numpy(index), self.pool, shape, self.stride, self.padding)

    def operands(self) -> tuple[Plan, Tensor, Tensor, Tensor]:
        """Return the plan and random x, values, dy."""
        made = self.plan()
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (made.input_shape, made.values_shape, made.output_shape)
        x, values, dy = (torch.randn(shape, generator=generator) for shape in shapes)
        return made, x, values, dy


@st.composite
def pools(draw: st.DrawFn) -> PatternPool:
    """Pools of 1x1, 3x3 with 1 to 9 entries, 5x5."""
    kernel_size = draw(st.sampled_from((3, 3, 3, 3, 1, 5)))
    if kernel_size == 1:
        return full_pool(1)
    if draw(st.booleans()):
        return official_pool(draw(st.sampled_from((4, 8, 12)))) if kernel_size == 3 else full_pool(5)
    entries = draw(st.integers(1, 9 if kernel_size == 3 else 12))
    if kernel_size == 3:
        everything = all_patterns(entries)
        chosen = draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=20, unique=True))
        return PatternPool(tuple(everything[i] for i in chosen))
    positions = st.lists(st.integers(0, 24), min_size=entries, max_size=entries, unique=True)
    kept = draw(st.lists(positions.map(lambda p: tuple(sorted(p))), min_size=1, max_size=5, unique=True))
    return PatternPool(tuple(Pattern(5, k) for k in kept))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Convolutions of all kinds; about four in ten are large."""
    pool = draw(pools())
    k = pool.kernel_size
    if draw(st.integers(0, 9)) < 4:
        channels, images, sizes = st.integers(65, 90), st.integers(9, 17), st.integers(max(3, k), 7)
    else:
        channels, images, sizes = st.integers(1, 40), st.integers(1, 17), st.integers(1, 14)
    stride = draw(st.sampled_from(((1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (3, 3))))
    padding = (draw(st.integers(0, k)), draw(st.integers(0, k)))
    size = tuple(max(draw(sizes), k - 2 * p) for p in padding)
    density = draw(st.sampled_from((0.0, 0.02, 0.1, 0.3, 0.6, 1.0)))
    return Case(
        pool, draw(channels), draw(channels), draw(images), (size[0], size[1]), stride, padding, density,
        draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def expected(made: Plan, x: Tensor, values: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return what the three functions should give, in float64."""
    x, values, dy = x.double(), values.double(), dy.double()
    return {
        "forward": reference.forward(x, values, made),
        "grad_input": reference.grad_input(dy, values, made),
        "grad_values": reference.grad_values(x, dy, made),
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted; 0 for equal (also empty) tensors."""
    assert got.shape == want.shape
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    difference = float((got - want).norm())
    return difference / max(float(want.norm()), 1e-30) if difference else 0.0
