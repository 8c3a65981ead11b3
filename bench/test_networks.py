"""pytest-benchmark: whole networks, and tiny trainings from start to end."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.suite.networks import Setting, Step
from bench.suite.runs import METHODS, run
from clicktrain.kernels.cpu import backend

needs_backend = pytest.mark.skipif(backend.available() is not True, reason=f"{backend.available()}")
networks = pytest.mark.parametrize("network", [pytest.param("sparse", marks=needs_backend), "dense"])


@networks
@pytest.mark.parametrize("batch", [32, 1])
@pytest.mark.benchmark(group="inference")
def test_inference(benchmark: BenchmarkFixture, network: str, batch: int) -> None:
    setting = Setting(batch=batch)
    model = (setting.sparse("cpu") if network == "sparse" else setting.model()[0]).eval()
    with torch.inference_mode():
        y = benchmark(model, setting.images(0)[0])
    assert y.shape == (batch, 10)


@networks
@pytest.mark.benchmark(group="training step")
def test_step(benchmark: BenchmarkFixture, network: str) -> None:
    setting = Setting(0.5)
    step = Step(setting.sparse("cpu") if network == "sparse" else setting.model()[0])
    loss = benchmark(step, *setting.images(0))
    assert 0 <= loss < 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="training run")
def test_run(benchmark: BenchmarkFixture, method: str) -> None:
    result = benchmark.pedantic(run, (method,), rounds=1)
    benchmark.extra_info |= {
        "training_flops_saved_percent": result["training_flops"]["saved_percent"],
        "compression": result["compression"]["paper"],
        "accuracy_percent": result["accuracy"]["last"],
    }
    assert result["status"] == "done"
