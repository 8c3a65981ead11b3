"""Tables of what the benchmarks of CPUs measured, from their stored records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reproductions import paths
from reproductions.wording import MISSING, Table

_COSTS = {"load_ms": 0, "peak_mb": 0, "file_mb": 1}
_ENGINES = (
    "network", "engine", "ms", "times slower than clicktrain", "error", "loads in, ms", "peak memory, MB", "file, MB",
)  # fmt: skip


def kernels() -> list[Table]:
    """Return the goals of `bench.cpu` and `bench.training`, a column for each stored record, and the operators."""
    return [table for table in (_goals(), _training(), *_operators()) if table[2]]


def inference() -> list[Table]:
    """Return what `bench.inference` measured of whole networks, a table for each stored record."""
    return [_inference(name, record) for name, record in _records("inference*.json").items()]


def _records(names: str) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(paths.BENCHMARKS.glob(names))}


def _machine(name: str, record: Any) -> str:
    made = record["provenance"]
    commit = made["code"]["commit"][:7]
    cpu = ", ".join(made["cpu"][key] for key in ("model", "signature") if key in made["cpu"])
    return f"{cpu}, {made['threads']['torch']} threads (`bench/evidence/{name}`, commit {commit})"


def _with_peak(name: str, record: Any) -> str:
    return f"{_machine(name, record)}, {record['ceilings']['gflops']:.0f} GFLOP/s at most"


def _by_record(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Sequence[str]]:
    """Return a row for each goal: what to reach, and what each record reached of it."""
    goals = {goal["name"]: goal["at_least"] for goals in found.values() for goal in goals}
    reached = [{goal["name"]: goal["reached"] for goal in goals} for goals in found.values()]
    return [
        [name, f"{least:g}x", *(_against(least, of_record.get(name)) for of_record in reached)]
        for name, least in goals.items()
    ]


def _against(goal: float, reached: float | None) -> str:
    if reached is None:
        return MISSING
    return f"{reached:.2f}x{'' if reached >= goal else ' (missed)'}"


def _goals() -> Table:
    records = _records("cpu*.json")
    machines = "; ".join(_with_peak(name, record) for name, record in records.items())
    title = (
        "Sparse convolutions on CPUs: times faster than the better dense layout of torch for each layer, geometric "
        f"means over the layers of a goal. {machines}:"
    )
    return title, ("layers", "goal", *records), _by_record({name: record["goals"] for name, record in records.items()})


def _training() -> Table:
    records = _records("training*.json")
    machines = "; ".join(_with_peak(name, record) for name, record in records.items())
    title = (
        "Training steps of VGG-13 at 9.0x, batch 64: times that the sparse one is faster than the best dense one of "
        "torch (NCHW, channels_last, torch.compile), as torch handles memory and with a C library that keeps it. "
        f"{machines}:"
    )
    found = {name: list(record["times"].values()) for name, record in records.items()}
    return title, ("step", "goal", *records), _by_record(found)


def _operators() -> list[Table]:
    """Return how fast all convolution operators are at equal sparsity, and where sparse ones begin to pay."""
    (record,) = _records("operators.json").values() or [None]
    if record is None:
        return []
    names = list(dict.fromkeys(name for means in record["means"].values() for name in means))
    rows = [[key, *(_times(means, name) for name in names)] for key, means in record["means"].items()]
    title = (
        "Convolution operators of every kind on the same weights: times faster than the best dense float32 one of each "
        f"layer, geometric means, batch 8, {_machine('operators.json', record['pieces'][0])}:"
    )
    crossing = record["crossovers"]
    sparse = list(dict.fromkeys(name for operators in crossing.values() for name in operators))
    densities = [
        [network, *(_median(operators.get(name)) for name in sparse)] for network, operators in crossing.items()
    ]
    below = (
        "Density below which a sparse operator is the faster one, of the median layer (44 % is the densest that was "
        "measured; 'product': without im2col, beside the dense product):"
    )
    return [(title, ("network, compression", *names), rows), (below, ("network", *sparse), densities)]


def _times(means: Mapping[str, float], key: str) -> str:
    return f"{means[key]:.2f}x" if key in means else MISSING


def _median(densities: Mapping[str, float] | None) -> str:
    return MISSING if densities is None else f"{100 * statistics.median(densities.values()):.1f} %"


def _inference(name: str, record: Any) -> Table:
    title = f"Inference of pruned networks, {_machine(name, record)}, medians of interleaved runs:"
    rows = [_engine_row(row, timing) for row in record["rows"] for timing in row["timings"] if timing["name"] != "peak"]
    return title, _ENGINES, rows


def _engine_row(row: Mapping[str, Any], timing: Mapping[str, Any]) -> Sequence[str]:
    name = timing["name"]
    speedup, goal, cost = row["speedup"].get(name), row["goals"].get(name), row["costs"].get(name, {})
    times = "" if speedup is None else f"{speedup:.2f}x"
    if goal is not None:
        times += f" (goal {goal:.1f}x{'' if speedup >= goal else ', missed'})"
    costs = [f"{cost[key]:.{digits}f}" if key in cost else "" for key, digits in _COSTS.items()]
    return (
        f"{row['network']}, {row['compression']:.1f}x, batch {row['batch']}",
        name,
        f"{timing['median_ms']:.2f}",
        times,
        f"{timing['error']:.0e}",
        *costs,
    )
