"""The paper's claims, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


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
    comparison : {"value", "saving", "difference", "ratio", "speedup"}
        The figure itself; 100 * (1 - ours / rival); ours - rival; ours / rival; rival / ours. All but the
        first are paired by seed. The first two are exact counts.
    rival : str or None
        Name under which a preset's method lists the method it is compared with; None for "value".
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
    """

    id: str
    statement: str
    published: tuple[float, float]
    source: str
    metric: str
    unit: str
    tolerance: float
    better: Literal["higher", "lower"]
    comparison: Literal["value", "saving", "difference", "ratio", "speedup"]
    rival: str | None
    min_seeds: int
    budget: str
    needs: str
    hardware: Literal["any", "cuda"] = "any"
    exclusive: bool = False


_ABSTRACT = "abstract, arXiv 2011.10170"
_SUMMARY = "public summary of the paper, not checked against its tables"

CLAIMS: tuple[Claim, ...] = (
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
        id="kernel-speedup",
        statement="Sparse convolutions are up to 4.5x faster than dense and sparse GEMM libraries",
        published=(4.5, 4.5),
        source=_SUMMARY,
        metric="kernel_speedup",
        unit="x",
        tolerance=0.2,
        better="higher",
        comparison="value",
        rival=None,
        min_seeds=1,
        budget="kernel benchmarks: minutes",
        needs="the kernel benchmarks",
        exclusive=True,
    ),
)

BY_ID = {claim.id: claim for claim in CLAIMS}
