"""A study on disk without any training: presets and run directories made up for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reproductions import preset
from reproductions.paths import StudyDirectory
from reproductions.preset import RunSpec
from reproductions.store import Study, load_study

PRESET = """
title = "Toy study"
data_label = "toy data"
dense_floor = 87.0
seeds = [0, 1, 2]
claims = ["accuracy-vs-dense", "accuracy-vs-pat", "no-time-overhead", "inference-flops-saved", "training-flops-saved"]

[base.data]
name = "fashion-mnist-small"
train_limit = 300

[base.model]
width = 0.125

[base.train]
epochs = 2

[[methods]]
name = "dense"
role = "dense"
config = { method = { name = "baselines:Dense" } }

[[methods]]
name = "PAT"
role = "rival"
config = { method = { name = "baselines:TrainPruneFinetune", options = { target_compression = 6.0 } } }

[[methods]]
name = "ClickTrain"
role = "subject"
rivals = { dense = "dense", pat = "PAT" }
config = { method = { name = "clicktrain", options = { target_compression = 6.0 } } }
"""

TWO = (
    PRESET.replace('rivals = { dense = "dense", pat = "PAT" }', 'rivals = { dense = "dense" }')
    .replace('"accuracy-vs-pat", ', "")
    .replace('role = "rival"', 'role = "dense"')
)
"""The same with two networks: PAT stands for the dense training of another one."""

TOY = """
title = "Toy study"
data_label = "toy data"
seeds = [0]
claims = ["accuracy-vs-dense", "training-flops-saved"]

[base.data]
name = "fashion-mnist-small"
train_limit = 200

[base.model]
name = "vgg11"
width = 0.125

[base.train]
epochs = 2
channels_last = "off"
threads = 1

[[methods]]
name = "dense"
role = "dense"
config.method = { name = "baselines:Dense" }

[[methods]]
name = "ClickTrain"
role = "subject"
rivals = { dense = "dense" }
config.method = { name = "clicktrain", options = { target_compression = 4.0, select_at = 1, prune_at = 1 } }
"""
"""A study that is really trained, in seconds."""

STAGES = {"dense": ("dense",), "PAT": ("dense", "finetune"), "ClickTrain": ("dense", "regularized", "sparse")}


def write_preset(path: Path, text: str = PRESET) -> Path:
    """Write a preset file and return its path."""
    path.write_text(text)
    return path


def make_study(folder: Path, text: str = PRESET, *, skip: tuple[str, ...] = (), **changes: Any) -> Study:
    """Write a study with all runs finished but those labelled in `skip`, and load it.

    `changes` go to `write_run`.
    """
    directory = StudyDirectory(folder)
    folder.mkdir(parents=True)
    write_preset(directory.preset, text)
    for spec in preset.load(directory.preset).runs():
        if spec.label not in skip:
            write_run(directory, spec, **changes)
    return load_study(directory)


def write_run(
    directory: StudyDirectory, spec: RunSpec, *, dense_accuracy: float = 90.0, concurrent: int | None = 0
) -> None:
    """Write the files of a finished run."""
    run = directory.run(spec.config.config_id(), spec.seed)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(spec.config.to_toml())
    run.provenance.write_text(json.dumps(provenance(concurrent)))
    stages = STAGES[_kind(spec)]
    accuracy = dense_accuracy + 0.1 * spec.seed - 0.5 * (spec.method != "dense")
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in metrics(stages, accuracy)))
    run.result.write_text(json.dumps(result(spec, stages, accuracy)))


def _kind(spec: RunSpec) -> str:
    """Return which of the toy study's methods a run is of: "ClickTrain long" is a ClickTrain."""
    return spec.method.split()[0]


def provenance(concurrent: int | None) -> dict[str, Any]:
    """Return a provenance record like the trainer's."""
    return {
        "schema": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "argv": ["/somewhere/clicktrain/__main__.py", "train"],
        "code": {"commit": "0123456789abcdef" * 2 + "01234567", "dirty": False},
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "platform": "Linux",
        "cpu": {"model": "Some CPU", "cores": 2, "usable": 2},
        "gpu": None,
        "threads": {"torch": 2, "interop": 1},
        "concurrency": {"declared": concurrent, "load": [0.0, 0.0, 0.0]},
        "seed": 0,
        "data_fingerprint": "abc",
        "resumed": [],
    }


def metrics(stages: tuple[str, ...], accuracy: float) -> list[dict[str, Any]]:
    """Return a step and an epoch record for each stage."""
    records: list[dict[str, Any]] = []
    for epoch, stage in enumerate(stages):
        records.append({"kind": "step", "epoch": epoch, "step": epoch, "stage": stage, "loss": 1.0})
        last = accuracy - 2 * (len(stages) - 1 - epoch)
        records.append({"kind": "epoch", "epoch": epoch, "stage": stage, "test_accuracy": last, "train_seconds": 10.0})
    return records


def result(spec: RunSpec, stages: tuple[str, ...], accuracy: float) -> dict[str, Any]:
    """Return a result record like the trainer's."""
    is_dense = spec.method == "dense"
    kind = _kind(spec)
    seconds = {"dense": 100.0, "PAT": 120.0, "ClickTrain": 80.0}[kind]
    used = {"dense": 1000.0, "PAT": 1050.0, "ClickTrain": 600.0}[kind]
    step = seconds / 10 / len(stages)
    ratio = 1 if is_dense else 6
    return {
        "schema": 1,
        "config_id": spec.config.config_id(),
        "seed": spec.seed,
        "status": "done",
        "accuracy": {"last": accuracy, "best": accuracy, "best_after_prune": None if is_dense else accuracy},
        "compression": {"paper": 1.0 if is_dense else 6.0},
        "inference_flops_saved_percent": 0.0 if is_dense else 80.0,
        "training_flops": {"used": used, "by_stage": {stage: used / len(stages) for stage in stages}},
        "layers": [{"name": "conv1", "weights": 36, "kept": 36}, {"name": "conv2", "weights": 90, "kept": 90 // ratio}],
        "patterns": [] if is_dense else [{"kept": [0, 1, 3, 4], "kernels": 3}, {"kept": [4, 5, 7, 8], "kernels": 1}],
        "seconds": {"train": seconds, "eval": 1.0, "select": 0.0, "total": seconds + 1},
        "peak_memory_bytes": 400_000_000 if is_dense else 500_000_000,
        "stages": [
            {"name": stage, "epochs": 1, "steps": 10, "median_step_seconds": step, "seconds": step * 10}
            for stage in stages
        ],
    }
