"""Models for other programs: checked, and refused where they compute something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clicktrain.deploy import export
from clicktrain.errors import MissingPackage
from tests.deploy.models import dense, error, pruned


def test_a_program_runs_in_another_process(tmp_path: Path) -> None:
    model, x = pruned("vgg11", width=0.1), torch.randn(2, 3, 32, 32)
    assert export.to_program(model, x, tmp_path / "model.pt2") < 1e-5
    torch.save(x, tmp_path / "x")
    program = (
        "import sys, torch, clicktrain; program = torch.export.load(sys.argv[1]);"
        "assert any('pattern_conv2d' in str(node.target) for node in program.graph.nodes);"
        "torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])"
    )
    files = [str(tmp_path / name) for name in ("model.pt2", "x", "y")]
    subprocess.run([sys.executable, "-c", program, *files], check=True)
    with torch.no_grad():
        assert error(torch.load(tmp_path / "y"), dense(model)(x)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_has_standard_operators_and_takes_any_batch(batch: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = pruned("prunetrain_resnet32", width=0.5), torch.randn(batch, 3, 32, 32)
    path = tmp_path / "model.onnx"
    assert export.to_onnx(model, x, path) < 1e-4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"], "weights lie inside, no part is left"
    onnx.checker.check_model(str(path), full_check=True)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        got = torch.from_numpy(session.run(None, {"input": other.numpy()})[0])
        assert error(got, dense(model)(other)) < 1e-4


def test_without_the_packages_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match=r"needs onnxruntime: pip install 'clicktrain\[peers\]'"):
        export.to_onnx(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), tmp_path / "x.onnx")


def test_what_computes_something_else_is_refused(tmp_path: Path) -> None:
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with pytest.raises(export.ExportMismatch, match=r"there: the exported model is off by 0\.001"):
        export.check(lambda x: model(x) * 1.001, model, x, "there")
    with torch.no_grad(), pytest.raises(export.ExportMismatch):
        export.check(lambda x: model(x) * torch.nan, model, x, "there")
    assert export.check(model, model, x, "there") == 0
