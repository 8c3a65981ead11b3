"""Selection over a whole model."""

import pytest
import torch
from torch import nn

from clicktrain import models
from clicktrain.errors import InvalidArgument
from clicktrain.flops import compression, conv_macs, layer_costs
from clicktrain.patterns import official_pool
from clicktrain.selection import Sparsity, prunable_layers, select

SHAPE = (3, 32, 32)


def scored(name="vgg11", width=0.125):
    torch.manual_seed(0)
    model = models.create(name, 10, width=width)
    scores = {n: conv.weight.detach() ** 2 for n, conv in prunable_layers(model, SHAPE).items()}
    return model, layer_costs(model, SHAPE), scores


def test_first_convolution_and_shortcuts_are_spared():
    _, costs, scores = scored("resnet32")
    spared = {cost.name for cost in costs if cost.kind == "conv"} - set(scores)
    assert len(spared) == 4
    assert sum("shortcut" in name for name in spared) == 3
    assert len(scores) == 30


@pytest.mark.parametrize("name", ["vgg11", "resnet32", "resnet50"])
def test_a_target_compression_is_met(name):
    _, costs, scores = scored(name)
    target = 4.0 if name != "resnet50" else 3.0
    chosen = select(scores, costs, Sparsity(target_compression=target))
    kept = {n: layer.kept.kept_weights for n, layer in chosen.items()}
    assert target <= compression(costs, kept) < target * 1.001


def test_target_flops_is_met():
    _, costs, scores = scored()
    chosen = select(scores, costs, Sparsity(target_flops=4.0))
    macs = conv_macs(costs, {n: layer.kept.kept_weights for n, layer in chosen.items()})
    assert 4.0 <= macs["dense"] / macs["sparse"] < 4.02


def test_ratios_are_met_exactly():
    _, costs, scores = scored()
    ratios = (35, 45, 45, 55, 55, 65, 75)
    chosen = select(scores, costs, Sparsity(ratios=ratios))
    for ratio, (name, layer) in zip(ratios, chosen.items(), strict=True):
        kernels = scores[name].shape[0] * scores[name].shape[1]
        assert kernels - layer.kept.kept_kernels == -(-ratio * kernels // 100)


def test_removed_kernels_keep_the_pattern_that_the_penalty_needs():
    _, costs, scores = scored()
    for layer in select(scores, costs, Sparsity(target_compression=6.0)).values():
        kept = layer.kept.index != 255
        assert torch.equal(layer.kept.index[kept], layer.patterns.index[kept])
        assert layer.patterns.kept_kernels == kept.numel()


def test_pointwise_layers_lose_kernels_only():
    _, costs, scores = scored("resnet50")
    for name, layer in select(scores, costs, Sparsity(target_compression=3.0)).items():
        assert layer.kept.pool.entries == (4 if scores[name].shape[-1] == 3 else 1)


@pytest.mark.parametrize("pool", ["coverage", "frequency", "official", official_pool(12, "comment")])
def test_every_kind_of_pool(pool):
    _, costs, scores = scored()
    chosen = select(scores, costs, Sparsity(target_compression=5.0, pool=pool, patterns=8))
    pools = {layer.kept.pool for layer in chosen.values()}
    assert len(pools) == 1
    assert len(pools.pop()) == (12 if not isinstance(pool, str) else 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "none given"),
        ({"target_compression": 4, "ratios": (1,)}, "target_compression and ratios given"),
        ({"target_compression": 4, "pool": "typo"}, "pool='typo'"),
        ({"target_compression": 4, "pool": "official", "patterns": 5}, "size=5"),
        ({"target_compression": 4, "rank_by": "typo"}, "rank_by='typo'"),
        ({"target_compression": -1}, "target_compression=-1"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(InvalidArgument, match=text):
        Sparsity(**options)


@pytest.mark.parametrize("target", [0.5, 1000.0])
def test_impossible_targets_name_the_feasible_interval(target):
    _, costs, scores = scored()
    with pytest.raises(InvalidArgument, match=rf"target_compression={target}: feasible are 2\.2"):
        select(scores, costs, Sparsity(target_compression=target))


def test_models_that_cannot_be_pruned_are_refused():
    grouped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(InvalidArgument, match="1 has groups=2"):
        prunable_layers(grouped, SHAPE)
    with pytest.raises(InvalidArgument, match="no convolution to prune"):
        prunable_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), SHAPE)
