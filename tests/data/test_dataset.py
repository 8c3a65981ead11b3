"""Splits in memory, subsets, validation and fingerprints."""

import itertools

import pytest
import torch

from clicktrain.data import ArraySplit, DataSet
from clicktrain.data.splits import balanced_subset
from clicktrain.errors import InvalidArgument


def numbered_split(labels):
    """Every image shows its own index in all pixels."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return ArraySplit(images.contiguous(), torch.tensor(labels))


def small_set(labels=(0, 1, 2) * 20):
    split = numbered_split(labels)
    return DataSet("small", ("a", "b", "c"), split, numbered_split((0, 1, 2)), (0.5,), (0.5,))


def shown(split):
    return split.images[:, 0, 0, 0].tolist()


def test_balanced_subset_takes_the_first_of_each_class():
    labels = torch.tensor([2, 2, 0, 1, 0, 2, 1, 0])
    assert balanced_subset(labels, 3).tolist() == [0, 2, 3]
    assert balanced_subset(labels, 6).tolist() == [0, 1, 2, 3, 4, 6]
    assert balanced_subset(labels, 8).tolist() == list(range(8))


def test_balanced_subset_gives_lower_classes_one_more_and_fills_up():
    assert balanced_subset(torch.tensor([2, 1, 0, 2, 1, 0]), 4).tolist() == [0, 1, 2, 5]
    assert balanced_subset(torch.tensor([0, 1, 1, 1, 1]), 4).tolist() == [0, 1, 2, 3]


def test_smaller_subsets_are_contained_in_larger_ones():
    labels = torch.randint(0, 7, (100,), generator=torch.Generator().manual_seed(0))
    chosen = [set(balanced_subset(labels, count).tolist()) for count in range(1, 101)]
    assert all(len(c) == n for n, c in enumerate(chosen, 1))
    assert all(a < b for a, b in itertools.pairwise(chosen))


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_subset_is_named(count):
    with pytest.raises(InvalidArgument, match=f"train_limit={count}: expected 1 to 8"):
        balanced_subset(torch.zeros(8, dtype=torch.int64), count)


def test_validation_is_balanced_disjoint_and_complete():
    dataset = small_set()
    train, validation = dataset.split_validation(0.25)
    assert validation.labels.bincount().tolist() == [5, 5, 5]
    assert train.labels.bincount().tolist() == [15, 15, 15]
    assert sorted(shown(train) + shown(validation)) == list(range(60))
    assert shown(train) == sorted(shown(train))
    assert torch.equal(validation.labels, torch.tensor([n % 3 for n in shown(validation)]))


def test_validation_depends_on_its_seed_only():
    dataset = small_set()
    torch.manual_seed(1)
    first = shown(dataset.split_validation(0.25)[1])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert shown(dataset.split_validation(0.25, seed=0)[1]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert shown(dataset.split_validation(0.25, seed=1)[1]) != first


def test_validation_keeps_the_proportions_of_unequal_classes():
    _, validation = small_set((0,) * 40 + (1,) * 20).split_validation(0.1)
    assert validation.labels.bincount().tolist() == [4, 2]


@pytest.mark.parametrize("fraction", [-0.1, 0, 1, 1.5, float("nan")])
def test_validation_fraction_outside_is_named(fraction):
    with pytest.raises(InvalidArgument, match=f"fraction={fraction}: expected more than 0"):
        small_set().split_validation(fraction)


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 0), (0.999, 60)])
def test_validation_that_empties_a_split_is_refused(fraction, count):
    with pytest.raises(InvalidArgument, match=f"would hold out {count} of the 60"):
        small_set().split_validation(fraction)


def test_fingerprint_sees_every_pixel_and_label():
    expected = small_set().fingerprint
    assert len(expected) == 64
    assert small_set().fingerprint == expected
    dataset = small_set()
    dataset.train.images[59, 0, 1, 1] += 1
    assert dataset.fingerprint != expected
    assert small_set((1, 0, 2, *(0, 1, 2) * 19)).fingerprint != expected
    dataset = small_set()
    dataset.test.images[0] += 1
    assert dataset.fingerprint != expected


def test_fingerprint_sees_the_shape():
    images = torch.arange(32, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    fingerprints = set()
    for shape in ((2, 1, 4, 4), (2, 4, 2, 2), (2, 1, 2, 8)):
        split = ArraySplit(images.view(shape), labels)
        fingerprints.add(DataSet("s", ("a",), split, split, (0.5,), (0.5,)).fingerprint)
    assert len(fingerprints) == 3


def test_wrong_tensors_are_named():
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match=r"images are torch.float32 \(4, 1, 2, 2\): expected torch.uint8"):
        ArraySplit(images.float(), labels)
    with pytest.raises(InvalidArgument, match=r"images are torch.uint8 \(4, 2, 2\)"):
        ArraySplit(images[:, 0], labels)
    with pytest.raises(InvalidArgument, match=r"labels are torch.int64 \(3,\): expected torch.int64 \(4,\)"):
        ArraySplit(images, labels[:3])
    with pytest.raises(InvalidArgument, match=r"labels are torch.int32 \(4,\)"):
        ArraySplit(images, labels.int())
