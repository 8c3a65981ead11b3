"""Batches: complete, normalised, and functions of (seed, epoch, batch index) only."""

import itertools

import pytest
import torch

from clicktrain import data
from clicktrain.data import ArraySplit, Loader
from clicktrain.errors import InvalidArgument

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_split(count=50, channels=3, side=12):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return ArraySplit(images, torch.arange(count) % 10)


def train_loader(split=None, batch_size=8, **options):
    split = split or random_split()
    return Loader(split, batch_size, train=True, mean=MEAN, std=STD, augment="crop-flip", **options)


def equal(first, second):
    pairs = itertools.zip_longest(first, second)
    return all(a and b and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_evaluation_gives_every_image_in_order_normalised():
    split = random_split()
    loader = Loader(split, 16, train=False, mean=MEAN, std=STD, augment="crop-flip")
    batches = list(loader)
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]
    assert len(loader) == 4
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32
    expected = (split.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)


def test_training_visits_every_image_once_in_another_order_each_epoch():
    split = ArraySplit(torch.zeros(50, 3, 4, 4, dtype=torch.uint8), torch.arange(50))
    loader = train_loader(split)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        orders.append(torch.cat([y for _, y in loader]).tolist())
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(50))


def test_labels_stay_with_their_images():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 12, 12).contiguous()
    loader = Loader(ArraySplit(images, torch.arange(50)), 7, train=True, mean=(0.0,), std=(1.0,), augment="crop-flip")
    for x, y in loader:
        assert torch.equal((x[:, 0, 6, 6] * 255).round().long(), y)


def test_cropped_in_borders_are_black_before_normalisation():
    split = ArraySplit(torch.full((40, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    x = torch.cat([x for x, _ in train_loader(split)])
    for channel in range(3):
        black = -MEAN[channel] / STD[channel]
        white = (1 - MEAN[channel]) / STD[channel]
        values = x[:, channel].unique()
        torch.testing.assert_close(values, torch.tensor([black, white]), rtol=1e-5, atol=1e-5)


def test_iterating_twice_gives_equal_batches():
    loader = train_loader()
    assert equal(list(loader), list(loader))


def test_starting_in_the_middle_gives_the_same_batches():
    loader = train_loader()
    loader.set_epoch(3)
    whole = list(loader)
    for start in range(len(loader) + 1):
        assert equal(whole[start:], list(train_epoch_three().batches(start)))


def train_epoch_three():
    loader = train_loader()
    loader.set_epoch(3)
    return loader


def test_batches_do_not_depend_on_what_ran_before():
    used = train_loader()
    for epoch in (5, 1, 7):
        used.set_epoch(epoch)
        next(iter(used))
    used.set_epoch(3)
    assert equal(list(used), list(train_epoch_three()))


def test_interleaved_iterations_are_independent():
    loader = train_loader()
    expected = list(loader)
    first, second = iter(loader), iter(loader)
    mixed = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert equal(mixed[0::2], expected)
    assert equal(mixed[1::2], expected)


def test_an_iteration_keeps_the_epoch_it_was_started_in():
    loader = train_loader()
    expected = list(loader)
    iterator = iter(loader)
    loader.set_epoch(1)
    assert equal(list(iterator), expected)


def test_seed_and_epoch_change_order_and_augmentation():
    split = ArraySplit(random_split().images, torch.arange(50))
    base, reseeded, later = train_loader(split), train_loader(split, seed=1), train_loader(split)
    later.set_epoch(1)
    by_label = [dict(zip(y.tolist(), x, strict=True)) for x, y in map(whole_epoch, (base, reseeded, later))]
    for other in by_label[1:]:
        assert list(other) != list(by_label[0])
        same = sum(torch.equal(by_label[0][label], other[label]) for label in range(50))
        assert same < 10


def test_every_batch_of_every_epoch_and_seed_is_augmented_anew():
    """With equal images only the augmentation can tell batches apart."""
    image = random_split().images[:1]
    split = ArraySplit(image.expand(24, -1, -1, -1).contiguous(), torch.zeros(24, dtype=torch.int64))
    seen = set()
    for seed, epoch in itertools.product(range(2), range(2)):
        loader = train_loader(split, seed=seed)
        loader.set_epoch(epoch)
        seen |= {x.numpy().tobytes() for x, _ in loader}
    assert len(seen) == 2 * 2 * 3


def whole_epoch(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_the_order_does_not_depend_on_augmentation():
    plain = Loader(random_split(), 8, train=True, mean=MEAN, std=STD)
    assert torch.equal(whole_epoch(plain)[1], whole_epoch(train_loader())[1])


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(train_loader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert equal(first, list(train_loader()))


def test_batches_can_be_changed_without_changing_the_split():
    split = random_split()
    before = split.images.clone()
    loader = Loader(split, 50, train=False, mean=MEAN, std=STD)
    (x, y) = next(iter(loader))
    x.zero_()
    y.zero_()
    assert torch.equal(split.images, before)
    assert int(split.labels.max()) == 9


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches():
    on_gpu = list(train_loader(device="cuda"))
    assert all(x.is_cuda and y.is_cuda for x, y in on_gpu)
    assert equal([(x.cpu(), y.cpu()) for x, y in on_gpu], list(train_loader()))


def test_drop_last():
    loader = train_loader(drop_last=True)
    assert len(loader) == 6
    assert [len(y) for _, y in loader] == [8] * 6


def test_embedded_images_through_the_loader():
    small = data.load("fashion-mnist-small", train_limit=100)
    loader = Loader(small.train, 64, train=True, mean=small.mean, std=small.std, augment=small.augmentation)
    assert [tuple(x.shape) for x, _ in loader] == [(64, 1, 32, 32), (36, 1, 32, 32)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "batch_size=51: the training split holds only 50 images"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"augment": "mixup"}, "augment='mixup': expected 'none' or 'crop-flip'"),
        ({"mean": (0.5,)}, r"mean=\(0.5,\): expected 3 values"),
        ({"std": (0.5,)}, r"std=\(0.5,\): expected 3 values"),
        ({"std": (0.5, 0.0, 0.5)}, "expected positive values"),
    ],
)
def test_bad_options_are_named(options, message):
    usable = {"batch_size": 8, "mean": MEAN, "std": STD, "augment": "none"}
    with pytest.raises(InvalidArgument, match=message):
        Loader(random_split(), train=True, **{**usable, **options})


def test_evaluation_may_use_one_short_batch():
    loader = Loader(random_split(), 1000, train=False, mean=MEAN, std=STD)
    assert [len(y) for _, y in loader] == [50]


@pytest.mark.parametrize("start", [-1, 8])
def test_start_outside_the_epoch_is_named(start):
    with pytest.raises(InvalidArgument, match=f"start={start}: expected 0 to 7"):
        train_loader().batches(start)
