"""Compiled networks with the specialised sweeps, which the other tests of deployment do without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clicktrain import deploy
from clicktrain.deploy.program import Kind, NativeStep
from clicktrain.kernels.cpu import library, tuning
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.tiles import Choice
from tests.deploy.models import alive, dense, error, prune

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


class Small(nn.Module):
    """Tiles of many pixels, of two and of one; a residual and a ReLU behind some."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 20, 3, 1, 1), nn.BatchNorm2d(20), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(20, 70, 3, 2, 1), nn.BatchNorm2d(70), nn.ReLU(), nn.Conv2d(70, 24, 3, 1, 1))
        self.side = nn.Conv2d(20, 24, 1, 2)
        self.last = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(24, 9, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.end = nn.Sequential(nn.Conv2d(9, 80, 3, 1, 1), nn.ReLU(), nn.Conv2d(80, 10, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = torch.relu(self.main(x) + self.side(x))
        return self.end(self.last(x))


@pytest.mark.parametrize("batch", [1, 8, 13])
@torch.no_grad()
def test_specialised_sweeps_finish_what_they_sum(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    torch.manual_seed(2)
    model = Small()
    prune(model, 0.5)
    model = alive(model, torch.randn(4, 3, 16, 14))
    x = torch.randn(batch, 3, 16, 14)
    compiled = deploy.compile(model, x)
    assert error(compiled(x), dense(model)(x)) < 1e-5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        three = compiled(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(three, compiled(x)), "the number of threads changes bits"


class Pooled(nn.Module):
    """Two pruned convolutions with a pooling between them, whose operand may be read again."""

    def __init__(self, pool: nn.Module, relu: bool, again: bool) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 12, 3, 1, 1)
        self.first, self.second = nn.Conv2d(12, 20, 3, 1, 1), nn.Conv2d(20, 9, 3, 1, 1)
        self.pool, self.relu, self.again = pool, relu, again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.dense(x))
        y = torch.relu(y) if self.relu else y
        z = self.second(self.pool(y))
        return z + y.mean((2, 3), keepdim=True)[:, :9] if self.again else z


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 19])
@pytest.mark.parametrize(
    ("pool", "size", "again", "goes_with_it"),
    [
        (nn.MaxPool2d(2), (16, 8), False, True),
        (nn.MaxPool2d(2), (16, 8), True, False),
        (nn.MaxPool2d(2), (15, 8), False, False),  # the last row has no partner
        (nn.MaxPool2d(3, 2, 1), (16, 8), False, False),
        (nn.AvgPool2d(2), (16, 8), False, False),
    ],
)
@torch.no_grad()
def test_a_convolution_pools_on_the_way(
    pool: nn.Module,
    size: tuple[int, int],
    again: bool,
    goes_with_it: bool,
    batch: int,
    relu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    torch.manual_seed(batch)
    model = Pooled(pool, relu, again)
    prune(model, 0.5)
    x = torch.randn(batch, 3, *size)
    compiled = deploy.compile(model, x)
    kinds = [step.kind for step in compiled.engine.program.steps if isinstance(step, NativeStep)]
    if library.instruction_set() != "portable":  # there, sweeps write the output themselves
        assert (Kind.POOL in kinds) != goes_with_it
    assert error(compiled(x), dense(model)(x)) < 1e-5
    x[0, 1, 5, 4] = torch.nan
    unknown, most = compiled(x).isnan(), dense(model)(x).isnan()
    assert unknown.any(), "NaN is larger than anything, as in torch"
    assert not (unknown & ~most).any(), "where torch multiplies it with zeros, there may be less of it"


@torch.no_grad()
def test_what_is_measured_pools_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    if library.instruction_set() == "portable":
        pytest.skip("sweeps of the portable build write the output themselves")
    fastest = tuning._fastest
    asked: list[bool] = []

    def filters_win(layer: Layer, blocks: int, pooled: bool, packed: bool, transforms: bool) -> Choice:
        """Let a sweep that cannot pool on the way be the fastest."""
        asked.append(pooled)
        assert packed, "compiled networks read no canonical values"
        found = sorted(tuning.candidates(layer, blocks, pooled), key=lambda choice: choice.sweep != "filters")
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "candidates", lambda *_: found)
            patch.setattr("time.perf_counter", lambda: 0.0)  # the first one wins
            return fastest(layer, blocks, pooled, packed, transforms)

    monkeypatch.setattr(tuning, "_fastest", filters_win)
    monkeypatch.setattr(tuning, "_read", lambda _: None)
    monkeypatch.setattr(tuning, "_write", lambda *_: None)
    model, x = Pooled(nn.MaxPool2d(2), relu=True, again=False), torch.randn(8, 3, 16, 8)
    prune(model, 0.5)
    compiled = deploy.compile(model, x, tune=True)
    assert asked[:3] == [False, True, False]
    assert Kind.POOL not in [step.kind for step in compiled.engine.program.steps if isinstance(step, NativeStep)]
    assert error(compiled(x), dense(model)(x)) < 1e-5
