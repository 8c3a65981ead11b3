"""asv's benchmarks: that asv can use them at any commit, and that what they time is right."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from bench.suite import cases, kernels, network, optional, runs
from bench.suite.cases import FUNCTIONS, Case
from bench.suite.workloads import LAYERS, MEASURED, LayerShape, Workload
from clicktrain import timing
from clicktrain.kernels.cpu import backend, library

CLONE = Path(__file__).parents[2]
SMALL = Workload(LayerShape("test", "small", 9, 10, (6, 5)), 9, 4.5)

needs_library = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")
BENCHMARKS = [
    found
    for module in (kernels, network, runs)
    for _, found in inspect.getmembers(module, inspect.isclass)
    if found.__module__ == module.__name__
]


def test_workloads_that_are_followed_cover_what_differs() -> None:
    shapes = [workload.shape for workload in MEASURED.values()]
    assert {shape.kernel_size for shape in shapes} == {1, 3}
    assert {shape.stride for shape in shapes} == {1, 2}
    assert 1 in {workload.batch for workload in MEASURED.values()}
    assert all(LAYERS[shape.name] is shape for shape in shapes)


@pytest.mark.parametrize("found", BENCHMARKS, ids=lambda found: found.__name__)
def test_benchmarks_have_a_version_and_figures_a_unit(found: type) -> None:
    assert isinstance(found.version, str), "or a changed comment throws the history away"
    names = [name for name in vars(found) if name.startswith(("time", "track_", "peakmem_")) and name != "timeout"]
    assert names
    for name in names:
        assert not name.startswith("track_") or vars(found)[name].unit, f"{name} has no unit"
    combinations = getattr(found, "params", ())
    assert len(combinations) == len(getattr(found, "param_names", ()))


def test_asv_imports_the_suite_as_a_package_of_its_own() -> None:
    script = "import suite.kernels, suite.network, suite.runs, sys; print('bench' in sys.modules)"
    environment = {"PYTHONPATH": f"{CLONE}:{CLONE / 'bench'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_name_that_a_commit_lacks_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional.need("clicktrain.timing") is timing
    assert optional.need("clicktrain.timing:compare") is timing.compare
    for name in ("clicktrain.no_such", "clicktrain.timing:no_such"):
        with pytest.raises(NotImplementedError, match=f"this commit has no {name}"):
            optional.need(name)
    monkeypatch.setenv(optional.STRICT, "1")
    with pytest.raises(AttributeError):
        optional.need("clicktrain.timing:no_such")


def test_a_backend_that_cannot_compute_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda: "no compiler")
    with pytest.raises(NotImplementedError, match="cpu backend is not available: no compiler"):
        kernels.Time().setup(next(iter(MEASURED)), "forward")


@needs_library
@pytest.mark.parametrize("batch", [9, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_timed_is_right(function: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Workload(SMALL.shape, batch, 4.5))
    contender = case.checked(function)
    assert contender.result is not None
    assert timing.relative_error(contender.result(contender.run()), case.reference(function)) < cases.TOLERANCE
    name = function if batch == 1 else f"{function}_blocked"
    right = getattr(backend, name)
    monkeypatch.setattr(backend, name, lambda *operands: right(*operands) * 1.001)
    with pytest.raises(RuntimeError, match=f"{function} of .* is wrong"):
        case.checked(function)


@needs_library
def test_figures_are_of_the_same_rounds() -> None:
    found = cases.figures(SMALL, "forward", rounds=3)
    assert found.speedup > 0
    assert found.gflops > 0
    assert 0 < found.share_of_peak < 1


def test_a_tiny_run_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "WIDTH", 0.125)
    result = runs.run("ClickTrain", images=100, epochs=4)
    benchmark = runs.EndToEnd()
    benchmark.setup({"ClickTrain": result}, "ClickTrain")
    assert benchmark.track_compression(None, "ClickTrain") == pytest.approx(6.0, rel=0.01)
    assert 0 < benchmark.track_training_flops_saved(None, "ClickTrain") < 100
    assert 0 < benchmark.track_inference_macs_saved(None, "ClickTrain") < 100
    assert benchmark.track_wall_seconds(None, "ClickTrain") > result["seconds"]["train"]
    assert 0 <= benchmark.track_accuracy(None, "ClickTrain") <= 100


def test_a_run_that_a_commit_cannot_do_is_skipped() -> None:
    with pytest.raises(NotImplementedError, match="no baselines"):
        runs.EndToEnd().setup({"PAT": "this commit has no baselines"}, "PAT")


@needs_library
def test_pytest_benchmark_runs_and_checks_a_kernel() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-k", "512x7 or test_unpack"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
