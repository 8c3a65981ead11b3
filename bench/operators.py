"""Every convolution operator on the layers of four networks: `python -m bench.operators [--quick] [--out FILE]`.

All operators that run on this machine compute exactly the same pruned layer, forward, in the same rounds; each is
compared with the fastest dense float32 convolution of these rounds. Three compressions are those of the paper; the
higher ones tell at which density a sparse library starts to pay: a product of matrices with its columns given against
the dense product, and with im2col against the best dense convolution.

It takes long. `--minutes` ends it early, and with the same `--out` it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from baselines.operators import OPERATORS
from bench.problems import problem
from bench.suite.workloads import COMPRESSIONS, RESNET18, RESNET32, RESNET50_POINTWISE, VGG13, Workload
from clicktrain import provenance, timing
from clicktrain.errors import DataError
from clicktrain.files import write_atomic

NETWORKS = {"vgg13": VGG13, "resnet32": RESNET32, "resnet18": RESNET18, "resnet50": RESNET50_POINTWISE}
"""Layers; the 3x3 layers of ResNet-50 are those of ResNet-18."""
SPARSER = (16.2, 64.8)
"""Compressions for the crossover alone, where products are compared and not compiled code."""
DENSE = [name for name, operator in OPERATORS.items() if operator.kind == "dense" and operator.tolerance < 1e-4
         and not name.endswith("product")]  # fmt: skip
"""Whole dense convolutions in float32."""
DENSE_PRODUCT = "GEMM product"
LOOSEST = max(operator.tolerance for operator in OPERATORS.values())
SCHEMA = 1
NAME_WIDTH = 22


@dataclass(frozen=True)
class Row:
    """One layer at one compression.

    Attributes
    ----------
    network, layer, workload : str
        What was measured.
    compression, density : float
        As asked for, and the share of the weights that is kept.
    dense : str
        The dense float32 operator that was fastest.
    speedups : dict
        Operator -> times faster than that.
    product_speedups : dict
        Product of matrices -> times faster than the dense product.
    not_run : dict
        Operator -> why not.
    timings : list of dict
        Of every operator that ran.
    piece : int
        Which of the processes measured it.
    """

    network: str
    layer: str
    workload: str
    compression: float
    density: float
    dense: str
    speedups: dict[str, float]
    product_speedups: dict[str, float]
    not_run: dict[str, str]
    timings: list[dict[str, object]]
    piece: int = 0

    def __str__(self) -> str:
        figures = "".join(f"  {name} {value:.2f}x" for name, value in self.speedups.items() if name != self.dense)
        return f"{self.workload}, times faster than {self.dense}:{figures}"


@torch.inference_mode()
def measure(network: str, workload: Workload, rounds: int, piece: int = 0) -> Row:
    """Check and time all operators on a workload.

    Raises
    ------
    WrongResult
        If one of them is wrong by more than it may be.
    """
    asked = problem(workload)
    said = {name: operator.supports(asked) for name, operator in OPERATORS.items()}
    if workload.compression in SPARSER:
        said["dense compiled"] = "compiled code does not depend on the density"
    contenders = {name: OPERATORS[name].prepare(asked) for name, answer in said.items() if answer is True}
    times = timing.compare(
        contenders, asked.reference(), tolerance=LOOSEST, warmup_seconds=0.05, rounds=rounds, device=asked.device
    )
    for name, timed in times.timings.items():
        if not (timed.error or 0.0) <= OPERATORS[name].tolerance:
            raise timing.WrongResult(f"{name} is wrong: relative error {timed.error:.3g} on {workload.name}")
    best = times.best(*(name for name in DENSE if name in contenders))
    whole = [name for name in contenders if not name.endswith("product")]
    products = [name for name in contenders if name.endswith("product")]
    return Row(
        network, workload.shape.name, workload.name, workload.compression, float(asked.mask.float().mean()), best,
        {name: times.speedup(best, name) for name in whole},
        {name: times.speedup(DENSE_PRODUCT, name) for name in products},
        {name: answer for name, answer in said.items() if answer is not True},
        [timed.as_dict() for timed in times.timings.values()], piece,
    )  # fmt: skip


def workloads(networks: Iterable[str], batch: int, compressions: Sequence[float]) -> list[tuple[str, Workload]]:
    """Return what is measured, the paper's compressions first."""
    return [
        (network, Workload(shape, batch, compression))
        for compression in compressions
        for network in networks
        for shape in NETWORKS[network]
    ]


def crossover(points: Mapping[float, float]) -> float:
    """Return the density from which on down, through all that were measured, a sparse operator is the faster one.

    Parameters
    ----------
    points : mapping
        Density -> times faster than dense.

    Returns
    -------
    float
        Between two densities by interpolation of the logarithms; 0 where even the sparsest was slower, and the
        densest measured where all were faster.
    """
    ordered = sorted(points.items())
    if ordered[0][1] < 1:
        return 0.0
    for (density, faster), (denser, slower) in pairwise(ordered):
        if slower < 1:
            share = math.log(faster) / (math.log(faster) - math.log(slower))
            return math.exp(math.log(density) + share * (math.log(denser) - math.log(density)))
    return ordered[-1][0]


def crossovers(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return network -> operator that is not dense -> layer -> crossover."""
    points: dict[str, dict[str, dict[str, dict[float, float]]]] = {}
    for row in rows:
        for name, speedup in (row.speedups | row.product_speedups).items():
            if OPERATORS[name].kind != "dense":
                layers = points.setdefault(row.network, {}).setdefault(name, {})
                layers.setdefault(row.layer, {})[row.density] = speedup
    return {
        network: {name: {layer: crossover(p) for layer, p in layers.items()} for name, layers in by_name.items()}
        for network, by_name in points.items()
    }


def means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return "network compression" -> operator -> geometric mean over the layers of its speed-up over best dense."""
    found: dict[str, dict[str, float]] = {}
    for key in dict.fromkeys((row.network, row.compression) for row in rows):
        these = [row for row in rows if (row.network, row.compression) == key]
        names = [name for name in these[0].speedups if all(name in row.speedups for row in these)]
        found[f"{key[0]} {key[1]:g}x"] = {
            name: statistics.geometric_mean(row.speedups[name] for row in these) for name in names
        }
    return found


def read(path: Path | None) -> dict[str, Any]:
    """Return what a file holds of earlier pieces, or an empty report.

    Raises
    ------
    DataError
        It is not such a file.
    """
    if path is None or not path.exists():
        return {"schema": SCHEMA, "pieces": [], "rows": []}
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        known = report["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a report of bench.operators: {error}") from None
    if not known:
        raise DataError(f"{path}: schema {report['schema']}, expected {SCHEMA}")
    return report


def show(rows: Sequence[Row]) -> None:
    """Print the means by network and compression, and the crossovers."""
    for title, by_name in means(rows).items():
        print(f"\n{title}, times faster than the best dense float32 operator of each layer (geometric mean)")
        for name, mean in sorted(by_name.items(), key=lambda pair: -pair[1]):
            print(f"  {name:{NAME_WIDTH}}{mean:8.2f}x")
    for network, operators in crossovers(rows).items():
        print(f"\n{network}, density below which it beats dense: median layer, least and most")
        for name, layers in operators.items():
            low, middle, high = min(layers.values()), statistics.median(layers.values()), max(layers.values())
            print(f"  {name:{NAME_WIDTH}}{middle:8.1%}{low:8.1%}{high:8.1%}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 where the file to go on with is another one."""
    options = _parse(arguments)
    try:
        report = read(options.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [Row(**row) for row in report["rows"]]
    piece = {"provenance": provenance.collect(), "threads": asdict(timing.Threads.now()), "rounds": options.rounds}
    report["pieces"].append(piece)
    done = {(row.network, row.workload) for row in rows}
    wanted = workloads(options.network or NETWORKS, options.batch, (*COMPRESSIONS, *SPARSER))[
        : 1 if options.quick else None
    ]
    missing = [(network, workload) for network, workload in wanted if (network, workload.name) not in done]
    start = time.perf_counter()
    for index, (network, workload) in enumerate(missing):
        if time.perf_counter() - start > options.minutes * 60:
            print(f"{len(missing) - index} workloads are left, the time is over: the same command goes on")
            break
        rows.append(measure(network, workload, options.rounds, len(report["pieces"]) - 1))
        print(rows[-1], flush=True)
        report |= {"rows": [asdict(row) for row in rows], "means": means(rows), "crossovers": crossovers(rows)}
        if options.out is not None:
            write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    show(rows)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.operators", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one layer: proves that it runs")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only this one; repeatable")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each operator (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop before the next layer after so long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, or go on with this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
