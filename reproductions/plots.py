"""Plots of a study as SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import pairwise

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.store import Run, Study
from reproductions.summary import MethodSummary, summarize

# Matplotlib knows only fixed colours: these stand-ins become variables of the page's style sheet.
_INK, _GRID = "#010101", "#020202"
SERIES = 8
"""Colours for methods, the style sheet's --series-0 and so on; from there on dashes and markers differ."""
_DASHES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")
_SERIES = [f"#0{number}0{number}ff" for number in range(SERIES)]
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES)
}
_STYLE = {
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


def accuracy_over_time(study: Study) -> str:
    """Return test accuracy over training time; the first seed strong, the others faint, stage changes dotted."""
    return _svg(study, "time", lambda axes: _draw_accuracy_over_time(axes, study))


def accuracy_over_compression(study: Study) -> str:
    """Return mean test accuracy over compression, with the standard deviation over seeds."""
    return _svg(study, "compression", lambda axes: _draw_accuracy_over_compression(axes, study))


def seconds_by_stage(study: Study) -> str:
    """Return the training time of each method, stacked by stage, mean over seeds."""
    return _svg(study, "stages", lambda axes: _draw_seconds_by_stage(axes, study))


def _look(index: int) -> tuple[str, str, str]:
    """Return colour, dashes and marker of the method at a place in the preset."""
    turn = index // SERIES % len(_DASHES)
    return _SERIES[index % SERIES], _DASHES[turn], _MARKERS[turn]


def _draw_accuracy_over_time(axes: Axes, study: Study) -> None:
    for index, row in enumerate(study.preset.methods):
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
    accuracies = sorted(float(value) for line in axes.lines for value in line.get_ydata())  # type: ignore[union-attr]
    if accuracies:
        median, best = accuracies[len(accuracies) // 2], accuracies[-1]
        axes.set_ylim(bottom=max(0.0, best - 4 * max(best - median, 0.5)))


def _draw_accuracy_over_compression(axes: Axes, study: Study) -> None:
    for index, summary in enumerate(summarize(study)):
        if summary.n:
            _draw_point(axes, index, summary)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("compression (convolution weights / kept)")
    axes.set_ylabel("test accuracy, %")
    _legend(axes, "best")


def _draw_point(axes: Axes, index: int, summary: MethodSummary) -> None:
    accuracy, compression = summary.figures["accuracy"], summary.figures["compression"]
    color, _, marker = _look(index)
    error = accuracy.std if summary.n > 1 else None
    place = compression.mean, accuracy.mean, error
    axes.errorbar(*place, fmt=marker, capsize=3, color=color, label=summary.row.name)


def _legend(axes: Axes, place: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, ncols=1 if len(axes.get_legend_handles_labels()[0]) <= SERIES else 2)


def _draw_seconds_by_stage(axes: Axes, study: Study) -> None:
    rows = [(index, row, study.of(row.name)) for index, row in enumerate(study.preset.methods)]
    for place, (index, _, runs) in enumerate(rows):
        left = 0.0
        for number, stage in enumerate(runs[0].result["stages"] if runs else []):
            times = [run.result["stages"][number] for run in runs]
            width = sum(time["steps"] * time["median_step_seconds"] for time in times) / len(times)
            axes.barh(place, width, left=left, color=_look(index)[0], alpha=1 - 0.3 * number, height=0.6)
            axes.text(left + width / 2, place - 0.45, stage["name"], ha="center", fontsize=7)
            left += width
    axes.set_yticks(range(len(rows)), [row.name for _, row, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("training time by stage, seconds")


def _svg(study: Study, name: str, draw: Callable[[Axes], None]) -> str:
    """Return an inline SVG element: scalable, without fixed colours, fonts or repeated ids."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": f"{study.directory.name}-{name}"}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    for fixed, variable in _VARIABLES.items():
        svg = svg.replace(fixed, variable)
    return svg
