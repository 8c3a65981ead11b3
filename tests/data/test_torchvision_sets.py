"""torchvision's layouts, on tiny files generated in them; never a network."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import torch

from clicktrain import data
from clicktrain._torchvision import load_torchvision
from clicktrain.data import torchvision_sets
from clicktrain.errors import DataError, InvalidArgument
from tests.helpers.idx import idx_bytes

TRAIN, TEST = 20, 10


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Make torchvision fail at once where it would download."""
    from urllib.error import URLError

    def refuse(*_args, **_kwargs):
        raise URLError("no network\nin this test")

    module = load_torchvision().datasets
    for user in (module.mnist, module.cifar):
        monkeypatch.setattr(user, "download_and_extract_archive", refuse)


@pytest.fixture(autouse=True)
def tiny_counts(monkeypatch):
    for name, source in torchvision_sets.SOURCES.items():
        tiny = dataclasses.replace(source, train_count=TRAIN, test_count=TEST)
        monkeypatch.setitem(torchvision_sets.SOURCES, name, tiny)


def write_idx(path, array):
    path.write_bytes(idx_bytes(array))


@pytest.fixture
def fashion_mnist(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def write_cifar(root, monkeypatch, name, lists, label_key, names_key, num_classes):
    """Write one pickle per split and the class names, and tell torchvision their checksums."""
    dataset = getattr(load_torchvision().datasets, name)
    folder = root / dataset.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for attribute, (file, count) in lists.items():
        labels = [i % num_classes for i in range(count)]
        rows = rng.integers(0, 256, (count, 3072), np.uint8)
        checksum = write(file, {"data": rows, label_key: labels})
        monkeypatch.setattr(dataset, attribute, [[file, checksum]])
    class_names = [f"class {i}" for i in range(num_classes)]
    checksum = write("meta", {names_key: class_names})
    monkeypatch.setattr(dataset, "meta", {"filename": "meta", "key": names_key, "md5": checksum})
    return folder


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    lists = {"train_list": ("data_batch_1", TRAIN), "test_list": ("test_batch", TEST)}
    return write_cifar(tmp_path, monkeypatch, "CIFAR10", lists, "labels", "label_names", 10)


def test_fashion_mnist_is_grey_and_padded(fashion_mnist):
    dataset = data.load("fashion-mnist", fashion_mnist)
    assert dataset.image_shape == (1, 32, 32)
    assert (len(dataset.train), len(dataset.test)) == (TRAIN, TEST)
    assert dataset.classes[9] == "Ankle boot"
    raw = (fashion_mnist / "FashionMNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    assert dataset.train.images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes() == raw
    assert dataset.train.labels.bincount().tolist() == [2] * 10
    assert (dataset.mean, dataset.std) == ((0.2860,), (0.3530,))


def test_cifar10(cifar10):
    dataset = data.load("cifar10", cifar10.parent, train_limit=10)
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.classes == tuple(f"class {i}" for i in range(10))
    rows = pickle.loads((cifar10 / "test_batch").read_bytes())["data"]
    assert torch.equal(dataset.test.images.reshape(TEST, -1), torch.from_numpy(rows))
    assert dataset.test.images.is_contiguous()
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.std == (0.2023, 0.1994, 0.2010)


def test_cifar100(tmp_path, monkeypatch):
    lists = {"train_list": ("train", TRAIN), "test_list": ("test", TEST)}
    write_cifar(tmp_path, monkeypatch, "CIFAR100", lists, "fine_labels", "fine_label_names", 100)
    dataset = data.load("cifar100", tmp_path)
    assert dataset.num_classes == 100
    assert dataset.train.labels.tolist() == list(range(TRAIN))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_missing_files_give_one_line_with_the_place(tmp_path, name):
    with pytest.raises(DataError, match="missing or damaged, and could not be read or downloaded") as error:
        data.load(name, tmp_path)
    assert str(tmp_path / torchvision_sets.SOURCES[name].layout) in str(error.value)
    assert "no network in this test" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_missing_root_is_refused_before_any_download(tmp_path, name):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        data.load(name, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InvalidArgument, match=f"'{name}' is read from disk: root"):
        data.load(name)


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_truncated_idx_file_is_refused(fashion_mnist, kept):
    file = fashion_mnist / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match="missing or damaged") as error:
        data.load("fashion-mnist", fashion_mnist)
    assert "\n" not in str(error.value)


def test_wrong_number_of_images_is_named(fashion_mnist):
    write_idx(fashion_mnist / "FashionMNIST/raw/train-labels-idx1-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(DataError, match=r"labels \(7,\), expected \(20, 28, 28\) and \(20,\)"):
        data.load("fashion-mnist", fashion_mnist)


def test_wrong_image_size_is_named(fashion_mnist):
    write_idx(fashion_mnist / "FashionMNIST/raw/t10k-images-idx3-ubyte", np.zeros((TEST, 30, 28), np.uint8))
    with pytest.raises(DataError, match=r"test images have shape \(10, 30, 28\)"):
        data.load("fashion-mnist", fashion_mnist)


def test_impossible_label_is_named(fashion_mnist):
    write_idx(fashion_mnist / "FashionMNIST/raw/train-labels-idx1-ubyte", np.full(TRAIN, 10, np.uint8))
    with pytest.raises(DataError, match=r"labels outside 0 \.\. 9"):
        data.load("fashion-mnist", fashion_mnist)


def test_damaged_cifar_file_is_refused(cifar10):
    file = cifar10 / "data_batch_1"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cifar-10-batches-py: missing or damaged"):
        data.load("cifar10", cifar10.parent)
