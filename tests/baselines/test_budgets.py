"""Budgets of single weights: exact counts, and the published FLOPs of Erdos-Renyi kernel densities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.budgets import erk_densities, largest, largest_everywhere, layer_counts, total_budget
from clicktrain import models
from clicktrain.errors import InvalidArgument
from clicktrain.flops import LayerCost, layer_costs
from tests.helpers.toy import CLASSES, ToyNet

SHAPES = st.lists(st.tuples(*[st.integers(1, 6)] * 4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, share=st.floats(0, 1), distribution=st.sampled_from(["uniform", "erk"]))
def test_counts_add_up_and_leave_no_layer_empty(shapes: list[tuple[int, ...]], share: float, distribution: str) -> None:
    named = {str(number): shape for number, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    total = len(sizes) + round(share * (sum(sizes.values()) - len(sizes)))
    counts = layer_counts(named, total, distribution)  # type: ignore[arg-type]
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)


def test_uniform_counts_are_in_proportion() -> None:
    assert layer_counts({"a": (8, 5, 1, 1), "b": (8, 5, 2, 1)}, 30, "uniform") == {"a": 10, "b": 20}


def test_small_layers_are_denser_under_erk() -> None:
    shapes = {"small": (8, 8, 3, 3), "large": (64, 64, 3, 3)}
    densities = erk_densities(shapes, 0.1)
    assert densities["small"] / densities["large"] == pytest.approx((22 / 576) / (134 / 36864))
    kept = sum(densities[name] * math.prod(shape) for name, shape in shapes.items())
    assert kept == pytest.approx(0.1 * (576 + 36864))
    capped = erk_densities(shapes, 0.5)
    assert capped["small"] == 1
    assert capped["large"] == pytest.approx((0.5 * (576 + 36864) - 576) / 36864)


def test_equal_scores_are_settled_by_index() -> None:
    assert largest(torch.ones(2, 3), 4).tolist() == [[True, True, True], [True, False, False]]
    masks = largest_everywhere({"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 3.0, 2.0])}, 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [True, True], "b": [False, True, False]}


def test_the_largest_of_each_layer_stays_however_small() -> None:
    masks = largest_everywhere({"a": torch.arange(9.0) + 100, "b": torch.tensor([1.0, 2.0])}, 4)
    assert masks["b"].tolist() == [False, True]
    assert masks["a"].sum() == 3


@pytest.mark.parametrize("target", [0.9, 200.0, float("inf"), float("nan")])
def test_a_budget_that_cannot_be_met_names_the_feasible_ones(target: float) -> None:
    model = ToyNet(CLASSES)
    layers = {name: model.get_submodule(name).weight for name in ("3", "7")}
    with pytest.raises(InvalidArgument, match=f"target_compression={target}: feasible are 1 to 18.*"):
        total_budget(layer_costs(model, (1, 8, 8)), layers, target)


@pytest.fixture(scope="module")
def resnet50() -> list[LayerCost]:
    """Return the layers with weights of torchvision's ResNet-50, for images of 224 x 224."""
    costs = layer_costs(models.create("imagenet_resnet50", 1000, input_size=224), (3, 224, 224))
    return [cost for cost in costs if cost.macs]


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = models.create("imagenet_resnet50", 1000, input_size=224)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }


@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.42), (0.9, 0.24)])
def test_erk_costs_what_rigl_reports(
    resnet50: list[LayerCost], shapes: dict[str, tuple[int, ...]], sparsity: float, published: float
) -> None:
    """README of google-research/rigl, ResNet-50: every layer is sparse."""
    densities = erk_densities(shapes, 1 - sparsity)
    used = sum(densities[cost.name] * cost.macs for cost in resnet50)
    assert used / sum(cost.macs for cost in resnet50) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.23), (0.9, 0.13)])
def test_uniform_costs_what_rigl_reports(
    resnet50: list[LayerCost], shapes: dict[str, tuple[int, ...]], sparsity: float, published: float
) -> None:
    """README of google-research/rigl, ResNet-50: the first layer stays dense."""
    sparse = {name: shape for name, shape in shapes.items() if name != "conv1"}
    total = round((1 - sparsity) * sum(map(math.prod, sparse.values())))
    kept = layer_counts(sparse, total, "uniform") | {"conv1": math.prod(shapes["conv1"])}
    used = sum(cost.macs * kept[cost.name] / cost.weights for cost in resnet50)
    assert used / sum(cost.macs for cost in resnet50) == pytest.approx(published, abs=0.01)
