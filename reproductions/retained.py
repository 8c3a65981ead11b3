"""Retained importance: how much of a trained network each way of choosing patterns keeps.

It is measured on the dense networks of a study, before any training could make up for a poor choice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import get_args

from torch import Tensor

from clicktrain.errors import CheckpointError
from clicktrain.files import write_atomic
from clicktrain.importance import Score, measure
from clicktrain.patterns import PatternPool, official_pool
from clicktrain.pool import coverage_pool, frequency_pool, retained_importance
from clicktrain.selection import prunable_layers
from clicktrain.training.checkpoint import CheckpointStore
from clicktrain.training.loop import Trainer
from clicktrain.training.session import build
from reproductions.paths import StudyDirectory
from reproductions.stats import Estimate, estimate
from reproductions.store import Run, Study

SIZES = (4, 8, 12)
BATCHES = 16

POOLS: dict[str, Callable[[Sequence[Tensor], int], PatternPool]] = {
    "coverage": coverage_pool,
    "frequency": frequency_pool,
    "official": lambda scores, size: official_pool(size),
}


@dataclass(frozen=True)
class Retained:
    """One measurement.

    Attributes
    ----------
    seed : int
        Seed of the dense run.
    score : str
        What importance means, see `clicktrain.importance`.
    pool : str
        How the patterns are chosen, a key of `POOLS`.
    size : int
        Patterns in the pool.
    percent : float
        Importance under the best pattern of each kernel, percent of all, mean over layers.
    """

    seed: int
    score: str
    pool: str
    size: int
    percent: float


@dataclass(frozen=True)
class RetainedRow:
    """Measurements of one score and size over seeds, by pool."""

    score: str
    size: int
    pools: dict[str, Estimate]


def measure_study(study: Study) -> list[Retained]:
    """Measure the dense networks of a study, from their checkpoints.

    Raises
    ------
    CheckpointError
        There is no finished dense run with its checkpoint.
    """
    runs = [run for name in study.preset.groups for run in study.of(name)]
    if not runs:
        raise CheckpointError(f"{study.directory.path}: no dense run is finished")
    return [found for run in runs for found in measure_run(run)]


def measure_run(run: Run) -> list[Retained]:
    """Measure the final network of a dense run.

    Raises
    ------
    CheckpointError
        Its checkpoint is not there, as in exported evidence.
    """
    folder = run.directory.checkpoints
    state = CheckpointStore(folder).load(lambda note: None) if folder.is_dir() else None
    if state is None:
        raise CheckpointError(f"{run.directory.path}: holds no checkpoint of the trained network")
    session = build(run.spec.config, run.spec.seed)
    model = Trainer.from_state(session, state["trainer"]).method.model
    loader = session.train_loader(session.method.phases[-1])
    convs = prunable_layers(model, session.data.image_shape)
    weights = {name: conv.weight for name, conv in convs.items() if conv.kernel_size == (3, 3)}
    found = []
    for score in get_args(Score):
        scores = list(measure(model, weights, islice(iter(loader), BATCHES), score).values())
        for name, choose in POOLS.items():
            fractions = {size: retained_importance(scores, choose(scores, size)) for size in SIZES}
            found += [Retained(run.spec.seed, score, name, size, 100 * part) for size, part in fractions.items()]
    return found


def write(directory: StudyDirectory, measurements: Sequence[Retained]) -> None:
    """Store measurements with their study."""
    write_atomic(directory.retained, json.dumps([asdict(entry) for entry in measurements], indent=1) + "\n")


def read(directory: StudyDirectory) -> list[Retained]:
    """Return the stored measurements of a study; empty where there are none."""
    if not directory.retained.is_file():
        return []
    return [Retained(**entry) for entry in json.loads(directory.retained.read_text())]


def rows(measurements: Sequence[Retained]) -> list[RetainedRow]:
    """Return measurements as rows of score and size, mean and spread over seeds."""
    samples: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in measurements:
        samples[entry.score, entry.size][entry.pool].append(entry.percent)
    return [
        RetainedRow(score, size, {pool: estimate(sample) for pool, sample in pools.items()})
        for (score, size), pools in sorted(samples.items())
    ]
