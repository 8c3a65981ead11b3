"""The text of the CUDA kernels, run on the CPU, against float64 on thousands of random convolutions."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import codegen
from tests.kernels.cuda.configurations import CONFIGURATIONS, NARROW, TOLERANCES, check
from tests.kernels.cuda.host import compiled, host_unit, on_host

CASES = {"float32": 44, "float16": 30, "bfloat16": 30}
"""Convolutions for each configuration; each is three kernel runs."""
seen: Counter[str] = Counter()

GRID = [(name, dtype) for dtype in TOLERANCES for name in (CONFIGURATIONS if dtype == "float32" else NARROW)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(units):
    """Compile all units, two at a time."""
    texts = []
    for name, dtype in GRID:
        used = CONFIGURATIONS[name]
        made = used.draw(np.random.default_rng(0)).plan()
        layers = Layer.forward(made), Layer.transposed(made)
        texts += [codegen.unit(used.convolution(layer, dtype)) for layer in layers]
        texts.append(codegen.unit(used.gradient(layers[0], dtype)))
    compiled(host_unit(texts[0]), units)  # with the header that all share
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: compiled(host_unit(text), units), dict.fromkeys(texts)))


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_random_convolutions(name, dtype, launcher):
    used, random = CONFIGURATIONS[name], np.random.default_rng(len(name))
    with on_host(launcher), used.used():
        for _ in range(CASES[dtype]):
            seen[dtype] += check(used.draw(random), dtype)
    assert len(launcher.texts) <= 3


def test_there_were_two_thousand_runs():
    print(dict(seen))
    assert sum(seen.values()) >= 2000
    assert set(seen) == set(TOLERANCES)
