"""Kernels that are ready before they are needed: compiled at once, in the background, and never in the way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clicktrain
from clicktrain import ClickTrain, flops, kernels, models
from clicktrain.errors import BackendUnavailable
from clicktrain.kernels import build
from clicktrain.kernels.cpu import backend, gradients, library, passes, runtime
from clicktrain.preparation import plans
from tests.kernels.cases import Case
from tests.kernels.test_cpu_backend import SQUARES, run

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

CASE = Case(SQUARES, 20, 18, 16, (9, 7), (1, 1), (1, 1), 0.5, seed=11)


@pytest.fixture
def shared_cache() -> str:
    """Return the cache of all tests, which has the generic library."""
    return os.environ["CLICKTRAIN_CACHE_DIR"]


@pytest.fixture(autouse=True)
def cache(shared_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start with the generic library loaded, and nothing specialised compiled or laid out."""
    library.load()
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    for forget in (runtime.forget, passes._addresses.cache_clear, gradients._addresses.cache_clear):
        forget()
    yield tmp_path / "cache"
    for forget in (
        runtime.forget, passes._addresses.cache_clear, gradients._addresses.cache_clear, passes.warn_once.cache_clear,
    ):  # fmt: skip
        forget()


def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(made: build.Library, path: Path) -> None:
        raise AssertionError(f"{path.name} is compiled after all")

    monkeypatch.setattr(build, "_build", fail)


def test_what_was_prepared_is_not_compiled_again_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(CASE)
    runtime.forget()
    passes._addresses.cache_clear()
    gradients._addresses.cache_clear()
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", os.environ["CLICKTRAIN_CACHE_DIR"] + "-2")
    made = kernels.prepare([CASE.plan()])
    assert made.is_done
    nothing_compiles(monkeypatch)
    for name, result in run(CASE).items():
        assert torch.equal(result, expected[name]), name


def test_only_what_will_be_needed_is_compiled(cache: Path) -> None:
    plan = replace(CASE, stride=(2, 2)).plan()  # the input gradient is another code than the forward pass
    kernels.prepare({plan: ("forward",)})
    forward = set(cache.glob("*.so"))
    kernels.prepare({plan: ("forward", "grad_input")})
    assert 0 < len(forward) < len(set(cache.glob("*.so")))


def test_empty_plans_and_other_backends_need_nothing(cache: Path) -> None:
    empty = kernels.plan(torch.full((4, 3), 255, dtype=torch.uint8), SQUARES, (8, 3, 5, 5), 1, 1)
    assert kernels.prepare([empty]).is_done
    assert kernels.prepare([CASE.plan()], backend="reference").is_done
    assert kernels.prepare([CASE.plan()], device="meta").is_done
    assert not list(cache.glob("*.so"))


def test_failures_are_logged_and_end_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def disk_is_full(made: build.Library, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CLICKTRAIN_DISABLE_JIT", "1")
    expected = run(CASE)
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    runtime.forget()
    passes._addresses.cache_clear()
    gradients._addresses.cache_clear()
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", os.environ["CLICKTRAIN_CACHE_DIR"] + "-2")
    monkeypatch.setattr(build, "_build", disk_is_full)
    with caplog.at_level(logging.WARNING):
        kernels.prepare([CASE.plan()])
        results = run(CASE)
    for name, result in results.items():  # of the generic kernels, too
        assert torch.equal(result, expected[name]), name
    assert [r.message for r in caplog.records if "No space left" in r.message and "generic one" in r.message]


def test_an_unforeseen_error_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(backend, "preparations", lambda plan, functions: [broken] * 3)
    with caplog.at_level(logging.WARNING):
        kernels.prepare([CASE.plan()], background=True).wait()
    assert [record.message for record in caplog.records] == ["kernels are not ready before their first use: broken"]


def test_the_end_of_the_process_does_not_wait_for_compilers(tmp_path: Path, shared_cache: str) -> None:
    compiler, pids = tmp_path / "slow-g++", tmp_path / "pids"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ echo $$ >> {pids}; sleep 60; }}\n')
    compiler.chmod(0o755)
    program = (
        "import os, time\n"
        "from clicktrain import kernels\n"
        "from clicktrain.kernels import build\n"
        "from clicktrain.kernels.cpu import library\n"
        "from tests.kernels.cases import Case, official_pool\n"
        "library.load()\n"
        f"os.environ['CXX'] = '{compiler}'\n"
        "build.compiler.cache_clear(), build.compiler_version.cache_clear()\n"
        "plan = Case(official_pool(4), 20, 18, 16, (9, 7), (1, 1), (1, 1), 0.5, seed=11).plan()\n"
        "preparation = kernels.prepare([plan], background=True)\n"
        f"while not os.path.exists('{pids}'): time.sleep(0.01)\n"
        "assert not preparation.is_done\n"
        "print(time.time())\n"
    )
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment = {**os.environ, "CLICKTRAIN_CACHE_DIR": shared_cache, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert time.time() - float(done.stdout) < 20
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    deadline = time.monotonic() + 10
    while running := [pid for pid in pids.read_text().split() if is_alive(int(pid))]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended is listed until its new parent has asked for its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_several_calls_run_at_once_and_the_first_error_counts() -> None:
    assert build.in_parallel([lambda n=n: n * n for n in range(5)]) == [0, 1, 4, 9, 16]

    def fail() -> int:
        raise BackendUnavailable("why")

    with pytest.raises(BackendUnavailable, match="why"):
        build.in_parallel([fail, lambda: 1])


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 32, 32, generator=random), torch.randint(0, 4, (8,), generator=random)) for _ in range(count)
    ]


def test_clicktrain_compiles_between_selection_and_prune_only(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    model = models.create("vgg11", 4, width=0.125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = batches(2)
    method = ClickTrain(5.0, 3, select_at=0, prune_at=1)
    method.eval_batch_sizes = (16,)
    method.setup(model, optimizer, loader[0][0][:1])
    method.on_epoch(0, loader)
    method.on_epoch(1, loader)
    assert method.stage == "sparse"
    assert list(cache.glob("*.so"))
    nothing_compiles(monkeypatch)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()(torch.randn(16, 3, 32, 32))
    flops.layer_costs(model, (3, 32, 32))
    assert {layer.backend for layer in model.modules() if isinstance(layer, clicktrain.PatternConv2d)} == {"auto"}


@pytest.mark.parametrize("late", [False, True])
def test_tuning_at_the_prune_is_an_option(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    tuned: list[tuple[int, ...]] = []
    monkeypatch.setenv("CLICKTRAIN_DISABLE_JIT", "1")
    monkeypatch.setattr(backend, "tune", lambda plans: tuned.extend(plan.input_shape for plan in plans))
    model = models.create("vgg11", 4, width=0.125)
    loader = batches(2)
    method = ClickTrain(5.0, 3, select_at=0, prune_at=1, prune_after_step=late, tune=True, backend="cpu")
    method.setup(model, torch.optim.SGD(model.parameters(), lr=0.01), loader[0][0][:1])
    method.on_epoch(0, loader)
    method.on_epoch(1, loader)
    assert bool(tuned) is not late
    method.after_step()
    convolutions = sum(isinstance(m, nn.Conv2d | clicktrain.PatternConv2d) for m in model.modules())
    assert len(tuned) == convolutions, "each layer once"
    assert {shape[0] for shape in tuned} == {8}
    again = ClickTrain(5.0, 3, select_at=0, prune_at=1, tune=True)
    other = models.create("vgg11", 4, width=0.125)
    again.setup(other, torch.optim.SGD(other.parameters(), lr=0.01), loader[0][0][:1])
    again.load_state_dict(method.state_dict())
    assert len(tuned) == convolutions, "a resumed run has its choices from the checkpoint"


def test_plans_of_a_model_are_those_that_it_runs_by() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1))
    assignment = clicktrain.Assignment(torch.zeros(6, 8, dtype=torch.uint8), SQUARES)
    before = plans(model, (16, 3, 12, 10), {"2": assignment})
    clicktrain.convert(model, {"2": assignment})
    after = plans(model, (16, 3, 12, 10))
    assert before == after  # the same objects
    assert [plan.input_shape for (plan,) in after.values()] == [(16, 3, 12, 10), (16, 8, 12, 10)]
    runtime.forget()
    model(torch.randn(16, 3, 12, 10, requires_grad=True)).sum().backward()
    assert {id(plan) for plan in runtime._runtimes} == {id(plan) for (plan,) in after.values()}


def test_a_grouped_convolution_has_no_plan() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding="same"))
    assert plans(model, (8, 4, 6, 6)) == {}


def test_a_tuned_model_computes_the_same_up_to_rounding() -> None:
    model = nn.Sequential(nn.Conv2d(70, 6, 3, padding=1))
    clicktrain.convert(model, {"0": clicktrain.Assignment(torch.ones(6, 70, dtype=torch.uint8), SQUARES)})
    x = torch.randn(16, 70, 8, 8)
    before, made = model(x), kernels.choices()
    clicktrain.tune(model, x.shape)
    torch.testing.assert_close(model(x), before)
    kernels.use_choices(made)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["reference", "abacus"])
def test_choices_of_a_backend_that_makes_none_are_refused(name: str) -> None:
    with pytest.raises(clicktrain.ClickTrainError, match=f"choices of '{name}'"):
        kernels.use_choices({name: {}})
