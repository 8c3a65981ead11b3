"""The released configurations as data: every row, the leftovers replaced, addresses, ratios by layer."""

from __future__ import annotations

import pytest

from clicktrain import models, official
from clicktrain.errors import ConfigError
from clicktrain.official import OFFICIAL, ROWS, Reported, by_layer, resolve
from clicktrain.selection import prunable_layers

RN32_86 = [55] * 3 + [65] * 4 + [65] + [75] * 4 + [75] * 3
RN32_139 = [65] * 3 + [75] * 4 + [75] + [85] * 4 + [85] * 3
RN50_835 = [55] * 3 + [65] * 3 + [75] + [75] + [80] * 2 + [85] * 3 + [85] * 3
RN50_ACTIVE = [65] * 2 + [75] + [75] * 2 + [80] * 2 + [80] + [85] * 2 + [90] * 3 + [90] * 3
IMAGENET = [25] * 3 + [25] * 3 + [35] + [35] * 2 + [45] * 4 + [55] * 3

# address: ratios, lambda, t_c, t_h
EXPECTED = {
    "cifar10_vgg11@5.85x": ([35, 45, 45, 55, 55, 65, 75], 0.00025, 65, 143),
    "cifar10_vgg11@8.7x": ([45, 55, 55, 65, 65, 85, 85], 0.00035, 65, 143),
    "cifar10_vgg11@10.3x": ([35, 45, 65, 75, 80, 80, 85], 0.00035, 65, 143),
    "cifar10_vgg11@11.5x": ([45, 65, 66, 75, 78, 85, 88], 0.00025, 65, 143),
    "cifar10_vgg13@4x": ([16, 26, 35, 35, 36, 45, 46, 46, 46], 0.00065, 64, 149),
    "cifar10_vgg13@6.2x": ([25, 45, 55, 55, 55, 65, 65, 65, 65], 0.00075, 60, 148),
    "cifar10_vgg13@9.0x": ([40, 50, 55, 60, 65, 70, 75, 75, 85], 0.00065, 60, 148),
    "cifar10_vgg16@commented": ([35, 45, 45, 45, 45, 45, 45, 55, 55, 65, 75, 75], 0.00015, 150, 163),
    "cifar10_vgg16@active": ([35, 45, 55, 55, 55, 65, 65, 65, 75, 80, 85, 85], 0.00015, 150, 163),
    "cifar10_resnet32@13.9x": (RN32_139, 0.00025, 61, 141),
    "cifar10_resnet32@8.6x": (RN32_86, 0.00025, 61, 141),
    "cifar10_resnet50@8.35x": (RN50_835, 0.00025, 61, 141),
    "cifar10_resnet50@active": (RN50_ACTIVE, 0.00025, 61, 141),
    "cifar100_vgg11@5.85x": ([35, 45, 45, 55, 55, 65, 75], 0.00085, 65, 143),
    "cifar100_vgg11@7.9x": ([45, 55, 55, 65, 65, 75, 85], 0.0012, 65, 143),
    "cifar100_vgg11@8.4x": ([40, 55, 60, 65, 70, 75, 85], 0.00075, 65, 143),
    "cifar100_vgg11@10.3x": ([45, 55, 65, 75, 75, 80, 88], 0.0012, 65, 143),
    "cifar100_vgg13@4.3x": ([15, 30, 35, 35, 40, 45, 45, 50, 55], 0.00085, 60, 146),
    "cifar100_vgg13@6.2x": ([25, 45, 55, 55, 55, 65, 65, 65, 65], 0.00025, 60, 148),
    "cifar100_vgg13@8.5x": ([35, 55, 65, 65, 65, 75, 75, 75, 75], 0.00075, 60, 146),
    "cifar100_vgg16@commented": ([35, 45, 45, 45, 45, 45, 45, 55, 55, 65, 75, 75], 0.0008, 54, 149),
    "cifar100_vgg16@active": ([35, 45, 55, 55, 55, 65, 65, 65, 75, 80, 85, 85], 0.0008, 54, 149),
    "imagenet_resnet50@active": (IMAGENET, 0.00025, 35, 78),
}
ACTIVE = {
    "cifar10_vgg11": "10.3x",
    "cifar10_vgg13": "9.0x",
    "cifar10_vgg16": "active",
    "cifar10_resnet32": "8.6x",
    "cifar10_resnet50": "active",
    "cifar100_vgg11": "8.4x",
    "cifar100_vgg13": "4.3x",
    "cifar100_vgg16": "active",
    "imagenet_resnet50": "active",
}


def test_every_row_is_there_once() -> None:
    assert sorted(f"{row.name}@{row.row}" for row in ROWS) == sorted(EXPECTED)


@pytest.mark.parametrize("address", EXPECTED)
def test_rows_hold_the_published_settings(address: str) -> None:
    row = resolve(f"official:{address}")
    ratios, lam, select_at, prune_at = EXPECTED[address]
    assert list(row.ratios) == ratios
    assert (row.lam, row.stages.select_at, row.stages.prune_at) == (lam, select_at, prune_at)
    assert row.address == f"official:{address}"


@pytest.mark.parametrize("name", ACTIVE)
def test_a_name_without_row_is_the_active_one(name: str) -> None:
    assert resolve(f"official:{name}").row == ACTIVE[name]
    assert resolve(name) is resolve(f"official:{name}@active") is OFFICIAL[name]
    assert set(OFFICIAL) == set(ACTIVE)


def test_settings_common_to_the_cifar_configurations() -> None:
    for row in ROWS:
        assert (row.lr, row.momentum, row.weight_decay, row.mixup_alpha) == (0.1, 0.9, 5e-4, 0.3)
        if row.dataset != "imagenet":
            milestones = (55, 130) if "resnet" in row.model else (55, 131)
            assert (row.stages.epochs, row.batch_size, row.milestones) == (190, 128, milestones)


def test_imagenet_has_its_own_schedule() -> None:
    row = OFFICIAL["imagenet_resnet50"]
    assert (row.stages.epochs, row.batch_size, row.milestones) == (95, 256, (31, 61, 75))
    assert (row.dataset, row.model) == ("imagenet", "imagenet_resnet50")


def test_pool_sizes_and_mixup_delay() -> None:
    assert {row.name for row in ROWS if row.patterns != 4} == {"cifar10_vgg16"}
    assert OFFICIAL["cifar10_vgg16"].patterns == 12
    assert {row.name: row.mixup_from_batch for row in ROWS if row.mixup_from_batch} == {
        "cifar10_vgg13": 5,
        "cifar100_vgg13": 5,
    }


def test_lambda_is_that_of_the_best_reported_run() -> None:
    for row in ROWS:
        if row.reported and row is not OFFICIAL[row.name]:
            best = max(row.reported, key=lambda run: run.top1)
            assert (best.lam, best.select_at, best.prune_at) == (row.lam, row.stages.select_at, row.stages.prune_at)


def test_reported_accuracies() -> None:
    assert resolve("cifar10_vgg13").reported == (
        Reported(0.00045, 93.27, 60, 148),
        Reported(0.00055, 93.31, 60, 148),
        Reported(0.00065, 93.52, 60, 148),
        Reported(0.00075, 93.19, 60, 148),
    )
    assert Reported(0.00075, 93.68, 60, 148) in resolve("cifar10_vgg13@4x").reported
    assert Reported(0.00075, 71.9, 60, 152) in resolve("cifar100_vgg13@8.5x").reported
    assert sum(len(row.reported) for row in ROWS) == 41
    blank = {row.name for row in ROWS if not row.reported}
    assert blank == {
        "cifar10_vgg16",
        "cifar10_resnet32",
        "cifar10_resnet50",
        "cifar100_vgg13",
        "cifar100_vgg16",
        "imagenet_resnet50",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("official:cifar10_vgg12", r"no official configuration 'cifar10_vgg12' \(did you mean cifar10_vgg1\d\?\)"),
        ("official:", "no official configuration ''; known: cifar10_vgg11, cifar10_vgg13"),
        ("official:cifar10_vgg13@7x", r"official:cifar10_vgg13 has no row '7x'; known: 9.0x, 4x, 6.2x"),
    ],
)
def test_unknown_addresses_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(text)


@pytest.mark.parametrize("name", ACTIVE)
def test_ratios_fit_the_network(name: str) -> None:
    row = OFFICIAL[name]
    model = models.create(row.model, 10, width=1.0 if "imagenet" in name else 0.125)
    ratios = by_layer(row.ratios, prunable_layers(model, (3, 32, 32)))
    convs = {"vgg11": 7, "vgg13": 9, "vgg16": 12, "resnet32": 30, "resnet50": 48, "imagenet_resnet50": 48}
    assert len(ratios) == convs[row.model]
    assert not any("shortcut" in layer or "downsample" in layer for layer in ratios)


def test_ratios_of_a_block_hold_for_all_its_convolutions() -> None:
    row = resolve("cifar10_resnet50")
    model = models.create("resnet50", 10, width=0.125)
    ratios = by_layer(row.ratios, prunable_layers(model, (3, 32, 32)))
    expected = {"layer1.1": 65, "layer1.2": 75, "layer2.2": 80, "layer3.0": 80, "layer3.2": 85, "layer3.3": 90}
    for block, ratio in expected.items():
        assert [ratios[f"{block}.conv{i}"] for i in (1, 2, 3)] == [ratio] * 3


def test_ratios_by_layer_keep_the_order_of_the_layers() -> None:
    layers = ["features.3", "features.7", "features.10"]
    assert by_layer([30, 10, 20], layers) == {"features.3": 30, "features.7": 10, "features.10": 20}


def test_one_value_a_layer_goes_before_one_value_a_block() -> None:
    assert official.by_layer([1, 2], ["layer1.0.conv1", "layer1.0.conv2"]) == {
        "layer1.0.conv1": 1,
        "layer1.0.conv2": 2,
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["features.3", "features.7"], r"ratios: expected 2 values \(one a prunable convolution\), got 3"),
        (
            ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"],
            r"ratios: expected 4 values \(one a prunable convolution\) or 2 \(one a residual block\), got 3",
        ),
    ],
)
def test_wrong_number_of_ratios_is_refused(layers: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_layer([10, 20, 30], layers)
