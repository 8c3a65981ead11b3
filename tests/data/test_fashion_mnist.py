"""The embedded part of Fashion-MNIST: what it holds, and that it can be rebuilt bit for bit."""

import bz2
import gzip
import subprocess
import sys

import numpy as np
import pytest
import torch

from clicktrain import data
from clicktrain.data import build_fashion_mnist_small as script
from clicktrain.data import fashion_mnist
from clicktrain.errors import DataError
from tests.helpers.idx import idx_bytes


def write_idx(path, array):
    path.write_bytes(gzip.compress(idx_bytes(array), compresslevel=1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The embedded images as if they were the original files: the script takes all of them."""
    folder = tmp_path_factory.mktemp("idx")
    arrays = fashion_mnist.decode()
    write_idx(folder / "train-images-idx3-ubyte.gz", arrays.train_images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", arrays.train_labels)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", arrays.test_images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", arrays.test_labels)
    return folder


@pytest.fixture(scope="module")
def embedded():
    return data.load("fashion-mnist-small")


def test_classes_are_balanced(embedded):
    assert embedded.num_classes == 10
    assert embedded.train.labels.bincount().tolist() == [1000] * 10
    assert embedded.test.labels.bincount().tolist() == [500] * 10
    assert embedded.image_shape == (1, 32, 32)


def test_images_are_padded_with_zeros(embedded):
    arrays = fashion_mnist.decode()
    images = embedded.train.images[:, 0]
    assert torch.equal(images[:, 2:30, 2:30], torch.from_numpy(arrays.train_images))
    assert images.sum() == images[:, 2:30, 2:30].sum()


def test_normalisation_fits_the_images():
    pixels = fashion_mnist.decode().train_images / 255
    assert pixels.mean() == pytest.approx(fashion_mnist.MEAN[0], abs=2e-3)
    assert pixels.std() == pytest.approx(fashion_mnist.STD[0], abs=2e-3)


def test_file_is_small_and_licensed():
    assert fashion_mnist.EMBEDDED_FILE.stat().st_size <= 7e6
    licence = fashion_mnist.EMBEDDED_FILE.with_name("LICENSE-fashion-mnist").read_text()
    assert "MIT License" in licence
    assert "Zalando" in licence


def test_script_rebuilds_the_file_bit_for_bit(source, tmp_path):
    out = tmp_path / "rebuilt.bz2"
    command = [sys.executable, "-m", "clicktrain.data.build_fashion_mnist_small", str(source), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == fashion_mnist.EMBEDDED_FILE.read_bytes()


def test_first_images_of_each_class_are_taken_from_larger_files(tmp_path, source):
    """More images behind those that are taken change nothing."""
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        array = script.read_idx(source / name)
        write_idx(tmp_path / name, np.concatenate([array, array[:777]]))
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).symlink_to(source / name)
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "encode", lambda content: encoded.append(content) or b"")
        script.build(tmp_path, tmp_path / "out")
    assert encoded == [fashion_mnist.decode().content()]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "train-labels-idx1-ubyte.gz: cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"\x00\x00\x0d\x01")), "is not an idx file"),
        (lambda path: path.write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09ab")), "holds 2 bytes"),
        (lambda path: write_idx(path, np.zeros(7, np.uint8)), r"labels \(7,\)"),
        (lambda path: write_idx(path, np.arange(10_000, dtype=np.uint8) % 10), "holds other data"),
    ],
)
def test_script_refuses_other_originals(source, tmp_path, capsys, damage, message):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / "train-labels-idx1-ubyte.gz")
    out = tmp_path / "out.bz2"
    assert script.main([str(tmp_path), str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    with pytest.raises(DataError, match=message):
        script.build(tmp_path, out)
    assert not out.exists()


def test_script_names_an_unwritable_output(source, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "encode", lambda content: content[:9])
    with pytest.raises(DataError, match=r"nowhere/out\.bz2: cannot be written"):
        script.build(source, tmp_path / "nowhere" / "out.bz2")


def test_damaged_embedded_file_is_refused(tmp_path):
    content = fashion_mnist.EMBEDDED_FILE.read_bytes()
    path = tmp_path / "fashion_mnist_small.bz2"
    with pytest.raises(DataError, match=r"fashion_mnist_small\.bz2: cannot be read"):
        fashion_mnist.decode(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"fashion_mnist_small\.bz2: cannot be read"):
        fashion_mnist.decode(path)
    path.write_bytes(bz2.compress(b"something else"))
    with pytest.raises(DataError, match=r"fashion_mnist_small\.bz2: holds other data"):
        fashion_mnist.decode(path)
