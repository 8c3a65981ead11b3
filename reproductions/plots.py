"""Plots of a study as SVG that follows the page's light or dark colours."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions import arithmetic, matching
from reproductions.claims import BY_ID
from reproductions.kernels import Benchmark
from reproductions.preset import MethodRow
from reproductions.store import Run, Study
from reproductions.summary import MethodSummary, summarize

# Matplotlib knows only fixed colours: these stand-ins become variables of the page's style sheet.
_INK, _GRID = "#010101", "#020202"
_NARROW = 0.13  # of the widest bar: a stage that takes less has no room for its name
SERIES = 8
"""Colours for methods, the style sheet's --series-0 and so on; from there on dashes and markers differ."""
_DASHES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")
_SERIES = [f"#0{number}0{number}ff" for number in range(SERIES)]
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES)
}
_STYLE: dict[Any, object] = {  # Any: matplotlib names all its keys, and more with every release
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "savefig.transparent": True,
}


Rows = Sequence[MethodRow]
"""Methods that are drawn together, in the order of their colours."""


def accuracy_over_time(study: Study, rows: Rows) -> str:
    """Return test accuracy over training time; the first seed strong, the others faint, stage changes dotted."""
    return _svg(lambda axes: _draw_accuracy_over_time(axes, study, rows))


def accuracy_over_compression(study: Study, rows: Rows) -> str:
    """Return mean test accuracy over compression, with the standard deviation over seeds."""
    return _svg(lambda axes: _draw_accuracy_over_compression(axes, study, rows))


def accuracy_against_time(study: Study, rows: Rows) -> str:
    """Return mean test accuracy over the time of the whole training, with the standard deviation over seeds."""
    return _svg(lambda axes: _draw_accuracy_against_time(axes, study, rows))


def seconds_by_stage(study: Study, rows: Rows) -> str:
    """Return the training time of each method, stacked by stage, mean over seeds."""
    return _svg(lambda axes: _draw_by_stage(axes, study, rows, _stage_seconds, "training time by stage, seconds"))


def flops_by_stage(study: Study, rows: Rows) -> str:
    """Return the training FLOPs of each method, stacked by stage, mean over seeds."""
    return _svg(lambda axes: _draw_by_stage(axes, study, rows, _stage_tflops, "training TFLOPs by stage"))


def layer_density(study: Study, rows: Rows) -> str | None:
    """Return how much each method keeps of each layer, mean over seeds; None where no result tells."""
    kept = {row.name: _kept_by_layer(study, row) for row in rows}
    if not any(kept.values()):
        return None
    return _svg(lambda axes: _draw_layer_density(axes, rows, kept))


def kernel_bars(benchmark: Benchmark) -> str:
    """Return how many times faster than the fastest library each layer is, with the others and the claim as marks."""
    height = 1.2 + 0.2 * len(benchmark.layers)
    return _svg(lambda axes: _draw_kernel_bars(axes, benchmark), (7.2, height))


def accountings() -> str:
    """Return the training FLOPs saved by each released configuration, by schedule and accounting."""
    return _svg(_draw_accountings)


def run_accuracy(run: Run) -> str:
    """Return validation and test accuracy of a run by epoch."""
    return _svg(lambda axes: _draw_run_accuracy(axes, run))


def run_layers(run: Run) -> str | None:
    """Return how much a run keeps of each layer; None where its result does not tell."""
    layers = run.result.get("layers")
    if not layers:
        return None
    return _svg(lambda axes: _draw_run_layers(axes, layers), (5.2, 1 + 0.18 * len(layers)))


def _look(index: int) -> tuple[str, str, str]:
    """Return colour, dashes and marker of the method at a place in the preset."""
    turn = index // SERIES % len(_DASHES)
    return _SERIES[index % SERIES], _DASHES[turn], _MARKERS[turn]


def _draw_accuracy_over_time(axes: Axes, study: Study, rows: Rows) -> None:
    for index, row in enumerate(rows):
        color, dashes, marker = _look(index)
        for number, run in enumerate(study.of(row.name)):
            records = [record for record in run.epochs if record["test_accuracy"] is not None]
            seconds = _elapsed(run, [record["epoch"] for record in records])
            accuracies = [record["test_accuracy"] for record in records]
            label = row.name if number == 0 else None
            axes.plot(seconds, accuracies, dashes, color=color, alpha=0.3 if number else 1.0, label=label)
            if number == 0:
                changes = [place for place, (a, b) in enumerate(pairwise(records), 1) if a["stage"] != b["stage"]]
                points = [seconds[place] for place in changes], [accuracies[place] for place in changes]
                axes.plot(*points, marker, color=color, markersize=5)
    axes.set_xlabel("training time, seconds (dots: first epoch of a stage)")
    axes.set_ylabel("test accuracy, %")
    _focus_on_top(axes)
    _legend(axes, "lower right")


def _elapsed(run: Run, epochs: list[int]) -> list[float]:
    """Return the training time at the end of the given epochs."""
    elapsed, total = {}, 0.0
    for record in run.epochs:
        total += record["train_seconds"]
        elapsed[record["epoch"]] = total
    return [elapsed[epoch] for epoch in epochs]


def _focus_on_top(axes: Axes) -> None:
    """Leave out most of the climb of the first epochs, which would squeeze what is compared into a line."""
    accuracies = sorted(float(value) for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float))
    if accuracies:
        median, best = accuracies[len(accuracies) // 2], accuracies[-1]
        axes.set_ylim(bottom=max(0.0, best - 4 * max(best - median, 0.5)))


def _draw_accuracy_over_compression(axes: Axes, study: Study, rows: Rows) -> None:
    _draw_trade_off(axes, study, rows, lambda summary: summary.figures["compression"].mean)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("compression (convolution weights / kept)")


def _draw_accuracy_against_time(axes: Axes, study: Study, rows: Rows) -> None:
    _draw_trade_off(axes, study, rows, lambda summary: summary.time_ratio.mean if summary.time_ratio else math.nan)
    for label, place in matching.phases(study).items():
        axes.axvline(place, color=_INK, linewidth=0.8, linestyle=":")
        axes.text(place, axes.get_ylim()[0], f"{label} ", fontsize=7, rotation=90, ha="right", va="bottom")
    axes.set_xlabel("time of the training / that of the dense network")


def _draw_trade_off(axes: Axes, study: Study, rows: Rows, place: Callable[[MethodSummary], float]) -> None:
    names = [row.name for row in rows]
    for summary in summarize(study):
        if summary.n and summary.row.name in names:
            accuracy = summary.figures["accuracy"]
            color, _, marker = _look(names.index(summary.row.name))
            error = accuracy.std if summary.n > 1 else None
            axes.errorbar(
                place(summary), accuracy.mean, error, fmt=marker, capsize=3, color=color, label=summary.row.name
            )
    axes.set_ylabel("test accuracy, %")
    _legend(axes, "best")


def _legend(axes: Axes, place: Literal["best", "lower right"]) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, ncols=1 if len(axes.get_legend_handles_labels()[0]) <= SERIES else 2)


def _stage_seconds(run: Run, stage: dict[str, Any]) -> float:
    return float(stage["steps"] * stage["median_step_seconds"])


def _stage_tflops(run: Run, stage: dict[str, Any]) -> float:
    return float(run.result["training_flops"]["by_stage"][stage["name"]] / 1e12)


def _draw_by_stage(
    axes: Axes, study: Study, rows: Rows, width: Callable[[Run, dict[str, Any]], float], label: str
) -> None:
    labels, widest = list[tuple[float, float, str, float]](), 0.0
    for place, row in enumerate(rows):
        left, runs = 0.0, study.of(row.name)
        for number, stage in enumerate(runs[0].result["stages"] if runs else []):
            mean = sum(width(run, run.result["stages"][number]) for run in runs) / len(runs)
            axes.barh(place, mean, left=left, color=_look(place)[0], alpha=1 - 0.3 * number, height=0.6)
            labels.append((left + mean / 2, place - 0.45, stage["name"], mean))
            left += mean
        widest = max(widest, left)
    for x, y, name, mean in labels:
        if mean > _NARROW * widest:
            axes.text(x, y, name, ha="center", fontsize=7)
    _name_rows(axes, [row.name for row in rows])
    axes.set_xlabel(label)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _kept_by_layer(study: Study, row: MethodRow) -> dict[str, float]:
    """Return by layer the percent of weights kept, mean over the seeds whose results tell."""
    found: dict[str, list[float]] = {}
    for run in study.of(row.name):
        for layer in run.result.get("layers", []):
            found.setdefault(layer["name"], []).append(100 * layer["kept"] / layer["weights"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _draw_layer_density(axes: Axes, rows: Rows, kept: dict[str, dict[str, float]]) -> None:
    longest = max(kept.values(), key=len)
    for index, row in enumerate(rows):
        if kept[row.name] and row.role != "dense":
            color, dashes, marker = _look(index)
            values = [kept[row.name].get(name, 0.0) for name in longest]
            axes.plot(range(len(values)), values, dashes, marker=marker, markersize=3, color=color, label=row.name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(longest)), list(longest), rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("weights kept, %")
    _legend(axes, "best")


def _draw_kernel_bars(axes: Axes, benchmark: Benchmark) -> None:
    places = range(len(benchmark.layers))
    axes.barh(places, [layer.least for layer in benchmark.layers], color=_SERIES[2], height=0.6)
    for number, name in enumerate(benchmark.layers[0].speedups):
        values = [layer.speedups.get(name, math.nan) for layer in benchmark.layers]
        axes.plot(values, places, _MARKERS[number % len(_MARKERS)], color=_SERIES[1], markersize=4, label=name)
    axes.axvline(1.0, color=_INK, linewidth=1, label="as fast as the fastest library")
    axes.axvline(BY_ID["kernel-speedup"].published[0], color=_INK, linewidth=1, linestyle="--", label="published")
    _name_rows(axes, [layer.name for layer in benchmark.layers])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(benchmark.layers) - 0.4, -0.6)  # a margin in percent would be several bars wide
    axes.set_xlabel("times faster, forward")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _draw_accountings(axes: Axes) -> None:
    found = arithmetic.groups()
    axes.axvspan(*arithmetic.PUBLISHED_TRAINING, color=_GRID, alpha=0.6, label="published range")
    for place, group in enumerate(found):
        color = _SERIES[2 if group.schedule == "released" else 3]
        axes.plot(group.savings, [place] * len(group.savings), "o", color=color, markersize=4, alpha=0.6)
    _name_rows(axes, [group.name for group in found])
    axes.set_xlabel("training FLOPs saved, % (a dot: one released configuration)")
    axes.legend(loc="upper right")


def _draw_run_accuracy(axes: Axes, run: Run) -> None:
    for index, split in enumerate(("val", "test")):
        records = [record for record in run.epochs if record.get(f"{split}_accuracy") is not None]
        values = [record[f"{split}_accuracy"] for record in records]
        axes.plot([record["epoch"] + 1 for record in records], values, color=_look(index + 1)[0], label=split)
    for earlier, later in pairwise(run.epochs):
        if earlier["stage"] != later["stage"]:
            axes.axvline(later["epoch"] + 0.5, color=_INK, linewidth=0.8, linestyle=":")
            axes.text(later["epoch"] + 0.6, axes.get_ylim()[0], later["stage"], fontsize=7, va="bottom")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    _legend(axes, "lower right")


def _draw_run_layers(axes: Axes, layers: Sequence[dict[str, Any]]) -> None:
    axes.barh(
        range(len(layers)), [100 * each["kept"] / each["weights"] for each in layers], color=_SERIES[2], height=0.6
    )
    _name_rows(axes, [layer["name"] for layer in layers])
    axes.set_xlabel("weights kept, %")


def _svg(draw: Callable[[Axes], object], size: tuple[float, float] = (5.2, 3.4)) -> str:
    """Return an inline SVG element: scalable, without fixed colours, fonts or repeated ids."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": "clicktrain"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    svg = _with_own_ids(svg)
    for fixed, variable in _VARIABLES.items():
        svg = svg.replace(fixed, variable)
    return svg


def _with_own_ids(svg: str) -> str:
    """Begin the ids that are left (clips and markers) with a hash of the drawing: pages hold several."""
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(?<= id=")', f"i{prefix}-", svg)
    return re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"i{prefix}-", svg)
