"""What PruneTrain's reconfiguration saves: `python -m bench.reconfiguration [--out FILE]`.

Channels of VGG-13 are made dead, the method removes them, and a training step of the smaller dense network is timed
beside that of the whole one, in the same rounds and in the faster of torch's memory formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from baselines import PruneTrain
from clicktrain import models, provenance, timing
from clicktrain.files import write_atomic
from clicktrain.flops import layer_costs

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the channels that live, in every layer."""
IMAGE = (3, 32, 32)
CLASSES = 10
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """A reconfigured network.

    Attributes
    ----------
    share : float
        Of the channels that lived.
    parameters, macs : int
        Of the network that is left; multiply-accumulates for one image.
    layout : str
        The memory format in which its step was faster.
    step_ms : float
        Median time of a training step.
    speedup : float
        Times faster than the step of the whole network, median over the rounds.
    """

    share: float
    parameters: int
    macs: int
    layout: str
    step_ms: float
    speedup: float

    def __str__(self) -> str:
        return (
            f"{self.share:5.0%} of the channels: {self.parameters:10,} parameters {self.macs:12,} MACs  "
            f"step {self.step_ms:8.2f} ms  {self.speedup:5.2f}x  {self.layout}"
        )


def reconfigured(share: float, width: float = 1.0) -> nn.Module:
    """Return VGG-13 after a reconfiguration that found only a share of the channels of each layer alive."""
    torch.manual_seed(0)
    model = models.create("vgg13", CLASSES, width=width)
    method = PruneTrain(epochs=1, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method.setup(model, optimizer, torch.zeros(1, *IMAGE))
    with torch.no_grad():
        for name in method.layers:
            weight, graph = method.layer(name).weight, method.graph
            if not graph.groups[graph.writes[name]].is_output:
                weight[round(share * len(weight)) :] = 0
            if not graph.groups[graph.reads[name]].is_image:
                weight[:, round(share * weight.shape[1]) :] = 0
    method.reconfigure()
    return model


def measure(shares: Sequence[float], width: float, batch: int, rounds: int) -> list[Row]:
    """Time a step of each network in each memory format; the first share is what the others are compared with."""
    networks = {share: reconfigured(share, width) for share in shares}
    contenders = {
        f"{share} {name}": _step(reconfigured(share, width).to(memory_format=layout), layout, batch)  # type: ignore[call-overload]
        for share in shares
        for name, layout in LAYOUTS.items()
    }
    times = timing.compare(contenders, None, warmup_seconds=0.3, rounds=rounds)
    best = {share: times.best(*(f"{share} {name}" for name in LAYOUTS)) for share in shares}
    return [
        Row(
            share,
            sum(parameter.numel() for parameter in network.parameters()),
            sum(cost.macs for cost in layer_costs(network, IMAGE)),
            best[share].split()[1],
            times[best[share]].median_ms,
            times.speedup(best[shares[0]], best[share]),
        )
        for share, network in networks.items()
    ]


def _step(model: nn.Module, layout: torch.memory_format, batch: int) -> timing.Contender:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch, *IMAGE).contiguous(memory_format=layout)
    y = torch.arange(batch) % CLASSES

    def step() -> None:
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return timing.Contender(step)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.reconfiguration", description=__doc__)
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of the channels (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each network (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(arguments)
    rows = measure(SHARES, options.width, options.batch, options.rounds)
    print(*rows, sep="\n")
    if options.out is not None:
        report = {
            "schema": 1,
            "provenance": provenance.collect(),
            "threads": asdict(timing.Threads.now()),
            "setting": {"width": options.width, "batch": options.batch, "rounds": options.rounds},
            "rows": [asdict(row) for row in rows],
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
