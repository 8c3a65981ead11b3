"""Folders of images: in memory where all are of one size, streamed from disk otherwise."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from clicktrain import data
from clicktrain.data import ArraySplit, FolderSplit, Loader, decoding, folders
from clicktrain.data.augment import RESIZED_CROP_DRAWS
from clicktrain.errors import DataError, InvalidArgument
from tests.helpers.image_folders import write_image_folder

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def one_size(tmp_path):
    write_image_folder(tmp_path / "train", CLASSES, 5, lambda _: (10, 8))
    write_image_folder(tmp_path / "test", CLASSES, 2, lambda _: (10, 8))
    return tmp_path


@pytest.fixture
def many_sizes(tmp_path):
    write_image_folder(tmp_path / "train", CLASSES, 6, lambda n: (64 + 3 * n, 90 - 2 * n), ".jpg")
    write_image_folder(tmp_path / "val", CLASSES, 2, lambda n: (70 + n, 64), ".jpg")
    return tmp_path


def load(path, **options):
    return data.load(f"imagefolder:{path}", **options)


def train_loader(dataset, **options):
    return Loader(
        dataset.train, 4, train=True, mean=dataset.mean, std=dataset.std, augment=dataset.augmentation, **options
    )


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_images_of_one_size_are_in_memory_as_they_are(one_size):
    dataset = load(one_size)
    assert isinstance(dataset.train, ArraySplit)
    assert isinstance(dataset.test, ArraySplit)
    assert dataset.classes == CLASSES
    assert dataset.image_shape == (3, 8, 10)
    assert dataset.augmentation == "crop-flip"
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    with Image.open(one_size / "train" / "bee" / "0003.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(dataset.train.images[8], expected)


def test_reading_in_chunks_gives_the_same_images(one_size, monkeypatch):
    whole = load(one_size)
    monkeypatch.setattr(folders, "_CHUNK", 2)
    assert torch.equal(load(one_size).train.images, whole.train.images)


def test_train_limit_reads_only_what_it_keeps(one_size, monkeypatch):
    read = []
    monkeypatch.setattr(folders, "decode", lambda path: read.append(path.name) or decoding.decode(path))
    dataset = load(one_size, train_limit=6)
    assert dataset.train.labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(dataset.train.images, data.load(f"imagefolder:{one_size}").train.images[[0, 1, 5, 6, 10, 11]])
    assert "0004.png" not in read[: 1 + 6 + 6]  # one to see the size, six of each split


def test_grey_images_and_palettes_become_colour(one_size):
    Image.new("L", (10, 8), 77).save(one_size / "train" / "ant" / "0000.png")
    Image.new("P", (10, 8)).save(one_size / "train" / "ant" / "0001.png")
    images = load(one_size).train.images
    assert images.shape == (15, 3, 8, 10)
    assert images[0].unique().tolist() == [77]


def test_image_size_decides_whether_images_stay_as_they_are(tmp_path):
    write_image_folder(tmp_path / "train", CLASSES, 2, lambda _: (16, 16))
    write_image_folder(tmp_path / "test", CLASSES, 2, lambda _: (16, 16))
    assert isinstance(load(tmp_path, image_size=16).train, ArraySplit)
    streamed = load(tmp_path, image_size=24)
    assert isinstance(streamed.train, FolderSplit)
    assert isinstance(streamed.test, FolderSplit)
    assert streamed.image_shape == (3, 24, 24)


@pytest.mark.parametrize("image_size", [10, 8])
def test_images_with_only_one_side_as_asked_for_are_streamed(one_size, image_size):
    assert load(one_size, image_size=image_size).image_shape == (3, image_size, image_size)


def test_too_many_images_for_memory_are_streamed(one_size, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 15 * 3 * 8 * 10 - 1)
    assert isinstance(load(one_size).train, FolderSplit)


def test_a_test_image_of_another_size_streams_both(one_size):
    Image.new("RGB", (9, 8)).save(one_size / "test" / "cat" / "0001.png")
    dataset = load(one_size)
    assert isinstance(dataset.train, FolderSplit)
    assert dataset.image_shape == (3, 224, 224)


def test_images_in_deeper_folders_belong_to_the_class(one_size):
    (one_size / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (10, 8)).save(one_size / "train" / "ant" / "more" / "x.PNG")
    (one_size / "train" / "ant" / ".hidden").write_text("ignored")
    assert load(one_size).train.labels.bincount().tolist() == [6, 5, 5]


def test_streamed_batches(many_sizes):
    dataset = load(many_sizes, image_size=64)
    assert dataset.augmentation == "resized-crop-flip"
    batches = list(train_loader(dataset))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 64, 64)] * 4 + [(2, 3, 64, 64)]
    labels = torch.cat([y for _, y in batches])
    assert labels.bincount().tolist() == [6, 6, 6]
    assert labels.tolist() != sorted(labels.tolist())
    assert all(x.dtype == torch.float32 for x, _ in batches)


def test_streamed_batches_are_functions_of_seed_epoch_and_index(many_sizes):
    dataset = load(many_sizes, image_size=32)
    loader = train_loader(dataset)
    state = torch.get_rng_state()
    expected = list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(list(loader), expected)
    assert equal(list(loader.batches(start=3)), expected[3:])
    loader.set_epoch(1)
    assert not torch.equal(next(iter(loader))[0], expected[0][0])
    assert equal(list(train_loader(dataset, seed=0)), expected)


def test_streamed_batches_do_not_depend_on_the_number_of_threads(many_sizes):
    loader = train_loader(load(many_sizes, image_size=32))
    threads = torch.get_num_threads()
    batches = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            batches.append(list(loader))
    finally:
        torch.set_num_threads(threads)
    assert equal(*batches)


def test_streamed_test_images_show_the_middle(many_sizes):
    """A test image is the centre crop of 224/256 of its shorter side, the same every time."""
    dataset = load(many_sizes, image_size=56)
    loader = Loader(dataset.test, 6, train=False, mean=(0, 0, 0), std=(1, 1, 1))
    x, y = next(iter(loader))
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(many_sizes / "val" / "ant" / "0000.jpg") as image:
        middle = np.asarray(image.convert("RGB").crop((7, 4, 63, 60))).transpose(2, 0, 1)  # 70x64 -> 56x56
    assert torch.equal((x[0] * 255).round().to(torch.uint8), torch.from_numpy(middle.copy()))


def test_random_parts_are_flipped_half_of_the_time(tmp_path):
    """On a left-to-right ramp the direction of brightness tells the flip."""
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    rows = np.random.default_rng(0).random((100, RESIZED_CROP_DRAWS + 1))
    parts = [decoding.random_part(tmp_path / "ramp.png", 16, row) for row in rows]
    falling = [bool(part[0, :, 0].mean() > part[0, :, -1].mean()) for part in parts]
    assert falling == [bool(row[-1] < 0.5) for row in rows]


def test_an_abandoned_iteration_leaves_no_threads(many_sizes):
    before = threading.active_count()
    iterator = iter(train_loader(load(many_sizes, image_size=32)))
    next(iterator)
    del iterator
    assert threading.active_count() == before


def test_validation_of_streamed_images(many_sizes):
    train, validation = load(many_sizes, image_size=32).split_validation(1 / 3)
    assert isinstance(validation, FolderSplit)
    assert validation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not set(train.names) & set(validation.names)
    assert len(train) == 12


def test_streamed_fingerprint_sees_names_and_sizes(many_sizes):
    first = load(many_sizes).fingerprint
    assert load(many_sizes).fingerprint == first
    assert load(many_sizes, train_limit=9).fingerprint != first
    file = many_sizes / "val" / "cat" / "0001.jpg"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert load(many_sizes).fingerprint != first
    file.write_bytes(content)
    file.rename(file.with_name("0002.jpg"))
    assert load(many_sizes).fingerprint != first


def test_imagenet_layout(many_sizes):
    dataset = data.load("imagenet", many_sizes, image_size=48)
    assert dataset.num_classes == 3
    assert dataset.mean == (0.485, 0.456, 0.406)
    (many_sizes / "val").rename(many_sizes / "validation")
    with pytest.raises(DataError, match="val: no such folder"):
        data.load("imagenet", many_sizes)
    with pytest.raises(InvalidArgument, match="'imagenet' is read from disk: root"):
        data.load("imagenet")


def test_path_is_relative_to_root(one_size):
    dataset = data.load(f"imagefolder:{one_size.name}", one_size.parent)
    assert len(dataset.train) == 15


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected a folder 'train' and a folder 'test' or 'val'"):
        load(tmp_path / "nowhere")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="train: no such folder"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: holds no folders"):
        load(tmp_path)


def test_different_classes_are_named(one_size):
    (one_size / "test" / "dog").mkdir()
    with pytest.raises(DataError, match=r"different classes; only one has: \['dog'\]"):
        load(one_size)


def test_empty_class_is_named(one_size):
    for file in (one_size / "test" / "bee").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="bee: holds no images"):
        load(one_size)


def test_other_files_are_named(one_size):
    (one_size / "train" / "bee" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: is no image; expected only \.bmp"):
        load(one_size)


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_truncated_image_in_memory_is_named(one_size, kept):
    file = one_size / "train" / "cat" / "0002.png"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"cat/0002\.png: cannot be read as an image"):
        load(one_size)


def test_truncated_streamed_image_is_named(many_sizes):
    file = many_sizes / "train" / "cat" / "0002.jpg"
    file.write_bytes(file.read_bytes()[:700])
    before = threading.active_count()
    dataset = load(many_sizes, image_size=32)
    with pytest.raises(DataError, match=r"cat/0002\.jpg: cannot be read as an image"):
        list(train_loader(dataset))
    assert threading.active_count() == before


def test_vanished_streamed_image_is_named(many_sizes):
    dataset = load(many_sizes, image_size=32)
    (many_sizes / "train" / "cat" / "0002.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/0002\.jpg: cannot be read"):
        list(train_loader(dataset))


def test_other_augmentation_is_refused(many_sizes):
    dataset = load(many_sizes)
    with pytest.raises(InvalidArgument, match="augment='crop-flip': expected 'none' or 'resized-crop-flip'"):
        Loader(dataset.train, 4, train=True, mean=dataset.mean, std=dataset.std, augment="crop-flip")
