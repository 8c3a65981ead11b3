"""`bench.gpu` without a GPU: what it says, and that its contenders, checks and training do what they claim."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import clicktrain
from bench.gpu import __main__ as gpu
from bench.gpu import checks, deployment, steps, table
from bench.gpu.rivals import DENSE, FUNCTIONS, SHARED, SHARED_BATCH_LAST, SPARSE, Case
from bench.gpu.training import METHODS, MaskedDense, train
from bench.suite.networks import Setting
from bench.suite.workloads import LayerShape, Workload
from clicktrain.kernels import backends, reference
from clicktrain.kernels.cuda import backend, launch
from clicktrain.kernels.cuda.tensor import is_batch_last
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.timing import WrongResult, relative_error
from tests.kernels.cuda.configurations import CONFIGURATIONS
from tests.kernels.cuda.host import HostLauncher, on_host

ROOT = Path(__file__).parents[2]


ALONE = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Missing())
import bench.gpu
for module in pkgutil.iter_modules(bench.gpu.__path__):
    importlib.import_module(f"bench.gpu.{module.name}")
from bench.gpu.training import train
print(train("sparse", 0, 3, None, "cpu", train_limit=130, width=0.0625).epochs)
"""
"""Imports all of `bench.gpu` and trains with it, where packages are missing."""


def test_needs_no_package_beside_torch_cupy_and_numpy():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    missing = {re.match(r"[\w-]+", name)[0] for name in wanted} - {"numpy", "torch"} | {"PIL"}
    assert missing >= {"pydantic", "safetensors", "typer"}
    command = [sys.executable, "-c", f"MISSING = {missing!r}\n{ALONE}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3"


@pytest.mark.skipif(launch.available() is True, reason="this machine has a GPU")
def test_says_so_where_there_is_no_gpu():
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("not run on this hardware: ")
    assert done.stdout.count("\n") == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_contender_computes_the_same(function, tmp_path_factory):
    workload = Workload(LayerShape("test", "4-6x6", 4, 6, (6, 6)), batch=2, compression=3.0)
    with on_host(HostLauncher(tmp_path_factory.mktemp("units"))), CONFIGURATIONS["squares"].used():
        case = Case(workload, "cpu")
        contenders = case.contenders(function)
        products = {f"{name} {kind}" for name in ("cuBLAS", "cuSPARSE") for kind in ("im2col", "product")}
        assert {*DENSE, *products, SPARSE, "sparse bf16"} == set(contenders)
        results = {name: contender.result(contender.run()) for name, contender in contenders.items()}
    exact = [t.double() for t in (case.x, case.values, case.dy)]
    truth = {
        "forward": lambda: reference.forward(exact[0], exact[1], case.plan),
        "grad_input": lambda: reference.grad_input(exact[2], exact[1], case.plan),
        "grad_values": lambda: reference.grad_values(exact[0], exact[2], case.plan),
    }[function]()
    for name, result in results.items():
        assert result.shape == truth.shape, name
        assert relative_error(result, truth) < (1.6e-2 if name.endswith("bf16") else 1e-5), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_shared_filters_are_a_contender_checked_by_itself(function, tmp_path_factory, monkeypatch):
    workload = Workload(LayerShape("test", "5-32x4", 5, 32, (4, 4)), batch=8, compression=3.0)
    with on_host(HostLauncher(tmp_path_factory.mktemp("units"), Limits(48 << 10, 4, 4))) as launcher:
        case = Case(workload, "cpu")
        contenders = case._shared(function)
        assert [contender.result for contender in contenders.values()] == [None, None]
        assert all("tensor_" in text for text in launcher.texts)
        assert {text.count("BATCH_LAST = 1;") for text in launcher.texts} == {0, 1}
        right = getattr(backend, function)
        for name, wrong in ((SHARED, False), (SHARED_BATCH_LAST, True)):
            monkeypatch.setattr(
                backend, function,
                lambda *operands, wrong=wrong: right(*operands) * (1.1 if is_batch_last(operands[0]) == wrong else 1),
            )  # fmt: skip
            with pytest.raises(WrongResult, match=f"{name}: relative error 0.* of {function}"):
                case._shared(function)


def test_shared_assignments_keep_as_many_kernels():
    workload = Workload(LayerShape("test", "9-32x4", 9, 32, (4, 4)), batch=8, compression=4.5)
    alone, shared = workload.assignment(), workload.assignment(share_filters=16)
    assert alone.kept_kernels == shared.kept_kernels == 144
    assert torch.equal(shared.index, shared.index[::16].repeat_interleave(16, 0))
    assert not torch.equal(alone.index, shared.index)


def test_the_checks_compare_and_complain(monkeypatch):
    for name in FUNCTIONS:
        monkeypatch.setattr(backend, name, getattr(reference, name))
    monkeypatch.setattr(checks, "SIZES", (1, 4, 5))
    done = checks.check(12, 60.0, device="cpu")
    assert done.cases == 36
    assert "36 random cases right" in str(done)
    monkeypatch.setattr(backend, "grad_values", lambda x, dy, made: reference.grad_values(x, dy, made) * 1.1)
    with pytest.raises(WrongResult, match=r"grad_values in torch.float\d+ is wrong"):
        checks.check(12, 60.0, device="cpu")


def test_masked_dense_training_equals_sparse_training():
    images, labels = torch.randn(6, 16, 3, 8, 8), torch.randint(0, 5, (6, 16))
    models = {}
    for method_class in (clicktrain.ClickTrain, MaskedDense):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        method = method_class(target_compression=2.5, epochs=4, select_at=1, prune_at=2, backend="reference")
        loader = list(zip(images, labels, strict=True))
        method.setup(model, optimizer, images[0])
        for epoch in range(4):
            method.on_epoch(epoch, loader)
            for x, y in loader:
                loss = torch.nn.functional.cross_entropy(model(x), y) + method.penalty()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                method.after_step()
        models[method_class] = (method.finish(), method.masks())
    (sparse, masks), (masked, same_masks) = models.values()
    assert all(torch.equal(mask, same_masks[name]) for name, mask in masks.items())
    for name, mask in masks.items():
        dense = masked.get_submodule(name).weight.detach()
        assert not dense[~mask].any()
        torch.testing.assert_close(sparse.get_submodule(name).dense_weight(), dense, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_run_reports_each_stage(method):
    done = train(method, 0, 4, None, device="cpu", train_limit=256, width=0.125)
    assert set(done.step_ms) == set(done.seconds) == {"dense", "regularized", "sparse"}
    assert 0.05 < done.accuracy < 1
    assert all(ms > 0 for ms in done.step_ms.values())


def test_steps_are_compared_in_every_way_and_what_fails_is_named(monkeypatch):
    def refuse(model, mode):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    found = steps.measure(2, Setting(0.05, 8), "cpu")
    recorded = [name for name, (_, way) in steps.WAYS.items() if way != steps.COMPILED]
    assert [timed["name"] for timed in found["timings"]] == recorded
    assert {timed["name"] for timed in found["timings"] if timed["error"] is None} == {"dense, TF32, recorded"}
    assert all((timed["error"] or 0.0) <= steps.TOLERANCE and timed["n"] == 2 for timed in found["timings"])
    assert found["best_sparse"] in {"sparse, recorded", "sparse, eager"}
    assert found["best_dense"] in {"dense, recorded", "dense, channels_last, recorded", "dense, eager"}
    assert found["left_out"].keys() == {"sparse, compiled", "dense, compiled"}
    assert "no compiler here" in found["left_out"]["dense, compiled"]


def test_a_step_that_fails_without_a_compiler_is_an_error(monkeypatch):
    step = steps._step

    def broken(setting, network, way, device):
        if network == steps.SPARSE:
            raise RuntimeError("a kernel")
        return step(setting, network, way, device)

    monkeypatch.setattr(steps, "_step", broken)
    with pytest.raises(RuntimeError, match="a kernel"):
        steps.measure(1, Setting(0.05, 8), "cpu")


def test_a_wrong_part_does_not_end_the_others(monkeypatch, tmp_path):
    def wrong(rounds):
        raise WrongResult("0.5")

    monkeypatch.setattr(deployment, "measure", wrong)
    monkeypatch.setattr(steps, "measure", lambda rounds: {"batch": 8})
    report = {"wrong": []}
    gpu.add_later_parts(report, gpu._options([]), {"deployment": 1.0, "steps": 1.0}, 0.0)
    assert report == {"wrong": ["deployment: 0.5"], "steps": {"batch": 8}}


CEILINGS = {"fp32_gflops": 100.0, "copy_gbps": 50.0}


def test_the_summary_is_geometric_means_over_layers():
    rows = [
        table.Row(
            f"layer {s}",
            "forward",
            8.0,
            {"cuDNN fp32": s, "cuSPARSE im2col": 3 * s, "cuSPARSE product": 2 * s},
            s,
            1.0,
            [],
        )
        for s in (2.0, 8.0)
    ]
    found = table.summary(rows, CEILINGS)["forward 8x"]
    assert found["cuDNN fp32"] == pytest.approx(4.0)
    assert found["share of the FP32 rate"] == pytest.approx(0.04)
    assert found["share of copy bandwidth"] == pytest.approx(0.02)
    assert found["best layer, cuDNN fp32"] == 8.0
    assert (found["worst layer, cuSPARSE im2col"], found["worst layer, cuSPARSE product"]) == (6.0, 4.0)
    assert "shared bf16 over cuDNN bf16" not in found
    rows = [
        table.Row(
            f"layer {s}",
            "forward",
            8.0,
            dict.fromkeys(("cuDNN fp32", "cuDNN bf16", "cuSPARSE im2col", "cuSPARSE product"), 1.0)
            | {SHARED: s, SHARED_BATCH_LAST: s / 2},
            1.0,
            1.0,
            [],
        )
        for s in (0.5, 0.125)
    ]
    found = table.summary(rows, CEILINGS)["forward 8x"]
    assert found["shared bf16 over cuDNN bf16"] == pytest.approx(4.0)
    assert found["shared bf16, batch last over cuDNN bf16"] == pytest.approx(8.0)


def test_the_table_has_every_layer_and_compression():
    names = [workload.name for workload in table.workloads()]
    assert len(names) == len(set(names)) == 4 * (8 + 7 + 4)
    assert {workload.compression for workload in table.workloads()} == {2.25, 4.5, 8.0, 12.0}


def test_the_sanitizer_says_when_it_was_not_run(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu.sanitize("memcheck", 99.0) == "not run: compute-sanitizer is not on the PATH"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert gpu.sanitize("memcheck", 3.0) == "not run: the time was over"


def test_layers_are_measured_by_importance_and_kept_as_the_time_allows(monkeypatch, tmp_path):
    done, out = [], tmp_path / "gpu.json"
    names = [workload.name for workload in table.workloads()]
    speedups = dict.fromkeys(("cuDNN fp32", "cuDNN bf16", "cuSPARSE im2col", "cuSPARSE product"), 2.0)

    def measured(layers, rounds, end):
        for layer in layers[: 9 - len(done)]:
            done.append(layer.name)
            row = table.Row(layer.name, "forward", layer.compression, speedups, 1.0, 1.0, [])
            yield "the second is wrong" if len(done) == 2 else [row]

    monkeypatch.setattr(table, "measure_all", measured)
    report = {"rows": [], "wrong": [], "left_out": [], "summary": {}, "ceilings": CEILINGS}
    gpu.measure(report, gpu._options(["--out", str(out)]), time.perf_counter() + 1000)
    assert done == names[:9]
    assert [row["workload"] for row in report["rows"]] == [names[0], *names[2:9]]
    assert report["wrong"] == ["the second is wrong"]
    assert report["left_out"] == names[9:]
    assert json.loads(out.read_text())["summary"]["forward 8x"]["cuDNN fp32"] == pytest.approx(2.0)


def test_nothing_is_compiled_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(table, "measure_all", lambda *arguments: pytest.fail("the time was over"))
    report = {"rows": [], "wrong": [], "left_out": [], "summary": {}, "ceilings": CEILINGS}
    gpu.measure(report, gpu._options([]), time.perf_counter() - 1)
    assert len(report["left_out"]) == len(table.workloads())


def test_the_report_names_the_sources(tmp_path, monkeypatch):
    (tmp_path / "host").mkdir()
    (tmp_path / "a.cuh").write_text("one")
    (tmp_path / "host" / "b.cuh").write_text("two")
    monkeypatch.setattr(gpu.codegen, "DIRECTORY", tmp_path)
    before = gpu.sources()
    (tmp_path / "notes.txt").write_text("not a source")
    assert gpu.sources() == before
    (tmp_path / "host" / "b.cuh").write_text("three")
    assert gpu.sources() != before


def test_the_backend_is_listed_for_cuda_tensors_only():
    assert backends.BACKENDS["cuda"].supports(torch.zeros(1, device="meta")) is not True


def test_the_report_ends_with_every_part(capsys):
    timing_ = {"name": "compiled", "median_ms": 0.25, "p20_ms": 0.2, "p80_ms": 0.3, "n": 9, "error": 1e-6}
    deployed = deployment.Deployed(1, 2, {"torch": 3.0, "dense, recorded": 1.5}, [timing_])
    run = {"method": "sparse", "seed": 0, "epochs": 1, "accuracy": 0.875, "step_ms": {"dense": 7.0, "sparse": 4.5}}
    gpu.print_report({
        "provenance": {"gpu": "Some GPU"}, "summary": {"forward 8x": {"cuDNN fp32": 3.5}}, "training": [run],
        "sanitizer": {"memcheck": "ERROR SUMMARY: 0 errors"}, "deployment": [asdict(deployed)],
        "steps": asdict(steps.Steps(128, "sparse, recorded", "dense, compiled", 1.75, [timing_], {})),
        "wrong": ["a wrong layer"], "left_out": ["another layer"],
    })  # fmt: skip
    said = capsys.readouterr().out
    for part in (
        "Some GPU", "cuDNN fp32 3.50x", "memcheck: ERROR SUMMARY: 0 errors", "accuracy 0.8750", "sparse step 4.50 ms",
        "VGG-13 9.0x, batch 1: 0.250 ms  torch 3.00x  dense, recorded 1.50x", "a wrong layer", "1 workloads were left",
        "step of batch 128: compiled 0.25 ms  best over best 1.75x",
    ):  # fmt: skip
        assert part in said
