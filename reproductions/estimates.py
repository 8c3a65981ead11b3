"""How long a study will take, from step times that were measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from clicktrain import data, models
from clicktrain.config import RunConfig
from clicktrain.data.fashion_mnist import TEST_COUNT, TRAIN_COUNT
from clicktrain.data.torchvision_sets import SOURCES
from clicktrain.flops import layer_costs
from clicktrain.planning import DATASETS, DataShape
from clicktrain.training.session import build_method, choose_device
from clicktrain.training.timeline import Timeline
from reproductions import paths
from reproductions.paths import StudyDirectory
from reproductions.preset import Preset, RunSpec
from reproductions.sharing import Sharing
from reproductions.store import State, read_run, state

_ROUNDS = 3
_PROBE_FLOPS = 2e10  # of one measured step, at most, if two images need less
_PROBE_IMAGES = 32
_EVALUATION = 1 / 3  # of a training step on as many images: it has no backward pass


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before it runs.

    Attributes
    ----------
    spec : RunSpec
        The run.
    state : State
        How far it has come.
    steps : int
        That it will take, epochs that it takes over from its dense run left out.
    seconds : float
        That it will take from its start to its end; 0 for a run that is done.
    basis : str
        What that comes from.
    """

    spec: RunSpec
    state: State
    steps: int
    seconds: float
    basis: str


def estimate(study: StudyDirectory, preset: Preset, runs: Sequence[RunSpec], *, sharing: bool = True) -> list[Estimate]:
    """Estimate the runs of a study.

    A configuration that has run before, in the study or in the evidence of the suite, takes what it took then; of
    any other the dense training step is measured here and now, which sparse stages will undercut.

    Raises
    ------
    DataError
        The folder of a data set is not there to be counted.
    """
    shared = Sharing(preset if sharing else None)
    return [_estimate(study, spec, shared) for spec in runs]


def _estimate(study: StudyDirectory, spec: RunSpec, sharing: Sharing) -> Estimate:
    epochs = sharing.shared_epochs(spec)
    steps, images = _work(spec.config, epochs)
    stands = state(study.run(spec.config.config_id(), spec.seed))
    if stands is State.DONE:
        return Estimate(spec, stands, 0, 0.0, "done")
    if (known := _earlier(study, spec)) is not None:
        return Estimate(spec, stands, steps, known, "earlier runs of this configuration")
    return Estimate(spec, stands, steps, images * _seconds_per_image(spec.config), "dense step, measured now")


def _earlier(study: StudyDirectory, spec: RunSpec) -> float | None:
    """Return the median time of finished runs of a configuration, whatever their seed."""
    config_id = spec.config.config_id()
    studies = [study, *(StudyDirectory(path.parent) for path in paths.EVIDENCE.glob("*/study.toml"))]
    for directory in studies:
        found = sorted(directory.config(config_id).parent.glob("seed_*/result.json"))
        seeds = [int(path.parent.name.removeprefix("seed_")) for path in found]
        runs = [read_run(RunSpec(spec.method, seed, spec.config), directory.run(config_id, seed)) for seed in seeds]
        if runs:
            times: list[dict[str, float]] = [run.result["seconds"] for run in runs]
            return statistics.median(each["total"] - each.get("shared", 0.0) for each in times)
    return None


def _work(config: RunConfig, skipped: int) -> tuple[int, float]:
    """Return the steps of a run after its first epochs, and their images, those of evaluations by their weight."""
    facts = _data(config)
    train, test = min(facts.train, config.data.train_limit or facts.train), facts.test
    held_out = round(train * config.data.validation)
    timeline = Timeline(build_method(config).phases, config.train)
    steps, images = 0, 0.0
    for epoch in range(skipped, timeline.epochs):
        batch = timeline.phases[timeline.index(epoch)].batch_size or config.train.batch_size
        steps += -(-(train - held_out) // batch)
        images += train - held_out
        if (epoch + 1) % config.train.eval_every == 0 or epoch + 1 == timeline.epochs:
            images += _EVALUATION * (held_out + test)
    return steps, images


@dataclass(frozen=True)
class _Data:
    train: int
    test: int
    shape: DataShape


def _data(config: RunConfig) -> _Data:
    """Return what is known of a data set, or what its folder says; files that would be downloaded need not be there."""
    section = config.data
    return _known(section.name) or _read(section.name, section.root, section.image_size)


def _known(name: str) -> _Data | None:
    counts = {name: (source.train_count, source.test_count) for name, source in SOURCES.items()}
    counts |= {"fashion-mnist-small": (TRAIN_COUNT, TEST_COUNT), "imagenet": (1_281_167, 50_000)}
    return _Data(*counts[name], DATASETS[name]) if name in counts else None


@cache
def _read(name: str, root: str | None, image_size: int | None) -> _Data:
    found = data.load(name, root, image_size=image_size)
    return _Data(len(found.train), len(found.test), DataShape(found.image_shape, found.num_classes))


def _seconds_per_image(config: RunConfig) -> float:
    device = choose_device(config.train)
    return _measure(config.model.name, config.model.width, _data(config).shape, config.train.batch_size, str(device))


@cache
def _measure(name: str, width: float, shape: DataShape, batch: int, device: str) -> float:
    """Return the time that an image takes in a dense training step."""
    channels, size, _ = shape.image
    model = models.create(name, shape.num_classes, width=width, in_channels=channels, input_size=size)
    flops = 6 * sum(layer.macs for layer in layer_costs(model, shape.image))
    images = max(2, min(batch, _PROBE_IMAGES, round(_PROBE_FLOPS / flops)))
    model, x = model.to(device), torch.rand(images, *shape.image, device=device)
    y = torch.zeros(images, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / images  # what else the machine does now will not be there when the study runs
