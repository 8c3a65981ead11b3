"""`pytest -m gpu` on a machine that has little more than torch, CuPy and pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLLECT = "import sys, pytest; {}; sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', 'tests']))"
WITHOUT = "sys.modules.update(pydantic=None, ray=None, fvcore=None, torch_pruning=None, onnx=None, asv=None)"


@pytest.mark.parametrize(("prepared", "trainer"), [("pass", True), (WITHOUT, False)])
def test_tests_that_need_a_gpu_are_found(prepared: str, trainer: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECT.format(prepared)], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {"tests/kernels/cuda/test_gpu.py", "tests/deploy/test_gpu_engine.py"} <= found
    assert ("tests/training/test_gpu.py" in found) == trainer
    assert "tests/test_cli.py" not in done.stdout
