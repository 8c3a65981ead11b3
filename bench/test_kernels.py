"""pytest-benchmark: the compute kernels, in groups by function (`pytest bench --benchmark-compare`)."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.suite.cases import FUNCTIONS, Case, figures
from bench.suite.workloads import LAYERS, MEASURED, Workload
from clicktrain.kernels.cpu import backend

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=f"{backend.available()}")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("workload", MEASURED)
def test_kernel(benchmark: BenchmarkFixture, workload: str, function: str) -> None:
    benchmark.group = function
    benchmark.extra_info |= asdict(figures(MEASURED[workload], function, rounds=3))
    benchmark(Case(MEASURED[workload]).checked(function).run)


@pytest.mark.benchmark(group="packing")
def test_pack(benchmark: BenchmarkFixture) -> None:
    x = Workload(LAYERS["vgg13.64x32"], 32, 8.1).operands()[0]
    xb = benchmark(backend.pack, x)
    assert backend.unpack(xb, 32).equal(x)


@pytest.mark.benchmark(group="packing")
def test_unpack(benchmark: BenchmarkFixture) -> None:
    x = Workload(LAYERS["vgg13.64x32"], 32, 8.1).operands()[0]
    assert benchmark(backend.unpack, backend.pack(x), 32).equal(x)
