"""The paper's claims, and what this suite adds to them, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clicktrain import official
from clicktrain.official import OfficialConfig


@dataclass(frozen=True)
class Claim:
    """One checkable statement.

    Attributes
    ----------
    id : str
        Short name, used in presets.
    statement : str
        What is claimed.
    published : tuple of float
        Published value as a range (low, high), in `unit`: equal ends for a single value, an infinite end
        where the paper says only "higher" or "better".
    source : str
        Where the value comes from.
    metric : str
        Figure of a run that is compared (a field of `store.Figures`, or one that only benchmarks give).
    unit : str
        Unit of `published` and `tolerance`.
    tolerance : float
        How far from the published range still counts as reproduced, in `unit`.
    better : {"higher", "lower"}
        Which way is better.
    comparison : {"value", "mean", "saving", "difference", "ratio", "speedup"}
        The figure itself, an exact count; the figure itself, which varies from seed to seed; 100 * (1 - ours /
        rival), an exact count; ours - rival; ours / rival; rival / ours. All with a rival are paired by seed.
    rival : str or None
        Name under which a preset's method lists the method it is compared with; None for "value" and "mean".
    min_seeds : int
        Runs below which nothing is concluded.
    budget : str
        What it takes to check.
    hardware : {"any", "cuda"}
        Where it can be checked.
    needs : str
        What a study must contain to check it.
    exclusive : bool
        Whether the figure is a time, which only counts when nothing else was running.
    subject : str or None
        Preset that a method must be trained with for the claim to be about it: one of ClickTrain's, or the
        ``official:NAME@ROW`` of a run configuration. None: the claim is about every subject of a study.
    """

    id: str
    statement: str
    published: tuple[float, float]
    source: str
    metric: str
    unit: str
    tolerance: float
    better: Literal["higher", "lower"]
    comparison: Literal["value", "mean", "saving", "difference", "ratio", "speedup"]
    rival: str | None
    min_seeds: int
    budget: str
    needs: str
    hardware: Literal["any", "cuda"] = "any"
    exclusive: bool = False
    subject: str | None = None

    @property
    def is_of_kernels(self) -> bool:
        """Whether benchmarks of the kernels check it, and no training run."""
        return self.metric == KERNEL_SPEEDUP


KERNEL_SPEEDUP = "kernel_speedup"
"""Metric of claims about kernels: see `reproductions.kernels`."""

_ABSTRACT = "abstract, arXiv 2011.10170"
_SUMMARY = "public summary of the paper, not checked against its tables"

_GOAL = "goal of this suite"

_CLAIMS = (
    Claim(
        id="end-to-end-time-vs-pat",
        statement="End-to-end time of pruning after training (PAT) falls by up to 2.3x",
        published=(2.3, 2.3),
        source=_ABSTRACT,
        metric="seconds",
        unit="x",
        tolerance=0.2,
        better="higher",
        comparison="speedup",
        rival="pat",
        min_seeds=3,
        budget="quick study: 10 minutes on 2 cores",
        needs="a pruning-after-training method",
        exclusive=True,
    ),
    Claim(
        id="no-time-overhead",
        statement="Training takes no longer than training the dense network",
        published=(1.0, 1.0),
        source=_ABSTRACT,
        metric="seconds",
        unit="x",
        tolerance=0.05,
        better="lower",
        comparison="ratio",
        rival="dense",
        min_seeds=3,
        budget="quick study: 10 minutes on 2 cores",
        needs="a dense run",
        exclusive=True,
    ),
    Claim(
        id="accuracy-vs-pat",
        statement="Accuracy is comparable to pruning after training at equal compression",
        published=(0.0, 0.0),
        source=_ABSTRACT + " ('comparable'; no figure)",
        metric="accuracy",
        unit="points",
        tolerance=0.5,
        better="higher",
        comparison="difference",
        rival="pat",
        min_seeds=3,
        budget="embedded study: 5 seeds, about 40 minutes on 2 cores",
        needs="a pruning-after-training method",
    ),
    Claim(
        id="accuracy-vs-dense",
        statement="The pruned network is within 1 point of the dense one",
        published=(0.0, 0.0),
        source="goal of this suite; the paper's dense accuracies have no public source",
        metric="accuracy",
        unit="points",
        tolerance=1.0,
        better="higher",
        comparison="difference",
        rival="dense",
        min_seeds=3,
        budget="embedded study: 5 seeds, about 40 minutes on 2 cores",
        needs="a dense run",
    ),
    Claim(
        id="accuracy-vs-masked",
        statement="Training with sparse kernels ends as accurate as with masked dense convolutions",
        published=(0.0, 0.0),
        source="goal of this suite; the released code only masks",
        metric="accuracy",
        unit="points",
        tolerance=0.5,
        better="higher",
        comparison="difference",
        rival="masked",
        min_seeds=3,
        budget="backends study: 3 seeds, about 8 minutes on 2 cores",
        needs="a run on the masked reference",
    ),
    Claim(
        id="training-flops-saved",
        statement="Training needs 36.7 to 45.2 % fewer FLOPs than dense training",
        published=(36.7, 45.2),
        source=_SUMMARY,
        metric="training_flops",
        unit="%",
        tolerance=0.5,
        better="higher",
        comparison="saving",
        rival="dense",
        min_seeds=1,
        budget="quick study: 10 minutes on 2 cores",
        needs="a dense run",
    ),
    Claim(
        id="inference-flops-saved",
        statement="Inference needs 73.6 to 85.7 % fewer FLOPs than the dense network",
        published=(73.6, 85.7),
        source=_SUMMARY,
        metric="inference_flops_saved",
        unit="%",
        tolerance=0.5,
        better="higher",
        comparison="value",
        rival=None,
        min_seeds=1,
        budget="quick study: 10 minutes on 2 cores",
        needs="a ClickTrain run",
    ),
    Claim(
        id="accuracy-vs-pdt",
        statement="Accuracy is higher than that of pruning during training (PDT) in similar time",
        published=(0.0, math.inf),
        source=_ABSTRACT + " ('better'; no figure)",
        metric="accuracy",
        unit="points",
        tolerance=0.0,
        better="higher",
        comparison="difference",
        rival="pdt",
        min_seeds=3,
        budget="embedded study: 5 seeds, about 40 minutes on 2 cores",
        needs="PruneTrain",
    ),
    Claim(
        id="importance-vs-magnitude",
        statement="Importance from gradients gives better accuracy than from magnitude",
        published=(0.0, math.inf),
        source=_ABSTRACT + " ('accurate weight importance estimation'; no figure)",
        metric="accuracy",
        unit="points",
        tolerance=0.0,
        better="higher",
        comparison="difference",
        rival="magnitude",
        min_seeds=3,
        budget="selection study: 3 seeds, 2 hours on 2 cores",
        needs="the same method with magnitude scores",
    ),
    Claim(
        id="dynamic-vs-fixed-pool",
        statement="A pool of patterns chosen for the network gives better accuracy than a fixed one",
        published=(0.0, math.inf),
        source=_ABSTRACT + " ('dynamic pattern generation and selection'; no figure)",
        metric="accuracy",
        unit="points",
        tolerance=0.0,
        better="higher",
        comparison="difference",
        rival="fixed-pool",
        min_seeds=3,
        budget="selection study: 3 seeds, 2 hours on 2 cores",
        needs="the same method with a fixed pool of equal size",
    ),
    Claim(
        id="compression-vs-pdt",
        statement="Compression is higher than that of pruning during training (PDT) in similar time",
        published=(1.0, math.inf),
        source=_ABSTRACT + " ('better'; no figure)",
        metric="compression",
        unit="x",
        tolerance=0.0,
        better="higher",
        comparison="ratio",
        rival="pdt",
        min_seeds=3,
        budget="small study: 3 seeds, hours on 2 cores",
        needs="PruneTrain",
    ),
    Claim(
        id="budget-vs-hand-made",
        statement="Budgets shared out from one target give better accuracy than hand-made lists of ratios",
        published=(0.0, math.inf),
        source=_GOAL + "; the paper tunes the ratio of each layer by hand",
        metric="accuracy",
        unit="points",
        tolerance=0.0,
        better="higher",
        comparison="difference",
        rival="hand-made",
        min_seeds=3,
        budget="budgets study: 5 seeds, an hour on 2 cores",
        needs="the same method with a list of ratios of equal compression",
    ),
    Claim(
        id="fast-training-flops",
        statement="Early sparse training (fast) saves at least as many training FLOPs as the paper's best, 45.2 %",
        published=(45.2, math.inf),
        source=_GOAL,
        metric="training_flops",
        unit="%",
        tolerance=0.0,
        better="higher",
        comparison="saving",
        rival="dense",
        min_seeds=1,
        budget="quick study: 10 minutes on 2 cores",
        needs="ClickTrain with its preset fast",
        subject="fast",
    ),
    Claim(
        id="fast-accuracy",
        statement="Early sparse training (fast) is within half a point of the dense network",
        published=(0.0, 0.0),
        source=_GOAL,
        metric="accuracy",
        unit="points",
        tolerance=0.5,
        better="higher",
        comparison="difference",
        rival="dense",
        min_seeds=3,
        budget="embedded study: 5 seeds, about 40 minutes on 2 cores",
        needs="ClickTrain with its preset fast",
        subject="fast",
    ),
    Claim(
        id="fast-time",
        statement="Sparse training is faster on the clock: fast takes at most 0.7 of the dense network's time",
        published=(0.0, 0.7),
        source=_GOAL,
        metric="seconds",
        unit="x",
        tolerance=0.0,
        better="lower",
        comparison="ratio",
        rival="dense",
        min_seeds=3,
        budget="embedded study: 5 seeds, about 40 minutes on 2 cores",
        needs="ClickTrain with its preset fast",
        exclusive=True,
        subject="fast",
    ),
    Claim(
        id="kernel-speedup",
        statement="Sparse convolutions are up to 4.5x faster than dense and sparse GEMM libraries (GPU)",
        published=(4.5, 4.5),
        source=_SUMMARY,
        metric=KERNEL_SPEEDUP,
        unit="x",
        tolerance=0.2,
        better="higher",
        comparison="value",
        rival=None,
        min_seeds=1,
        budget="python -m bench.gpu: 8 minutes",
        needs="python -m bench.gpu",
        hardware="cuda",
        exclusive=True,
    ),
    Claim(
        id="kernel-speedup-cpu",
        statement="Sparse convolutions are up to 4.5x faster than the fastest dense ones (CPU)",
        published=(4.5, 4.5),
        source=_SUMMARY + "; there for unnamed hardware",
        metric=KERNEL_SPEEDUP,
        unit="x",
        tolerance=0.2,
        better="higher",
        comparison="value",
        rival=None,
        min_seeds=1,
        budget="python -m bench.cpu: 20 minutes",
        needs="python -m bench.cpu",
        exclusive=True,
    ),
)


def _top1(config: OfficialConfig) -> Claim:
    """Return the claim that a row of the released configurations makes: its best accuracy, at its compression."""
    best = max(config.reported, key=lambda result: result.top1)
    return Claim(
        id=f"top1-{config.name}@{config.row}",
        statement=f"{_DATA[config.dataset]} {config.model.upper()} at {config.row} reaches {best.top1:g} % top-1",
        published=(best.top1, best.top1),
        source=f"comment in the released configuration {config.name}, lambda {best.lam:g}: best epoch on the test set, "
        "one run, no seed",
        metric="accuracy_best",
        unit="%",
        tolerance=0.5,
        better="higher",
        comparison="mean",
        rival=None,
        min_seeds=3,
        budget="paper study: 190 epochs and 3 seeds, on a GPU",
        needs=f"a run of {config.address}",
        subject=config.address,
    )


_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}

CLAIMS: tuple[Claim, ...] = (*_CLAIMS, *(_top1(config) for config in official.ROWS if config.reported))

BY_ID = {claim.id: claim for claim in CLAIMS}
