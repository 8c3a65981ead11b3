"""Where a compiled model spends its time, layer by layer, and what its layers would take dense."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clicktrain import timing
from clicktrain.assignment import Assignment
from clicktrain.deploy.choice import dense_ms
from clicktrain.deploy.compiled import CompiledModel
from clicktrain.deploy.engine import Engine
from clicktrain.deploy.graph import Node
from clicktrain.errors import InvalidArgument, MissingPackage


@dataclass(frozen=True)
class LayerTime:
    """Time of one operation.

    Attributes
    ----------
    number : int
        Of the node.
    op, shape : str
        What it does, and the shape of its result for one image.
    density : float or None
        Kept weights / weights; None for what has no weights.
    ms : float
        Median milliseconds for a batch, repacking before it included.
    share : float
        Of the whole time.
    share_of_peak : float or None
        Multiply-adds of kept weights over those that the machine could do in the same time; more than 1 where a layer
        needs fewer of them (padding, Winograd's transform).
    dense_ms : float or None
        Median milliseconds of torch for the convolution with all weights, channels_last; None for the rest.
    """

    number: int
    op: str
    shape: str
    density: float | None
    ms: float
    share: float
    share_of_peak: float | None
    dense_ms: float | None


@dataclass(frozen=True)
class Profile:
    """Times of a model.

    Attributes
    ----------
    batch : int
        Images.
    total_ms : float
        Of the steps together.
    rounds : int
        Runs that the medians are taken over.
    peak_gflops : float
        What the machine can do, measured beside.
    layers : list of LayerTime
        In the order in which they run.
    """

    batch: int
    total_ms: float
    rounds: int
    peak_gflops: float
    layers: list[LayerTime]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Return a table."""
        head = (
            f"{'':4}{'operation':15}{'result':14}{'kept':>7}{'ms':>9}{'share':>7}{'peak':>7}{'dense ms':>10}{'gain':>7}"
        )
        lines = [head]
        for layer in self.layers:
            gain = "" if layer.dense_ms is None else f"{layer.dense_ms / layer.ms:6.1f}x"
            lines.append(
                f"{layer.number:<4}{layer.op:15}{layer.shape:14}{_percent(layer.density):>7}{layer.ms:9.3f}"
                f"{_percent(layer.share):>7}{_percent(layer.share_of_peak):>7}"
                f"{'' if layer.dense_ms is None else f'{layer.dense_ms:.3f}':>10}{gain:>7}"
            )
        total = f"{self.total_ms:.3f} ms for a batch of {self.batch}, median of {self.rounds} runs"
        return "\n".join([*lines, f"{total}; the machine's peak: {self.peak_gflops:.0f} GFLOP/s"])


def profile(model: CompiledModel, rounds: int = 15) -> Profile:
    """Time every operation of a compiled model on random images."""
    if rounds < 1:
        raise InvalidArgument(f"rounds={rounds}: expected at least 1")
    if not isinstance(model.engine, Engine):
        raise InvalidArgument(f"model is on {model.device}: expected one that was compiled or loaded for the cpu")
    engine, nodes, peak = model.engine, model.graph.nodes, timing.peak()
    ms = engine.times_ms(torch.randn(model.input_shape), rounds)
    measured = timing.compare({"peak": timing.Contender(peak.run, None)}, None, rounds=rounds)
    gflops = peak.flops / measured["peak"].median_ms / 1e6
    total = sum(ms.values())
    pooled = {node.inputs[0] for number, node in nodes.items() if node.op == "pool" and number not in ms}
    layers = []
    for number, time in sorted(ms.items(), key=lambda entry: list(nodes).index(entry[0])):
        node = nodes[number]
        op, shape = (
            ("dense " * node.is_dense) + node.op + ("+relu" * node.relu) + ("+pool" * (number in pooled)),
            "x".join(map(str, node.shape or ())),
        )
        of_peak = 2 * node.macs * model.batch / (time * 1e6) / gflops if node.macs else None
        dense = dense_ms(model.graph, node, model.batch, rounds) if node.op == "conv" else None
        layers.append(LayerTime(number, op, shape, _density(node), time, time / total, of_peak, dense))
    return Profile(model.batch, total, rounds, gflops, layers)


def plot(made: Profile, path: str | os.PathLike[str]) -> None:
    """Draw the convolutions, sparse beside dense.

    Raises
    ------
    MissingPackage
        Without the extra `report`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("a plot needs matplotlib: pip install 'clicktrain[report]'") from error
    layers = [layer for layer in made.layers if layer.dense_ms is not None]
    figure = Figure(figsize=(max(6.0, 0.6 * len(layers)), 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.bar([p - 0.2 for p in places], [layer.dense_ms or 0 for layer in layers], 0.4, label="dense (torch)")
    axes.bar([p + 0.2 for p in places], [layer.ms for layer in layers], 0.4, label="compiled")
    axes.set_xticks(list(places), [f"{layer.number}\n{layer.shape}" for layer in layers], fontsize=7)
    axes.set_ylabel(f"ms for a batch of {made.batch}")
    axes.legend()
    figure.savefig(path)


def _density(node: Node) -> float | None:
    if node.op != "conv":
        return None
    return Assignment(node.tensors["assignment"], node.pool).density


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
