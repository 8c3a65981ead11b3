"""Names and options of `clicktrain.data.load`."""

import subprocess
import sys

import pytest

from clicktrain import data
from clicktrain.errors import InvalidArgument


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidArgument, match="unknown data set 'mnist'") as error:
        data.load("mnist")
    assert all(name in str(error.value) for name in data.names())
    assert "fashion-mnist-small" in data.names()


def test_train_limit_is_balanced_and_repeatable():
    dataset = data.load("fashion-mnist-small", train_limit=250)
    assert dataset.train.labels.bincount().tolist() == [25] * 10
    assert len(dataset.test) == 5000
    assert data.load("fashion-mnist-small", train_limit=250).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("limit", [0, -3, 10_001])
def test_impossible_train_limit_is_named(limit):
    with pytest.raises(InvalidArgument, match=f"train_limit={limit}: expected"):
        data.load("fashion-mnist-small", train_limit=limit)


def test_image_size_is_for_folders():
    with pytest.raises(InvalidArgument, match="image_size=64: only image folders can be resized"):
        data.load("fashion-mnist-small", image_size=64)
    with pytest.raises(InvalidArgument, match="image_size=0: expected at least 1"):
        data.load("imagenet", ".", image_size=0)


def test_import_needs_torch_and_numpy_only():
    code = "import sys, clicktrain.data; print(sorted({'torchvision', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
