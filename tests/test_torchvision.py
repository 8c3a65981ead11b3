"""torchvision can be imported whichever build of it is beside this torch."""

import importlib.util
import subprocess
import sys

import pytest

from clicktrain import _torchvision
from clicktrain.errors import BackendUnavailable

USE = """
from clicktrain._torchvision import load_torchvision
torchvision = load_torchvision()
assert load_torchvision() is torchvision
import gc, torch; gc.collect()
import torchvision.models
assert torchvision.models.resnet18(num_classes=3)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
"""
UNLOADABLE = """
from clicktrain import _torchvision
_torchvision._compiled_library_loads = lambda package: False
import torch; torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("not for this torch"))
try:
    import torchvision
except RuntimeError as error:
    assert "torchvision::nms" in str(error)
else:
    raise AssertionError("expected to need help")
"""


@pytest.mark.parametrize("before", ["", UNLOADABLE], ids=["as installed", "unloadable"])
def test_models_work(before):
    result = subprocess.run([sys.executable, "-c", before + USE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_missing_torchvision_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(_torchvision, "_definitions", [])
    monkeypatch.setattr(_torchvision, "find_spec", lambda name: None)
    assert importlib.util.find_spec("torch") is not None  # only our view of torchvision is blocked
    with pytest.raises(BackendUnavailable, match="torchvision is not installed"):
        _torchvision.load_torchvision()
