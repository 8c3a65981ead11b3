"""Random convolutions on the GPU against the float64 reference, every function in every type."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clicktrain.kernels import Plan, plan, reference
from clicktrain.kernels.cuda import backend
from clicktrain.kernels.cuda.launch import compile_ahead
from clicktrain.patterns import PRUNED, PatternPool, all_patterns, full_pool, official_pool
from clicktrain.timing import WrongResult, relative_error

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Norm-wise relative errors that the library promises."""
SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 14, 16, 28, 32)
GEOMETRIES = (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (0, 2)), ((2, 1), (3, 0)), ((3, 3), (1, 1)))


@dataclass(frozen=True)
class Checked:
    """What the loop found.

    Attributes
    ----------
    cases : int
        Runs of a function that were compared.
    seconds : float
        Time taken.
    worst : dict
        "function dtype" -> largest relative error.
    """

    cases: int
    seconds: float
    worst: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        worst = max(self.worst, key=lambda name: self.worst[name])
        return f"{self.cases} random cases right in {self.seconds:.0f} s; worst: {worst}, {self.worst[worst]:.1e}"


def pools() -> list[PatternPool]:
    """Return a few pools of each kernel size: few, because each is compiled for each geometry."""
    return [official_pool(4), official_pool(12), all_patterns(1), all_patterns(9), full_pool(1), full_pool(5)]


def draw(random: np.random.Generator) -> Plan:
    """Draw a convolution."""
    choices = pools()
    pool = choices[random.choice(len(choices), p=(0.4, 0.15, 0.1, 0.1, 0.15, 0.1))]
    stride, padding = GEOMETRIES[random.choice(len(GEOMETRIES), p=(0.4, 0.3, 0.1, 0.1, 0.1))]
    size = [max(int(random.choice(SIZES)), pool.kernel_size - 2 * p) for p in padding]
    filters, channels = (int(random.choice((1, 3, 16, 33, 64, 96))) for _ in range(2))
    shared = 16 if filters % 16 == 0 and random.random() < 0.5 else 1  # where tensor cores serve
    index = random.integers(0, len(pool), (filters // shared, channels)).astype(np.uint8)
    index[random.random(index.shape) >= random.choice((0.0, 0.1, 0.3, 0.6, 1.0))] = PRUNED
    index = index.repeat(shared, 0)
    images = int(random.choice((1, 2, 7, 32, 65)) if shared == 1 else random.choice((7, 32, 40, 65)))
    return plan(torch.from_numpy(index), pool, (images, channels, *size), stride, padding)


def runs(made: Plan, dtype: torch.dtype, seed: int, device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield for each function its name, what it gives and what it should give."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (made.input_shape, made.values_shape, made.output_shape)
    x, values, dy = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    if seed % 2:  # the format of every second convolution, where tensor cores serve: else it is copied to NCHW
        x, dy = backend.as_batch_last(x), backend.as_batch_last(dy)
    exact = (x.double(), values.double(), dy.double())
    yield "forward", backend.forward(x, values, made), reference.forward(exact[0], exact[1], made)
    yield "grad_input", backend.grad_input(dy, values, made), reference.grad_input(exact[2], exact[1], made)
    yield "grad_values", backend.grad_values(x, dy, made), reference.grad_values(exact[0], exact[2], made)


def check(convolutions: int, seconds: float, seed: int = 0, device: str = "cuda") -> Checked:
    """Compare until so many convolutions or seconds are done.

    Raises
    ------
    WrongResult
        With the first error above the tolerance.
    """
    random = np.random.default_rng(seed)
    types = [list(TOLERANCES)[number % len(TOLERANCES)] for number in range(convolutions)]
    drawn = [draw(random) for _ in types]
    if device == "cuda":
        compile_ahead(
            text for number, (made, dtype) in enumerate(zip(drawn, types, strict=True))
            for text in backend.units(made, dtype, 1, batch_last=number % 2 == 1)
        )  # fmt: skip
    start = time.perf_counter()
    cases, worst = 0, {f"{f} {d}": 0.0 for f in ("forward", "grad_input", "grad_values") for d in TOLERANCES}
    for number, (made, dtype) in enumerate(zip(drawn, types, strict=True)):
        for name, got, want in runs(made, dtype, number, device):
            error = relative_error(got, want)
            if not error <= TOLERANCES[dtype]:
                raise WrongResult(f"{name} in {dtype} is wrong, relative error {error:.3g}, of\n{made}")
            worst[f"{name} {dtype}"] = max(worst[f"{name} {dtype}"], error)
            cases += 1
        if time.perf_counter() - start > seconds:
            break
    return Checked(cases, time.perf_counter() - start, worst)
