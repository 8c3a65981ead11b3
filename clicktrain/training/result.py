"""The figures of a run, from its metrics and its final network."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clicktrain.assignment import Assignment
from clicktrain.config import RunConfig
from clicktrain.flops import accountings, compressions, conv_macs, layer_costs, pruned
from clicktrain.layers import PatternConv2d
from clicktrain.patterns import PRUNED
from clicktrain.schedule import Stages
from clicktrain.training.loop import Trainer
from clicktrain.training.metrics import read_metrics

Record = dict[str, Any]

RESULT_SCHEMA = 1


def kept_weights(trainer: Trainer, network: nn.Module) -> dict[str, int]:
    """Return by name how many weights of each layer of the dense network exist in the final one.

    A mask of the method counts first; a layer without one counts as the final network has it, so that
    physically smaller networks are covered, and a layer that is gone counts zero.
    """
    final = {layer.name: layer.kept for layer in layer_costs(network, trainer.session.data.image_shape)}
    kept = {layer.name: final.get(layer.name, 0) for layer in trainer.layers}
    return kept | {name: int(mask.sum()) for name, mask in trainer.method.masks().items()}


def size_figures(trainer: Trainer, network: nn.Module) -> Record:
    """Return compression, inference MACs and parameters of a final network against the dense one."""
    layers, kept = trainer.layers, kept_weights(trainer, network)
    macs = conv_macs(layers, kept)
    return {
        "compression": {name: _finite(ratio) for name, ratio in compressions(layers, kept).items()},
        "inference_macs": macs,
        "inference_flops_saved_percent": 100 * (1 - macs["sparse"] / macs["dense"]),
        "parameters": {
            "dense": sum(layer.weights + layer.bias for layer in layers),
            "kept": sum(layer.kept + layer.bias for layer in pruned(layers, kept)),
        },
    }


def layer_records(trainer: Trainer, network: nn.Module) -> list[Record]:
    """Return the weights of each convolution of the dense network, and how many of them exist in the final one."""
    layers = pruned(trainer.layers, kept_weights(trainer, network))
    return [
        {"name": layer.name, "weights": layer.weights, "kept": layer.kept} for layer in layers if layer.kind == "conv"
    ]


def pattern_records(network: nn.Module) -> list[Record]:
    """Return the patterns of 3x3 kernels, the most frequent first: kept positions, and kernels that use them."""
    count: Counter[tuple[int, ...]] = Counter()
    for module in network.modules():
        if isinstance(module, PatternConv2d) and module.kernel_size == (3, 3):
            count.update(_pattern_counts(module.get_assignment()))
    return [{"kept": list(kept), "kernels": kernels} for kept, kernels in count.most_common()]


def _pattern_counts(assignment: Assignment) -> dict[tuple[int, ...], int]:
    used = torch.bincount(assignment.index[assignment.index != PRUNED], minlength=len(assignment.pool)).tolist()
    return {pattern.kept: kernels for pattern, kernels in zip(assignment.pool, used, strict=True)}


def _finite(ratio: float) -> float | None:
    """Return None for the ratio of nothing: the released counter goes by names that a network may not have."""
    return ratio if math.isfinite(ratio) else None


def summarise(
    trainer: Trainer,
    network: nn.Module,
    metrics: Path,
    total_seconds: float,
    shared_seconds: float = 0.0,
    peak_memory: int = 0,
) -> Record:
    """Return the content of ``result.json`` for a finished run.

    Parameters
    ----------
    trainer : Trainer
        At the end of its last epoch.
    network : nn.Module
        What the method's `finish` returned.
    metrics : Path
        The complete metrics file.
    total_seconds : float
        Wall-clock time of all processes that worked on the run, up to their last checkpoints.
    shared_seconds : float
        How much of that another run spent on the epochs that this one took over.
    peak_memory : int
        Most bytes that any of these processes used, see `clicktrain.memory.peak`.
    """
    session, cost = trainer.session, trainer.meter.cost
    records = list(read_metrics(metrics))
    epochs = [record for record in records if record["kind"] == "epoch"]
    steps = [record for record in records if record["kind"] == "step"]
    if network is not trainer.method.model:  # the method made another network of it: that one counts as the last
        epochs[-1] |= {"val_accuracy": trainer.evaluate(session.validation, network),
                       "test_accuracy": trainer.evaluate(session.test, network)}  # fmt: skip
    chosen = chosen_epochs(epochs, session.config)
    return {
        "schema": RESULT_SCHEMA,
        "config_id": session.config.config_id(),
        "seed": session.seed,
        "status": "done",
        "model": session.config.model.name,
        "dataset": session.config.data.name,
        "method": trainer.method.name,
        "accuracy": {key: epoch and epoch["test_accuracy"] for key, epoch in chosen.items()},
        "val_accuracy": {key: epoch and epoch["val_accuracy"] for key, epoch in chosen.items()},
        **size_figures(trainer, network),
        "layers": layer_records(trainer, network),
        "patterns": pattern_records(network),
        "training_flops": {
            "used": cost.flops,
            "dense": cost.dense_flops,
            "saved_percent": cost.saved_percent,
            "by_stage": dict(trainer.meter.by_stage),
        },
        "accountings": _accountings(trainer, network),
        "seconds": {
            "train": sum(step["seconds"] for step in steps),
            "eval": sum(epoch["eval_seconds"] for epoch in epochs),
            "select": sum(epoch["select_seconds"] for epoch in epochs),
            "total": total_seconds,
            "shared": shared_seconds,
        },
        "peak_memory_bytes": peak_memory,
        "stages": stage_times(steps, epochs),
    }


def chosen_epochs(epochs: Sequence[Record], config: RunConfig) -> dict[str, Record | None]:
    """Return the epoch records whose accuracies are reported.

    ``last`` is the last epoch; ``best`` the first best one on the split that chooses (the test set only where
    ``data.eval_on`` says so); ``best_after_prune`` the best among those at least as sparse as the last one,
    None where that is dense: an accuracy from before the hard prune belongs to another network.
    """
    key = "val_accuracy" if config.data.eval_on == "validation" else "test_accuracy"
    score: Callable[[Record], float] = lambda epoch: epoch[key]  # noqa: E731
    evaluated = [epoch for epoch in epochs if epoch[key] is not None]
    last = epochs[-1]
    as_sparse = [epoch for epoch in evaluated if epoch["density"] <= last["density"] * (1 + 1e-6)]
    return {
        "last": last,
        "best": max(evaluated, key=score),
        "best_after_prune": max(as_sparse, key=score) if last["density"] < 1 else None,
    }


def stage_times(steps: Sequence[Record], epochs: Sequence[Record]) -> list[Record]:
    """Return steps and times of each stage, in order of appearance."""
    stages = []
    for name in dict.fromkeys(step["stage"] for step in steps):
        seconds = [step["seconds"] for step in steps if step["stage"] == name]
        stages.append(
            {
                "name": name,
                "epochs": sum(epoch["stage"] == name for epoch in epochs),
                "steps": len(seconds),
                "median_step_seconds": statistics.median(seconds),
                "seconds": sum(seconds),
            }
        )
    return stages


def _accountings(trainer: Trainer, network: nn.Module) -> dict[str, float] | None:
    """Return the what-ifs A-D of a method that has ClickTrain's stages."""
    stages = getattr(trainer.method, "stages", None)
    if not isinstance(stages, Stages):
        return None
    kept = kept_weights(trainer, network)
    return accountings(trainer.layers, kept, epochs=stages.epochs, select_at=stages.select_at, prune_at=stages.prune_at)
