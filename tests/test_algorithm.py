"""ClickTrain as a Method in a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clicktrain
from clicktrain import ClickTrain, PatternConv2d, models
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.official import resolve

EPOCHS = 6


def setting(seed=0, name="vgg11", size=32, classes=4, batches=3, width=0.125):
    torch.manual_seed(seed)
    model = models.create(name, classes, width=width, input_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    random = torch.Generator().manual_seed(1)
    loader = [
        (torch.randn(8, 3, size, size, generator=random), torch.randint(0, classes, (8,), generator=random))
        for _ in range(batches)
    ]
    return model, optimizer, loader


def epoch_of(method, model, optimizer, loader, epoch, watch=None):
    method.on_epoch(epoch, loader)
    for x, y in loader:
        x, y = method.prepare_batch(x, y)
        method.before_forward()
        loss = F.cross_entropy(model(x), y) + method.penalty()
        loss.backward()
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
        if watch:
            watch(method)


def run(method, model, optimizer, loader, epochs=EPOCHS, watch=None):
    method.setup(model, optimizer, loader[0][0])
    for epoch in range(epochs):
        epoch_of(method, model, optimizer, loader, epoch, watch)
    return method.finish()


def test_stages_follow_one_another():
    stages = []
    run(ClickTrain(5.0, EPOCHS, select_at=2, prune_at=4), *setting(), watch=lambda m: stages.append(m.stage))
    assert stages == ["dense"] * 6 + ["regularized"] * 6 + ["sparse"] * 6


def test_the_result_is_sparse_as_promised():
    method = ClickTrain(5.0, EPOCHS)
    model = run(method, *setting())
    costs = clicktrain.flops.layer_costs(model, (3, 32, 32))
    assert 5.0 <= clicktrain.flops.compression(costs) < 5.01
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PatternConv2d)}
    assert set(layers) == set(method.masks())
    for name, layer in layers.items():
        density = float(method.masks()[name].float().mean())
        assert method.densities()[name] == (pytest.approx(density),) * 3
        assert bool((layer.dense_weight()[~method.masks()[name]] == 0).all())


def test_no_dense_parameter_or_momentum_of_a_pruned_layer_is_left():
    model, optimizer, loader = setting()
    shapes = {tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    run(ClickTrain(5.0, EPOCHS), model, optimizer, loader)
    first = tuple(model.features[0].weight.shape)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    four_d = {tuple(t.shape) for t in [*held, *state] if t.ndim == 4}
    assert four_d == {first}
    assert four_d < shapes
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_penalty_shrinks_what_will_be_removed():
    model, optimizer, loader = setting(batches=20)
    method = ClickTrain(5.0, 40, select_at=1, prune_at=20, shrinkage=0.3)
    norms = []
    method.setup(model, optimizer, loader[0][0])
    for epoch in range(20):
        epoch_of(method, model, optimizer, loader, epoch)
        norms.append(method.log().get("norm_left"))
    assert norms[0] is None
    assert norms[-1] < 0.25 * norms[1]


def test_strength_is_shrinkage_over_the_sum_of_rates():
    model, optimizer, loader = setting()
    method = ClickTrain(5.0, 10, select_at=2, prune_at=6, shrinkage=0.12)
    method.setup(model, optimizer, loader[0][0])
    method.on_epoch(2, loader)
    assert method.log()["penalty_strength"] == pytest.approx(0.12 / (0.02 * 4 * 3))
    method = ClickTrain(5.0, 10, select_at=2, prune_at=6, shrinkage=0.12)
    method.lr_at = lambda position: 0.1 if position < 4 else 0.01
    method.setup(*setting()[:2], loader[0][0])
    method.on_epoch(2, loader)
    assert method.log()["penalty_strength"] == pytest.approx(0.12 / (6 * 0.1 + 6 * 0.01))


def test_zero_shrinkage_gives_no_nan():
    model = run(ClickTrain(5.0, EPOCHS, shrinkage=0.0), *setting())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_importance_is_counted_and_leaves_the_run_alone():
    model, optimizer, loader = setting()
    method = ClickTrain(5.0, EPOCHS, select_at=0, prune_at=3, batches=2)
    method.setup(model, optimizer, loader[0][0])
    before = copy.deepcopy(model.state_dict())
    method.on_epoch(0, loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    macs = sum(cost.macs for cost in clicktrain.flops.layer_costs(model, (3, 32, 32)))
    assert method.extra_flops == 2 * 8 * 3 * 2 * macs


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_state_restores_at_every_epoch(epoch):
    """A method, model and optimizer restored at the end of any epoch continue bit for bit."""
    parts = setting()
    method = ClickTrain(5.0, EPOCHS, select_at=2, prune_at=4, mixup_after_prune=0.3)
    method.setup(*parts[:2], parts[2][0][0])
    for done in range(epoch + 1):
        epoch_of(method, *parts, done)
    saved = copy.deepcopy([method.state_dict(), parts[0].state_dict(), parts[1].state_dict()])
    random_state = torch.get_rng_state()
    for rest in range(epoch + 1, EPOCHS):
        epoch_of(method, *parts, rest)

    twin = ClickTrain(5.0, EPOCHS, select_at=2, prune_at=4, mixup_after_prune=0.3)
    model, optimizer, loader = setting(seed=9)
    twin.setup(model, optimizer, loader[0][0])
    twin.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    torch.set_rng_state(random_state)
    for rest in range(epoch + 1, EPOCHS):
        epoch_of(twin, model, optimizer, loader, rest)
    for name, value in method.finish().state_dict().items():
        assert torch.equal(value, twin.finish().state_dict()[name]), name


def test_the_official_preset_to_the_letter():
    method = ClickTrain.official("official:cifar10_vgg13")
    config = resolve("official:cifar10_vgg13")
    assert (method.stages.select_at, method.stages.prune_at, method.stages.epochs) == (60, 148, 190)
    assert (method.penalty_strength, method.batches, method.sparsity.rank_by) == (6.5e-4, 1, "kernel")
    assert (method.prune_after_step, method.mixup_after_prune, method.mixup_from) == (True, 0.3, 5)
    assert tuple(method.sparsity.ratios) == config.ratios


def test_official_pruning_comes_after_the_first_step_of_its_epoch():
    stages = []
    method = ClickTrain.official(
        "official:cifar10_vgg11", epochs=5, select_at=1, prune_at=3, penalty_strength=1e-4, mixup_after_prune=0.0
    )
    run(method, *setting(), epochs=5, watch=lambda m: stages.append(m.stage))
    assert stages == ["dense"] * 3 + ["regularized"] * 6 + ["sparse"] * 6  # watched after each step


def test_the_first_regularised_step_is_plain():
    model, optimizer, loader = setting()
    penalties = []
    method = ClickTrain(5.0, 4, select_at=1, prune_at=2)
    method.setup(model, optimizer, loader[0][0])
    for epoch in range(3):
        epoch_of(method, model, optimizer, loader, epoch, watch=lambda m: penalties.append(float(m.penalty().detach())))
    # after_step has counted, so entry n is the penalty that step n + 1 of the epoch would pay
    assert penalties[:3] == [0.0] * 3
    assert all(p > 0 for p in penalties[3:6])
    assert penalties[6:] == [0.0] * 3
    method = ClickTrain(5.0, 4, select_at=0, prune_at=2)
    method.setup(*setting()[:2], loader[0][0])
    method.on_epoch(0, loader)
    assert float(method.penalty()) == 0.0


def test_mixup_runs_in_the_sparse_stage_only():
    model, optimizer, loader = setting()
    method = ClickTrain(5.0, EPOCHS, select_at=2, prune_at=4, mixup_after_prune=0.3, mixup_from=1)
    method.setup(model, optimizer, loader[0][0])
    kinds = []
    for epoch in range(EPOCHS):
        method.on_epoch(epoch, loader)
        for x, y in loader:
            kinds.append(method.prepare_batch(x, y)[1].ndim)
            method.after_step()
    assert kinds == [1] * 12 + [1, 2, 2] + [2, 2, 2]


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
@pytest.mark.parametrize("pool", ["coverage", "frequency", "official"])
def test_choices_of_score_and_pool_run(score, pool):
    model = run(ClickTrain(4.0, 3, select_at=1, prune_at=2, score=score, pool=pool), *setting(), epochs=3)
    assert any(isinstance(m, PatternConv2d) for m in model.modules())


def test_resnet50_runs_through_all_stages():
    parts = setting(name="resnet50", size=16, batches=1, width=0.125)
    model = run(ClickTrain(3.0, 3, select_at=1, prune_at=2), *parts, epochs=3)
    assert sum(isinstance(m, PatternConv2d) for m in model.modules()) == 48


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"preset": "typo"}, "preset='typo'"),
        ({"score": "typo"}, "score='typo'"),
        ({"batches": 0}, "batches=0"),
        ({"shrinkage": -1.0}, "shrinkage=-1"),
        ({"shrinkage": 1.0, "penalty_strength": 1.0}, "give one of them"),
        ({"select_at": 5, "prune_at": 3}, "select_at=5, prune_at=3"),
        ({"backend": "typo"}, "backend='typo'"),
        ({"ratios": (1, 2)}, "target_compression and ratios"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(InvalidArgument, match=text):
        ClickTrain(5.0, 10, **options)


@pytest.mark.parametrize("target", [0.5, 1000.0])
def test_an_impossible_target_is_refused_before_any_training(target):
    model, optimizer, loader = setting()
    with pytest.raises(InvalidArgument, match=f"target_compression={target}: feasible"):
        ClickTrain(target, EPOCHS).setup(model, optimizer, loader[0][0])


def test_ratios_of_the_wrong_length_are_refused_before_any_training():
    model, optimizer, loader = setting()
    with pytest.raises(InvalidArgument, match="expected 7 values"):
        ClickTrain(epochs=EPOCHS, ratios=(1, 2)).setup(model, optimizer, loader[0][0])


def test_finish_before_the_prune_is_an_error():
    model, optimizer, loader = setting()
    method = ClickTrain(5.0, EPOCHS)
    method.setup(model, optimizer, loader[0][0])
    with pytest.raises(ClickTrainError, match="epoch 3"):
        method.finish()
