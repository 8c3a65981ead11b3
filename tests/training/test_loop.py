from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clicktrain.config import RunConfig
from clicktrain.errors import DivergedError
from clicktrain.layers import PatternConv2d
from clicktrain.method import Method
from clicktrain.training import Trainer, build
from tests.helpers import toy
from tests.helpers.toy import without_times

LATE_PRUNE = toy.OPTIONS | {"prune_after_step": True, "mixup_after_prune": 0.3}
CONFIGS = {
    "dense": toy.config(batch_size=8, mixup=0.3, label_smoothing=0.1, clip_norm=1.0),
    "two phases": toy.config(toy.TWO_PHASES, batch_size=8),
    "clicktrain": toy.clicktrain_config(batch_size=8),
    "clicktrain pruned after the first step": toy.config("clicktrain", LATE_PRUNE, batch_size=8),
}


def run(config: RunConfig, seed: int = 0) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = Trainer(build(config, seed))
    return trainer, list(trainer.records())


def steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == "step"]


def assert_same(left: Any, right: Any) -> None:
    """Compare nested states bit by bit; times and memory addresses aside."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            if not str(key).endswith("seconds"):
                assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_steps_rates_and_stages_at_every_boundary() -> None:
    schedule = {"kind": "multistep", "milestones": [1, 2]}
    trainer, records = run(toy.clicktrain_config(schedule=schedule))
    assert [record["kind"] for record in records] == ["step"] * 5 + ["epoch"] + ["step"] * 5 + ["epoch"] + [
        "step"
    ] * 5 + ["epoch"]
    assert [record["step"] for record in steps(records)] == list(range(15))
    assert trainer.total_steps == 15
    assert [record["lr"] for record in steps(records)] == pytest.approx([0.05] * 5 + [0.005] * 5 + [0.0005] * 5)
    assert [record["stage"] for record in steps(records)] == ["dense"] * 5 + ["regularized"] * 5 + ["sparse"] * 5
    penalised = [record["penalty"] > 0 for record in steps(records)]
    assert penalised == [False] * 6 + [True] * 4 + [False] * 5  # the first regularised step is plain


def test_prune_after_the_first_step_of_its_epoch() -> None:
    _, records = run(toy.config("clicktrain", LATE_PRUNE))
    assert [record["stage"] for record in steps(records)[9:]] == ["regularized"] * 2 + ["sparse"] * 4


def test_cosine_changes_with_every_step() -> None:
    _, records = run(toy.config(schedule={"kind": "cosine", "warmup": 1.0}))
    expected = [
        0.05 * (min(1, step / 5) if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 10))) for step in range(15)
    ]
    assert [record["lr"] for record in steps(records)] == pytest.approx(expected)


def test_each_phase_has_its_own_optimizer_rate_and_batches() -> None:
    trainer, records = run(toy.config(toy.TWO_PHASES, schedule={"kind": "constant"}))
    assert [len(steps([r for r in records if r["epoch"] == epoch])) for epoch in range(3)] == [5, 2, 2]
    assert [r["phase"] for r in records if r["kind"] == "epoch"] == ["first", "second", "second"]
    assert [r["lr"] for r in steps(records)] == pytest.approx([0.05] * 5 + [0.01] * 2 + [0.001] * 2)
    assert trainer.method.calls == ["begin_phase 2"]
    assert isinstance(trainer.method.optimizer, torch.optim.Adam)


def test_the_method_is_called_in_the_order_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("setup", "on_epoch", "prepare_batch", "before_forward", "penalty", "after_backward", "after_step"):
        original = getattr(Method, name)
        monkeypatch.setattr(
            Method,
            name,
            lambda self, *args, name=name, original=original: (calls.append(name), original(self, *args))[1],
        )
    run(toy.config(epochs=1, batch_size=12))
    step = ["prepare_batch", "before_forward", "penalty", "after_backward", "after_step"]
    assert calls == ["setup", "on_epoch", *step, *step]


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_after_any_record_changes_nothing(name: str) -> None:
    config = CONFIGS[name]
    reference = Trainer(build(config, 0))
    states, expected = [saved_and_loaded(reference.state_dict())], []
    for record in reference.records():
        expected.append(without_times(record))
        states.append(saved_and_loaded(reference.state_dict()))
    for stop, state in enumerate(states):
        resumed = Trainer.from_state(build(config, 0), state)
        assert [without_times(record) for record in resumed.records()] == expected[stop:]
        assert_same(saved_and_loaded(resumed.state_dict()), states[-1])


def test_a_clicktrain_run_ends_with_pattern_layers_only_where_it_prunes() -> None:
    trainer, _ = run(toy.clicktrain_config())
    network = trainer.method.finish()
    assert [type(network[i]) for i in (0, 3, 7)] == [nn.Conv2d, PatternConv2d, PatternConv2d]
    held = {id(parameter) for group in trainer.method.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in network.parameters()}


def test_methods_are_paired_until_they_differ() -> None:
    _, dense = run(toy.config())
    _, clicktrain = run(toy.clicktrain_config())
    assert [without_times(record) for record in dense[:5]] == [without_times(record) for record in clicktrain[:5]]
    assert dense[5]["val_accuracy"] == clicktrain[5]["val_accuracy"]


def test_what_a_method_draws_leaves_dropout_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = run(toy.config())
    monkeypatch.setattr(toy.Plain, "after_step", lambda self: torch.rand(17), raising=False)
    _, drawing = run(toy.config())
    assert list(map(without_times, drawing)) == list(map(without_times, expected))


def test_seeds_differ() -> None:
    _, one = run(toy.config(), seed=1)
    _, two = run(toy.config(), seed=2)
    assert one[0]["loss"] != two[0]["loss"]


def first_loss(monkeypatch: pytest.MonkeyPatch, **train: Any) -> tuple[float, torch.Tensor, torch.Tensor, nn.Module]:
    """Return the first loss of a linear classifier, the images and labels of that step, and the initial network."""
    monkeypatch.setattr("clicktrain.models.create", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    config = toy.config(**train)
    monkeypatch.setattr("clicktrain.training.loop.CostMeter", _NoMeter)
    trainer = Trainer(build(config, 3))
    x, y = next(iter(trainer.session.train_loader(trainer.timeline.phases[0])))
    network = build(config, 3).model
    return next(trainer.records())["loss"], x, y, network


class _NoMeter:
    """Stands in for the cost meter, which needs a convolution."""

    def __init__(self, layers: object) -> None: ...

    def add_step(self, *_: object) -> None: ...

    def add_extra(self, *_: object) -> None: ...


def test_label_smoothing_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, x, y, network = first_loss(monkeypatch, label_smoothing=0.1)
    logs = network(x).detach().log_softmax(1)
    expected = -(0.9 * logs[torch.arange(len(y)), y] + 0.1 * logs.mean(1)).mean()
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_mixup_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, x, y, network = first_loss(monkeypatch, mixup=0.5)
    random = np.random.default_rng((3, 0, 0))
    share, partner = random.beta(0.5, 0.5), random.permutation(len(x))
    logits = network(share * x + (1 - share) * x[partner]).detach()
    expected = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[partner])
    assert 0 < share < 1
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_clipping_bounds_the_gradient() -> None:
    config = toy.config(clip_norm=0.01, lr=1.0, momentum=0.0, weight_decay=0.0, schedule={"kind": "constant"})
    trainer = Trainer(build(config, 0))
    before = [parameter.detach().clone() for parameter in trainer.method.model.parameters()]
    next(trainer.records())
    moved = [after.detach() - b for after, b in zip(trainer.method.model.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm() == pytest.approx(0.01, rel=1e-3)


def test_bf16_autocast_trains_in_lower_precision() -> None:
    _, exact = run(toy.config())
    trainer, rounded = run(toy.config(amp="bf16"))
    assert rounded[0]["loss"] != exact[0]["loss"]
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-2)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.method.model.parameters())


def test_channels_last_trains_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # it drops other units in another memory format
    config = toy.clicktrain_config()
    plain = list(Trainer(build(config, 0)).records())
    trainer = Trainer(build(config, 0), channels_last=True)
    last = list(trainer.records())
    assert trainer.method.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [r["loss"] for r in steps(last)] == pytest.approx([r["loss"] for r in steps(plain)], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in step \d+ \(epoch \d, lr 1e\+30\)"):
        run(toy.config(lr=1e30, schedule={"kind": "constant"}))


def test_evaluation_is_due_every_few_epochs_and_at_the_end() -> None:
    _, records = run(toy.config(epochs=5, eval_every=2))
    accuracies = [record["test_accuracy"] for record in records if record["kind"] == "epoch"]
    assert [accuracy is not None for accuracy in accuracies] == [False, True, False, True, True]


def test_flops_are_integrated_from_the_densities() -> None:
    trainer, records = run(toy.clicktrain_config())
    convs = [(4 * 9, 64, True), (6 * 4 * 9, 64, False), (8 * 6 * 9, 16, False)]
    passes = [2 * weights * positions * (2 if first else 3) for weights, positions, first in convs]
    linear = 2 * 24 * 3
    dense = 24 * (sum(passes) + linear)
    importance = 10 * 3 * 2 * (sum(weights * positions for weights, positions, _ in convs) + 24)
    kept = [1.0] + [float(mask.float().mean()) for mask in trainer.method.masks().values()]
    sparse = 24 * (sum(cost * share for cost, share in zip(passes, kept, strict=True)) + linear)
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["flops"] for record in epochs] == pytest.approx(
        [dense, 2 * dense + importance, 2 * dense + importance + sparse]
    )
    assert epochs[-1]["flops_dense"] == pytest.approx(3 * dense)
    stages = trainer.meter.by_stage
    assert stages == pytest.approx({"dense": dense, "regularized": dense + importance, "sparse": sparse})
    assert epochs[0]["density"] == epochs[1]["density"] == 1
    total = sum(weights for weights, _, _ in convs)
    assert epochs[2]["density"] == pytest.approx(
        sum(share * weights for share, (weights, _, _) in zip(kept, convs, strict=True)) / total
    )
