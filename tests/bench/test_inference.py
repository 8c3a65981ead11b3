"""`python -m bench.inference`: that it checks, compares and stores what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import inference
from bench.deepsparse_worker import Worker
from clicktrain import timing
from clicktrain.kernels.cpu import library
from clicktrain.selection import Sparsity

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")

SMALL = inference.Network("vgg11", "small", 16, Sparsity(target_compression=4.0), {2: {"torch": 1e-9, "openvino": 2.0}})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    create = inference.models.create
    monkeypatch.setattr(inference.models, "create", lambda *a, **k: create(*a, **k, width=0.1))
    monkeypatch.setattr(inference, "NETWORKS", {"small": SMALL})
    compiled = inference.deploy.compile
    monkeypatch.setattr(inference.deploy, "compile", lambda *a, **k: compiled(*a, **{**k, "tune": False}))


def test_a_network_depends_on_its_input() -> None:
    y = SMALL.build()(torch.randn(8, 3, 16, 16))
    assert float((y - y.mean(0)).norm()) > 0.05 * float(y.norm())


def test_the_command_compares_and_stores_with_provenance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(inference.export, "to_onnx", lambda *_: 0.0)
    out = tmp_path / "inference.json"
    arguments = ["--quick", "--networks", "small", "--rivals", "torch", "openvino", "deepsparse", "--out", str(out)]
    assert inference.main(arguments) == 0
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert set(row["speedup"]) == {"torch"}
    assert row["not_run"]["openvino"] == "not installed: openvino"
    assert "--deepsparse" in row["not_run"]["deepsparse"]
    assert {t["name"] for t in row["timings"]} == {"clicktrain", "torch", "peak"}
    assert 0 < row["share_of_peak"] < 1
    assert {name: cost["file_mb"] > 0 < cost["load_ms"] for name, cost in row["costs"].items()} == {
        "clicktrain": True, "torch": True,
    }  # fmt: skip
    assert row["compression"] == pytest.approx(4.0, rel=0.1)
    assert report["provenance"]["packages"]["torch"]
    printed = capsys.readouterr().out
    assert "goal 0.0x  reached" in printed
    assert "openvino        not run: not installed" in printed


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = timing.Contender(lambda: torch.zeros(2, 1000))
    monkeypatch.setattr(inference, "rivals", lambda *_: {"torch": wrong})
    with pytest.raises(timing.WrongResult, match="torch is wrong"):
        inference.measure(SMALL, 2, 1, ["torch"], None)


def row(compression: float, batch: int, **speedup: float) -> dict[str, object]:
    return {"network": "net", "compression": compression, "batch": batch, "speedup": speedup}


def test_the_crossover_is_against_the_best_dense_engine() -> None:
    rows = [
        row(2.0, 1, torch=1.2, onnxruntime=0.5, deepsparse=0.1), row(4.0, 1, torch=3.0, onnxruntime=1.5),
        row(2.0, 8, torch=1.5), row(2.0, 9, torch=0.9), row(4.0, 9, torch=0.8),
    ]  # fmt: skip
    assert inference.crossovers(rows) == [
        "net, batch 1: beats the best dense engine from 3.0x on; never slower than 0.50x of it",
        "net, batch 8: beats the best dense engine from 2.0x on, the least measured; never slower than 1.50x of it",
        "net, batch 9: does not beat the best dense engine up to 4.0x; never slower than 0.80x of it",
    ]


def test_a_compression_out_of_reach_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--quick", "--compressions", "1.5"]) == 2
    error = capsys.readouterr().err
    assert "--compressions: target_compression=1.5: feasible are 2.2" in error
    assert len(error.splitlines()) == 1


def test_a_network_with_ratios_has_no_other_compression(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = inference.Network("vgg11", "by ratios", 16, Sparsity(ratios=0.5), {2: {}})
    monkeypatch.setattr(inference, "NETWORKS", {"ratios": ratios})
    assert inference.main(["--networks", "ratios", "--compressions", "2"]) == 2
    assert "--compressions: vgg11 has its ratios by layer" in capsys.readouterr().err


def test_a_batch_size_that_no_network_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        inference.main(["--quick", "--batches", "7"])
    assert ended.value.code == 2
    assert "argument --batches: invalid choice: 7" in capsys.readouterr().err


def test_an_error_of_a_networks_own_sparsity_names_no_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = inference.Network("vgg11", "impossible", 16, Sparsity(target_compression=1.5), {2: {}})
    monkeypatch.setattr(inference, "NETWORKS", {"impossible": impossible})
    assert inference.main(["--quick", "--networks", "impossible"]) == 2
    assert capsys.readouterr().err.startswith("error: target_compression=1.5: feasible are")


FAKE = """
import numpy as np, pathlib
class Engine:
    def __init__(self, model, batch_size, num_cores):
        self.factor = float(pathlib.Path(model).read_text()) * num_cores
    def run(self, inputs):
        print("chatter that is no answer")
        return [inputs[0] * self.factor]
"""


def test_the_worker_runs_an_engine_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepsparse.py").write_text(FAKE)
    (tmp_path / "model").write_text("3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    x = torch.randn(2, 3)
    worker = Worker(sys.executable, tmp_path / "model", x, tmp_path, 2)
    worker.run()
    assert torch.equal(worker.result(), x * 6)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepsparse.py").write_text("raise ImportError('no such engine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OSError, match="deepsparse does not run: ImportError: no such engine"):
        Worker(sys.executable, tmp_path / "model", torch.zeros(1), tmp_path, 1)
