"""Passes by Winograd's transform: against float64, in every instruction set, as part of compiled networks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clicktrain import deploy
from clicktrain.deploy.program import Kind, NativeStep, build_program
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu import backend, estimates, library, passes, tuning, winograd
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.tiles import Choice
from clicktrain.patterns import PatternPool, all_patterns, full_pool, official_pool
from tests.deploy.models import dense, error, prune
from tests.kernels.cases import Case, expected, relative_error

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

CASES = 300
SQUARES = official_pool(4)
LARGE = Case(SQUARES, 150, 140, 19, (11, 14), (1, 1), (1, 1), 0.4, seed=1)
"""Two blocks of channels, two parts of filters, blocks and tiles that are cut off."""
seen: Counter[str] = Counter()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw layers of 3x3 kernels without a stride."""
    everything = all_patterns(draw(st.integers(1, 9)))
    pool = PatternPool(tuple(everything[i] for i in draw(st.sets(st.integers(0, len(everything) - 1), min_size=1))))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    size = tuple(max(draw(st.integers(1, 18)), 3 - 2 * p) for p in padding)
    channels = st.one_of(st.integers(1, 40), st.sampled_from((64, 127, 128, 129, 257)))
    density = draw(st.sampled_from((0.0, 0.05, 0.3, 0.6, 1.0)))
    return Case(
        pool, draw(channels), draw(channels), draw(st.integers(1, 20)), (size[0], size[1]), (1, 1), padding, density,
        draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run(case: Case, threads: int = 2) -> dict[str, Tensor]:
    """Return both directions, made of a poisoned result."""
    made, x, values, dy = case.operands()
    images = case.images
    found = {}
    for name, layer, source in (("forward", Layer.forward(made), x), ("grad_input", Layer.transposed(made), dy)):
        prepared = passes.prepare(layer, -(-images // 8), winograd.choice(layer))
        xb, y = backend.pack(source), torch.full((-(-images // 8), layer.filters, *layer.out_size, 8), torch.nan)
        library.function("convolve")(prepared.address, xb.data_ptr(), values.data_ptr(), y.data_ptr(), threads)
        found[name] = y.permute(0, 4, 1, 2, 3).reshape(-1, layer.filters, *layer.out_size)[:images]
    return found


def check(case: Case) -> None:
    want = expected(*case.operands())
    for name, got in run(case).items():
        assert relative_error(got.double(), want[name]) < 1e-5, (name, case)


@settings(deadline=None, database=None, derandomize=True, max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_layers(case: Case) -> None:
    check(case)
    seen["all"] += 1
    seen["several blocks of channels"] += case.channels > winograd.CHANNELS
    seen["several parts of filters"] += case.filters > winograd.PART
    seen["cut tiles"] += case.size[0] % 4 > 0 or case.size[1] % 4 > 0
    seen["small density"] += case.density < 0.1


def test_random_layers_were_of_all_kinds() -> None:
    assert seen["all"] >= CASES
    assert min(seen.values()) >= CASES // 12, seen


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_other_instruction_sets(name: str) -> None:
    program = "from tests.kernels.test_winograd import LARGE, check\ncheck(LARGE)\n"
    environment = {**os.environ, "CLICKTRAIN_ISA": name, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if f"CLICKTRAIN_ISA={name}: this machine does not have it" in done.stderr:
        pytest.skip(f"no {name} here")
    assert done.returncode == 0, done.stderr


def test_threads_do_not_change_bits() -> None:
    one, *others = (run(LARGE, threads) for threads in (1, 2, 3, 7))
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_sets_of_filters_hold_every_kernel_once() -> None:
    layer = Layer.forward(LARGE.plan())
    arrays = winograd.arrays(layer, 70)
    groups = -(-layer.filters // 4)
    assert arrays["runs"].shape == (2 * groups, 15)
    found, channel, record = set(), 0, 0
    for number, runs in enumerate(arrays["runs"]):
        assert tuple(arrays["starts"][number]) == (channel, record)
        block, group = divmod(number, groups)
        for kept, run_length in enumerate(runs, 1):
            for _ in range(run_length):
                for member in range(4):
                    if kept >> member & 1:
                        key = (4 * group + member, 70 * block + int(arrays["offsets"][channel]))
                        found.add((*key, int(arrays["gather"][record]) // 4, int(arrays["patterns"][record])))
                        record += 1
                channel += 1
    kernels = layer.kernels
    facts = (kernels.filters, kernels.channels, kernels.numbers, kernels.patterns)
    assert found == set(zip(*(fact.tolist() for fact in facts), strict=True))
    assert record == len(kernels.filters) == len(found)


WITHOUT = {
    "stride": Case(SQUARES, 8, 8, 8, (8, 8), (2, 2), (1, 1), 1.0, seed=1),
    "stride along one axis": Case(SQUARES, 8, 8, 8, (8, 8), (1, 2), (1, 1), 1.0, seed=1),
    "pointwise": Case(full_pool(1), 8, 8, 8, (8, 8), (1, 1), (0, 0), 1.0, seed=1),
    "five by five": Case(full_pool(5), 8, 8, 8, (8, 8), (1, 1), (2, 2), 1.0, seed=1),
}


@pytest.mark.parametrize("case", WITHOUT.values(), ids=WITHOUT)
def test_layers_without_a_transform(case: Case) -> None:
    for layer in (Layer.forward(case.plan()), Layer.transposed(case.plan())):
        assert all(choice.sweep != "winograd" for choice in estimates.candidates(layer, 1, transforms=True))
        with pytest.raises(InvalidArgument, match="expected a layer of 3x3 kernels without a stride"):
            passes.prepare(layer, 1, winograd.choice(layer))


def test_kernels_are_transformed_only_where_that_is_asked_for() -> None:
    layer = Layer.forward(LARGE.plan())
    assert winograd.choice(layer) in estimates.candidates(layer, 3, transforms=True)
    assert winograd.choice(layer) not in estimates.candidates(layer, 3)
    tuning.forget()
    tuning.import_choices({tuning.fingerprint(layer, 3, transforms=True): winograd.choice(layer).__dict__})
    assert tuning.choice_for(layer, 3, transforms=True) == winograd.choice(layer)
    assert tuning.choice_for(layer, 3).sweep != "winograd", "training computes as before"
    tuning.forget()


class Network(nn.Module):
    """A bias, a residual, and poolings that convolutions may do on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 12, 3, 1, 1)
        self.first, self.second, self.third = (nn.Conv2d(*sizes, 3, 1, 1) for sizes in ((12, 20), (20, 20), (20, 9)))
        self.relu = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.dense(x))
        x = nn.functional.max_pool2d(torch.relu(x) if self.relu else x, 2)
        x = torch.relu(self.second(x) + x)
        return self.third(x)


def transformed(layer: Layer, blocks: int, pooled: bool, *, transforms: bool, packed: bool) -> Choice:
    """Let the transform be the fastest wherever it is possible."""
    return winograd.choice(layer) if transforms else tuning.choice_for(layer, blocks, pooled)


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_strips_of_images_are_not_transformed(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.deploy.program.tune_pass", transformed)
    torch.manual_seed(1)
    model, x = Network(), torch.randn(batch, 3, 16, 20)
    prune(model, 0.5)
    compiled = deploy.compile(model, x, tune=True)
    assert error(compiled(x), dense(model)(x)) < 1e-5
    graph, program = compiled.graph, compiled.engine.program
    assert all(choice.sweep != "winograd" for choice in program.choices.values())
    monkeypatch.setattr("clicktrain.deploy.program.tune_pass", lambda layer, *_, **__: winograd.choice(layer))
    with pytest.raises(InvalidArgument, match="expected one that reads strips of images"):
        build_program(graph, batch, tune=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("size", "pools"), [((16, 20), True), ((18, 10), True), ((15, 16), False)])
@torch.no_grad()
def test_compiled_networks(
    relu: bool, size: tuple[int, int], pools: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("clicktrain.deploy.program.tune_pass", transformed)
    torch.manual_seed(1)
    model, x = Network(), torch.randn(19, 3, *size)
    model.relu = relu
    prune(model, 0.5)
    compiled = deploy.compile(model, x, tune=True)
    steps = [step for step in compiled.engine.program.steps if isinstance(step, NativeStep)]
    assert all(step.prepared.structure.transforms for step in steps if step.prepared)
    assert (Kind.POOL in [step.kind for step in steps]) != pools
    result = compiled(x)
    assert error(result, dense(model)(x)) < 1e-5
    compiled.save(tmp_path / "model")
    tuning.forget()
    assert torch.equal(deploy.load(tmp_path / "model")(x), result), "the choice comes with the file"
    tuning.forget()


def test_large_results_bypass_the_caches() -> None:
    case = Case(SQUARES, 64, 8, 16, (32, 32), (1, 1), (1, 1), 0.5, seed=1)
    layer = Layer.forward(case.plan())
    assert passes.prepare(layer, 2, winograd.choice(layer)).structure.streaming
    check(case)
