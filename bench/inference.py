"""Whole networks against other inference engines: `python -m bench.inference [--quick] [--out FILE]`.

The same pruned weights run compiled by `clicktrain.deploy`, dense in torch (channels_last), torch.compile,
onnxruntime and OpenVINO (extra `peers`). All are timed in the same rounds with the same number of threads, and each
is checked against torch first. `of peak` counts the multiply-adds of kept weights; Winograd's transform, which tuning
may choose, does fewer. deepsparse needs an environment of its own: `--deepsparse PYTHON` names its
interpreter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import clicktrain
from bench import engines, footprint
from bench.deepsparse_worker import Worker
from clicktrain import deploy, models, official, provenance, timing
from clicktrain.deploy import export
from clicktrain.errors import InvalidArgument
from clicktrain.files import write_atomic
from clicktrain.flops import layer_costs
from clicktrain.kernels.cpu import library
from clicktrain.selection import Sparsity, prunable_layers, select
from clicktrain.training.layout import use_channels_last

TOLERANCE = 1e-4
SETTLE_SECONDS = 0.02
OURS = "clicktrain"
FILES = {OURS: "model.clicktrain", "torch": "model.pt", "onnxruntime": "model.onnx", "openvino": "model.onnx"}
RIVALS = ("torch", "torch.compile", "onnxruntime", "openvino", "deepsparse")
DENSE = RIVALS[:-1]
"""Engines that gain nothing by zeros."""


@dataclass(frozen=True)
class Network:
    """A pruned network and the batches that it is timed with.

    Attributes
    ----------
    name, title : str
        Of the zoo, and for the reader, without its sparsity.
    image : int
        Height and width.
    sparsity : Sparsity
        Which kernels are pruned, by the magnitude of random weights.
    goals : dict
        Batch -> rival -> how many times faster to be.
    """

    name: str
    title: str
    image: int
    sparsity: Sparsity
    goals: dict[int, dict[str, float]]

    def at(self, compression: float) -> Network:
        """Return the network at another compression, without goals."""
        sparsity = replace(self.sparsity, target_compression=compression)
        return replace(self, sparsity=sparsity, goals={batch: {} for batch in self.goals})

    def build(self) -> nn.Module:
        """Return the network; normalisations have the statistics of a batch, so that results depend on the input."""
        torch.manual_seed(0)
        model = models.create(self.name, 10 if self.image == 32 else 1000, input_size=self.image)
        image = (3, self.image, self.image)
        scores = {name: layer.weight.detach() ** 2 for name, layer in prunable_layers(model, image).items()}
        chosen = select(scores, layer_costs(model, image), self.sparsity)
        clicktrain.convert(model, {name: selection.kept for name, selection in chosen.items()})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        with torch.no_grad():
            model.train()(torch.randn(8, 3, self.image, self.image))
        return model.eval()


_VGG13 = official.resolve("official:cifar10_vgg13@9.0x")
NETWORKS = {
    "vgg13": Network(
        "vgg13", "VGG-13", 32,
        Sparsity(ratios=_VGG13.ratios, pool="official", rank_by="kernel"),
        {
            32: {"onnxruntime": 4.0, "openvino": 4.0, "deepsparse": 1.5, "torch": 5.0},
            1: {"onnxruntime": 4.0, "openvino": 4.0, "deepsparse": 4.0, "torch": 4.0},
        },
    ),
    "resnet18": Network(
        "imagenet_resnet18", "ResNet-18, 224x224", 224, Sparsity(target_compression=6.0, pool="official"),
        {1: {}, 8: {}},
    ),
}  # fmt: skip


def rivals(model: nn.Module, x: Tensor, wanted: Sequence[str], folder: Path, python: str | None) -> dict[str, Any]:
    """Return for each wanted engine its contender, or why there is none; leaves the engines' files in a folder."""
    dense = use_channels_last(clicktrain.to_dense(model))
    torch.save(dense, folder / FILES["torch"])
    if set(wanted) - {"torch", "torch.compile"}:
        export.to_onnx(dense, x, folder / FILES["onnxruntime"])
    found: dict[str, Any] = {}
    for name in wanted:
        try:
            if name in engines.ENGINES:
                found[name] = _contender(engines.ENGINES[name](folder / FILES[name], x), x)
            elif name == "torch.compile":
                found[name] = _torch_compile(dense, x.contiguous(memory_format=torch.channels_last))
            else:
                found[name] = _deepsparse(dense, x, python, folder)
        except ImportError as error:
            found[name] = f"not installed: {error.name or error}"
        except OSError as error:
            found[name] = str(error)
    return found


def _contender(run: engines.Run, x: Tensor) -> timing.Contender:
    return timing.Contender(lambda: run(x), lambda y: cast(Tensor, y).clone())  # an engine may use its output again


def _torch_compile(dense: nn.Module, x: Tensor) -> timing.Contender:
    compiled = torch.compile(dense)
    return timing.Contender(torch.inference_mode()(lambda: compiled(x)))


def _deepsparse(dense: nn.Module, x: Tensor, python: str | None, folder: Path) -> timing.Contender:
    if python is None:
        raise OSError("not asked for: --deepsparse names the interpreter of its environment")
    path = folder / "deepsparse.onnx"  # it reads neither today's ONNX nor a batch of any size
    torch.onnx.export(dense, (x,), str(path), dynamo=False, opset_version=13, input_names=["input"])
    worker = Worker(python, path, x, folder, torch.get_num_threads())
    return timing.Contender(worker.run, lambda _: worker.result())


@torch.no_grad()
def measure(network: Network, batch: int, rounds: int, wanted: Sequence[str], python: str | None) -> dict[str, Any]:
    """Check and time one network at one batch size."""
    model = network.build()
    compression = _compression(model)  # engines may make the model dense
    x = torch.randn(batch, 3, network.image, network.image)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compiled = deploy.compile(model, x, strict=True, tune=True)
        compile_seconds = time.perf_counter() - started
        compiled.save(Path(folder) / FILES[OURS])
        found = rivals(model, x, wanted, Path(folder), python)
        running = {name: c for name, c in found.items() if isinstance(c, timing.Contender)}
        ours = _contender(engines.ENGINES[OURS](Path(folder) / FILES[OURS], x), x)
        peak = timing.peak()
        contenders = {OURS: ours, **running, "peak": timing.Contender(peak.run, None)}
        reference = clicktrain.to_dense(network.build())(x)
        times = timing.compare(contenders, reference, tolerance=TOLERANCE, rounds=rounds, settle_seconds=SETTLE_SECONDS)
        costs = _costs([name for name in (OURS, *running) if name in FILES], Path(folder), x)
    return {
        "network": network.title, "compression": compression, "batch": batch,
        "speedup": {name: times.speedup(name, OURS) for name in running},
        "share_of_peak": times.speedup("peak", OURS) * 2 * batch * compiled.macs / peak.flops,
        "goals": network.goals[batch],
        "not_run": {name: reason for name, reason in found.items() if isinstance(reason, str)},
        "timings": [timing_.as_dict() for timing_ in times.timings.values()],
        "compile_seconds": compile_seconds, "arena_bytes": compiled.arena_bytes, "costs": costs,
    }  # fmt: skip


def _compression(model: nn.Module) -> float:
    layers = [module for module in model.modules() if isinstance(module, clicktrain.PatternConv2d)]
    kept = sum(layer.values.numel() for layer in layers)
    assignments = [layer.get_assignment() for layer in layers]
    return sum(each.index.numel() * each.pool.kernel_size**2 for each in assignments) / kept


def crossovers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return from which compression on each network beats the best dense engine, between the measured ones."""
    lines = []
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        points = sorted(
            (row["compression"], min(row["speedup"][name] for name in DENSE if name in row["speedup"]))
            for row in rows
            if (row["network"], row["batch"]) == (network, batch)
        )
        least = min(speedup for _, speedup in points)
        lines.append(f"{network}, batch {batch}: {_crossover(points)}; never slower than {least:.2f}x of it")
    return lines


def _crossover(points: Sequence[tuple[float, float]]) -> str:
    """Return where the speed-up last passes 1 from below, interpolated."""
    for (low, before), (high, after) in reversed(list(pairwise(points))):
        if before < 1 <= after:
            return f"beats the best dense engine from {low + (high - low) * (1 - before) / (after - before):.1f}x on"
    if points[-1][1] < 1:
        return f"does not beat the best dense engine up to {points[-1][0]:.1f}x"
    return f"beats the best dense engine from {points[0][0]:.1f}x on, the least measured"


def _costs(names: Sequence[str], folder: Path, x: Tensor) -> dict[str, dict[str, float]]:
    """Return what each engine costs beside time: its file, loading it, and memory at peak."""
    costs = {}
    for name in names:
        path = folder / FILES[name]
        found = footprint.in_new_process(name, path, len(x), x.shape[-1])
        costs[name] = {"file_mb": path.stat().st_size / 1e6, **asdict(found)}
    return costs


def lines(row: dict[str, Any]) -> list[str]:
    """Return a row for the terminal."""
    ours = next(t for t in row["timings"] if t["name"] == OURS)
    text = [
        f"{row['network']} at {row['compression']:.1f}x, batch {row['batch']}: {ours['median_ms']:.2f} ms "
        f"(n={ours['n']}), {row['share_of_peak']:.0%} of peak, error {ours['error']:.1e}{_said(row['costs'].get(OURS))}"
    ]
    for name, speedup in row["speedup"].items():
        goal = row["goals"].get(name)
        verdict = "" if goal is None else f"  goal {goal:.1f}x  {'reached' if speedup >= goal else 'MISSED'}"
        other = next(t for t in row["timings"] if t["name"] == name)
        cost = _said(row["costs"].get(name))
        text.append(f"  {name:16}{other['median_ms']:9.2f} ms  {speedup:6.2f}x slower{cost}{verdict}")
    return text + [f"  {name:16}not run: {reason}" for name, reason in row["not_run"].items()]


def _said(cost: dict[str, float] | None) -> str:
    if cost is None:
        return ""
    return f", file {cost['file_mb']:.1f} MB, loads in {cost['load_ms']:.0f} ms, {cost['peak_mb']:.0f} MB at peak"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 where the CPU backend is not available or a network cannot be so sparse."""
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: proves that it runs, no more")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each contender (default %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--compressions", nargs="+", type=float, metavar="X", help="in place of the networks' own: where sparse wins"
    )
    batches = sorted({batch for network in NETWORKS.values() for batch in network.goals})
    parser.add_argument("--batches", nargs="+", type=int, choices=batches, help="only these batch sizes")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--deepsparse", metavar="PYTHON", help="interpreter of an environment with deepsparse 1.8")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(arguments)
    if (reason := library.available()) is not True:
        print(f"error: the CPU backend is not available: {reason}", file=sys.stderr)
        return 2
    rows = []
    chosen = [NETWORKS[name] for name in options.networks]
    if options.compressions:
        if named := [network.name for network in chosen if network.sparsity.target_compression is None]:
            reason = f"{', '.join(named)} has its ratios by layer; name others with --networks"
            print(f"error: --compressions: {reason}", file=sys.stderr)
            return 2
        chosen = [network.at(compression) for network in chosen for compression in options.compressions]
    for network in chosen:
        for batch in network.goals:
            if options.batches is None or batch in options.batches:
                rounds = 3 if options.quick else options.rounds
                try:
                    rows.append(measure(network, batch, rounds, options.rivals, options.deepsparse))
                except InvalidArgument as error:
                    print(f"error: {'--compressions: ' if options.compressions else ''}{error}", file=sys.stderr)
                    return 2
                print(*lines(rows[-1]), sep="\n", flush=True)
    if options.compressions:
        print(*crossovers(rows), sep="\n")
    if options.out is not None:
        report = {
            "schema": 1,
            "quick": options.quick,
            "provenance": provenance.collect(),
            "ceilings": asdict(timing.ceilings()),
            "threads": asdict(timing.Threads.now()),
            "rows": rows,
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
