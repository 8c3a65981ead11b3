"""What sets the element-wise methods apart: which weights go, return or grow, and when."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD

from baselines import (
    DPF,
    SET,
    SRSTE,
    AdmmElementwise,
    AdmmPattern,
    GradualMagnitude,
    MagnitudePruneFinetune,
    OneShotNM,
    RigL,
)
from baselines.admm import Admm
from baselines.budgets import largest
from baselines.nm import nm_mask
from baselines.ramp import CubicRamp
from clicktrain import PatternConv2d
from clicktrain.assignment import Assignment
from clicktrain.errors import InvalidArgument
from clicktrain.method import Method
from clicktrain.patterns import official_pool
from tests.baselines.test_contract import EPOCHS, TARGET, batches, prepared, step, train


def test_the_cubic_ramp() -> None:
    ramp = CubicRamp(0.2, 0.7, every=100)
    assert [ramp.kept(step, 1000, 1100, 100) for step in (0, 200, 450, 700, 999)] == [1100, 1100, 225, 100, 100]
    assert [step for step in range(1000) if ramp.is_due(step, 1000)] == [200, 300, 400, 500, 600, 700]
    assert not ramp.is_over(700, 1000)
    assert ramp.is_over(701, 1000)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_ramp_ends_within_the_shortest_run(steps: int) -> None:
    ramp = CubicRamp(0.2, 0.77, None)
    due = [step for step in range(steps) if ramp.is_due(step, steps)]
    assert ramp.kept(due[-1], steps, 50, 10) == 10


def test_gradual_pruning_removes_the_smallest_weights_of_each_layer() -> None:
    method = GradualMagnitude(TARGET, epochs=EPOCHS, begin=0.0, end=1.0, every=1)
    prepared(method)
    train(method, 0, 1)
    before = {name: weight.detach().clone() for name, weight in method.weights.items()}
    method.before_forward()
    for name, mask in method.masks().items():
        assert torch.equal(mask, largest(before[name].abs(), int(mask.sum())))
    first, second = (mask.float().mean() for mask in method.masks().values())
    assert float(first) == pytest.approx(float(second), abs=0.01)


def test_one_threshold_serves_all_layers() -> None:
    method = MagnitudePruneFinetune(TARGET, epochs=1)
    prepared(method)
    train(method, 0, 1)
    weights = {name: weight.detach().abs().clone() for name, weight in method.weights.items()}
    method.begin_phase(1, SGD(method.model.parameters(), lr=0.1))
    kept = torch.cat([weights[name][mask] for name, mask in method.masks().items()])
    gone = torch.cat([weights[name][~mask] for name, mask in method.masks().items()])
    assert kept.min() >= gone.max()


def test_rounds_prune_by_the_same_factor_and_never_bring_back() -> None:
    method = MagnitudePruneFinetune(TARGET, epochs=1, rounds=3)
    assert [phase.name for phase in method.phases] == ["dense", "finetune-1", "finetune-2", "finetune-3"]
    prepared(method)
    kept = [sum(weight.numel() for weight in method.weights.values())]
    earlier = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in method.weights.items()}
    for index in (1, 2, 3):
        method.begin_phase(index, SGD(method.model.parameters(), lr=0.1))
        kept.append(method.kept)
        masks = method.masks()
        assert not any((masks[name] & ~earlier[name]).any() for name in masks)
        earlier = masks
    factor = (kept[-1] / kept[0]) ** (1 / 3)
    assert [after / before for before, after in pairwise(kept)] == pytest.approx([factor] * 3, abs=0.01)


def test_rigl_grows_where_the_gradient_is_large_and_skips_the_update() -> None:
    method = RigL(TARGET, epochs=EPOCHS, every=2)
    model = prepared(method)
    data = batches()
    method.on_epoch(0, data)
    for x, y in data[:2]:
        step(method, x, y)
    before = {name: weight.detach().clone() for name, weight in method.weights.items()}
    masks, bias = method.masks(), model.get_parameter("11.bias").detach().clone()
    nn.functional.cross_entropy(model(data[2][0]), data[2][1]).backward()
    gradients = {name: weight.grad.abs() for name, weight in method.weights.items() if weight.grad is not None}
    method.after_backward()
    assert {shares[2] for shares in method.densities().values()} == {1.0}
    method.optimizer.step()
    method.after_step()
    assert all(shares[2] == shares[0] < 1 for shares in method.densities().values())
    assert torch.equal(model.get_parameter("11.bias"), bias)
    for name, mask in method.masks().items():
        weight, stayed, never = method.weights[name], masks[name] & mask, ~(masks[name] | mask)
        grown, dropped = mask & ~masks[name], masks[name] & ~mask
        assert int(grown.sum()) == int(dropped.sum()) > 0
        assert not weight[grown].any()
        assert torch.equal(weight[stayed], before[name][stayed])
        assert gradients[name][grown].min() >= gradients[name][never].max()
        assert before[name][dropped].abs().max() <= before[name][masks[name]].abs().quantile(0.5)


def test_set_grows_elsewhere_with_another_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        method = SET(TARGET, epochs=EPOCHS)
        method.seed = seed
        prepared(method)
        train(method)
        found.append(torch.cat([mask.flatten() for mask in method.masks().values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("build", [SET, RigL])
def test_connections_stay_in_the_last_quarter(build: Callable[..., SET | RigL]) -> None:
    method = build(TARGET, epochs=EPOCHS, every=1)
    prepared(method)
    train(method, 0, 2)
    middle = method.masks()
    train(method, 2, 3)
    late = method.masks()
    train(method, 3)
    assert any(not torch.equal(middle[name], late[name]) for name in late)
    assert all(torch.equal(mask, late[name]) for name, mask in method.masks().items())


def test_what_dpf_masks_out_learns_on_and_returns() -> None:
    method = DPF(TARGET, epochs=EPOCHS, every=100)
    model = prepared(method)
    train(method, 0, 4)
    (name, mask), *_ = method.masks().items()
    weight = method.weights[name]
    hidden = weight.detach()[~mask].clone()
    assert bool(hidden.any())
    x, y = batches()[0]
    step(method, x, y)
    assert torch.equal(method.masks()[name], mask)
    assert not torch.equal(weight.detach()[~mask], hidden)
    logits = model.eval()(x)
    with torch.no_grad():
        weight[~mask] = 10.0
    assert torch.equal(model(x), logits)  # what is masked out does not act
    method.adopt(method.magnitude_masks(method.budget))
    assert bool((method.masks()[name] & ~mask).any())


def test_sr_ste_decays_what_is_masked_out() -> None:
    method = SRSTE(1, 2, epochs=1, decay=0.5)
    model = prepared(method)
    method.before_forward()
    model(batches()[0][0]).sum().backward()
    plain = {name: weight.grad.clone() for name, weight in method.weights.items() if weight.grad is not None}
    method.after_backward()
    for name, mask in method.masks().items():
        weight = method.weights[name]
        assert weight.grad is not None
        assert torch.allclose(weight.grad - plain[name], 0.5 * weight.detach() * ~mask, atol=1e-5)
        assert bool(plain[name][~mask].any())  # straight through


def test_nm_masks_keep_the_largest_of_each_group_of_channels() -> None:
    weight = torch.tensor([0.1, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, -6.0]).view(1, 8, 1, 1)
    assert nm_mask(weight, 2, 4).flatten().int().tolist() == [0, 1, 1, 0, 1, 0, 0, 1]
    mask = nm_mask(torch.randn(3, 8, 3, 3), 2, 4)
    assert torch.equal(mask.view(3, 2, 4, 3, 3).sum(2), torch.full((3, 2, 3, 3), 2))


@pytest.mark.parametrize("build", [OneShotNM, SRSTE])
def test_an_nm_budget_that_does_not_fit_is_named(build: Callable[..., Method]) -> None:
    with pytest.raises(InvalidArgument, match="2:4 sparsity: layer 7 has 6 input channels, expected a multiple of 4"):
        prepared(build(2, 4, epochs=1))
    for n, m in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(InvalidArgument, match=f"n={n}, m={m}"):
            build(n, m)


def test_admm_draws_weights_to_their_constraint() -> None:
    target = torch.tensor([1.0, 0.4, -0.3])
    weight = nn.Parameter(target.clone())
    admm = Admm(1.0, {"w": weight}, [lambda weights: {"w": weights["w"] * largest(weights["w"].abs(), 1)}])
    optimizer = SGD([weight], lr=0.2)
    for _ in range(60):
        for _ in range(10):
            optimizer.zero_grad()
            (0.5 * (weight - target).square().sum() + admm.penalty({"w": weight})).backward()
            optimizer.step()
        admm.update({"w": weight})
    assert weight.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=0.02)
    assert admm.residual({"w": weight}) < 0.05


def test_admm_patterns_start_from_the_trained_network() -> None:
    method = AdmmPattern(TARGET, epochs=1, pool="official", patterns=4)
    model = prepared(method)
    train(method, 0, 1)
    method.begin_phase(1, SGD(model.parameters(), lr=0.1))
    assert method.stage == "admm"
    penalty = method.penalty()
    assert float(penalty.detach()) > 0
    penalty.backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in method.weights.values())
    method.begin_phase(2, SGD(model.parameters(), lr=0.1))
    assert method.stage == "finetune"
    assert float(method.penalty()) == 0
    assert all(isinstance(model.get_submodule(name), PatternConv2d) for name in method.masks())


def test_a_bare_pattern_compresses_as_published() -> None:
    assert 1 / Assignment(torch.zeros(4, 4, dtype=torch.uint8), official_pool(4)).density == 2.25


@pytest.mark.parametrize("build", [AdmmPattern, AdmmElementwise])
def test_admm_lengths_are_the_published_ones(build: Callable[..., Method]) -> None:
    assert [phase.epochs for phase in build(6.0).phases] == [190, 120, 60]
    assert build(6.0).phases[1].optimizer == "adam"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RigL(4.0, distribution="global"), "distribution='global'"),
        (lambda: SET(4.0, drop=0.0), r"drop=0\.0"),
        (lambda: SET(4.0, every=0), "every=0"),
        (lambda: RigL(4.0, stop=1.5), r"stop=1\.5"),
        (lambda: GradualMagnitude(4.0, distribution="even"), "distribution='even'"),
        (lambda: GradualMagnitude(4.0, begin=0.8, end=0.2), r"begin=0\.8, end=0\.2"),
        (lambda: GradualMagnitude(4.0, every=0), "every=0"),
        (lambda: GradualMagnitude(4.0, epochs=0), "epochs=0"),
        (lambda: MagnitudePruneFinetune(4.0, epochs=8, finetune_epochs=2, rounds=3), "rounds=3"),
        (lambda: MagnitudePruneFinetune(4.0, finetune_lr=0.0), r"finetune_lr=0\.0"),
        (lambda: SRSTE(decay=-1.0), r"decay=-1\.0"),
        (lambda: AdmmPattern(4.0, rho=0.0), r"rho=0\.0"),
        (lambda: AdmmElementwise(4.0, admm_epochs=0), "admm_epochs=0"),
        (lambda: AdmmElementwise(4.0, admm_lr=0.0), r"admm_lr=0\.0"),
    ],
)
def test_mistakes_are_named(build: Callable[[], Method], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build()


def test_steps_are_numbered_by_their_place_in_the_run() -> None:
    method = DPF(TARGET, epochs=EPOCHS)
    prepared(method)
    train(method)
    assert method.step_number == method.total_steps == EPOCHS * len(batches())
