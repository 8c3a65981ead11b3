"""Whole networks against other inference engines: `python -m bench.inference [--quick] [--out FILE]`.

The same pruned weights run compiled by `clicktrain.deploy`, dense in torch (channels_last), torch.compile,
onnxruntime and OpenVINO (extra `peers`). All are timed in the same rounds with the same number of threads, and each
is checked against torch first. deepsparse needs an environment of its own: `--deepsparse PYTHON` names its
interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clicktrain
from bench.deepsparse_worker import Worker
from clicktrain import deploy, models, official, provenance, timing
from clicktrain.deploy import export
from clicktrain.files import write_atomic
from clicktrain.flops import layer_costs
from clicktrain.kernels.cpu import library
from clicktrain.selection import Sparsity, prunable_layers, select

TOLERANCE = 1e-4
SETTLE_SECONDS = 0.02
OURS = "clicktrain"
RIVALS = ("torch", "torch.compile", "onnxruntime", "openvino", "deepsparse")


@dataclass(frozen=True)
class Network:
    """A pruned network and the batches that it is timed with.

    Attributes
    ----------
    name, title : str
        Of the zoo, and for the reader.
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
        "vgg13", "VGG-13, official 9.0x", 32,
        Sparsity(ratios=_VGG13.ratios, pool="official", rank_by="kernel"),
        {
            32: {"onnxruntime": 4.0, "openvino": 4.0, "deepsparse": 1.5, "torch": 5.0},
            1: {"onnxruntime": 4.0, "openvino": 4.0, "deepsparse": 4.0, "torch": 4.0},
        },
    ),
    "resnet18": Network(
        "imagenet_resnet18", "ResNet-18, 224x224, 6x", 224, Sparsity(target_compression=6.0, pool="official"),
        {1: {}, 8: {}},
    ),
}  # fmt: skip


def rivals(model: nn.Module, x: Tensor, wanted: Sequence[str], folder: Path, python: str | None) -> dict[str, Any]:
    """Return for each wanted engine its contender, or why there is none."""
    dense = clicktrain.to_dense(model).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    onnx = folder / "model.onnx"
    makers: dict[str, Callable[[], timing.Contender]] = {
        "torch": lambda: timing.Contender(torch.inference_mode()(lambda: dense(last))),
        "torch.compile": lambda: _torch_compile(dense, last),
        "onnxruntime": lambda: _onnxruntime(onnx, x),
        "openvino": lambda: _openvino(onnx, x),
        "deepsparse": lambda: _deepsparse(dense, x, python, folder),
    }
    found: dict[str, Any] = {}
    if set(wanted) - {"torch", "torch.compile"}:
        export.to_onnx(dense, x, onnx)
    for name in wanted:
        try:
            found[name] = makers[name]()
        except ImportError as error:
            found[name] = f"not installed: {error.name or error}"
        except OSError as error:
            found[name] = str(error)
    return found


def _torch_compile(dense: nn.Module, x: Tensor) -> timing.Contender:
    compiled = torch.compile(dense)
    return timing.Contender(torch.inference_mode()(lambda: compiled(x)))


def _onnxruntime(path: Path, x: Tensor) -> timing.Contender:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"input": x.numpy()}
    return timing.Contender(lambda: session.run(None, feed)[0], lambda y: torch.from_numpy(y))


def _openvino(path: Path, x: Tensor) -> timing.Contender:
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(x.shape))
    properties = {  # one batch at a time on all threads
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(model, "CPU", properties)
    request, feed = compiled.create_infer_request(), {0: x.numpy()}
    return timing.Contender(lambda: request.infer(feed)[0], lambda y: torch.from_numpy(y.copy()))


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
    x = torch.randn(batch, 3, network.image, network.image)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compiled = deploy.compile(model, x, strict=True, tune=True)
        compile_seconds = time.perf_counter() - started
        file = Path(folder) / "model"
        compiled.save(file)
        started = time.perf_counter()
        loaded = deploy.load(file)
        load_ms = (time.perf_counter() - started) * 1e3
        found = rivals(model, x, wanted, Path(folder), python)
        engines = {name: c for name, c in found.items() if isinstance(c, timing.Contender)}
        peak = timing.peak()
        contenders = {OURS: timing.Contender(lambda: loaded(x)), **engines, "peak": timing.Contender(peak.run, None)}
        reference = clicktrain.to_dense(network.build())(x)
        times = timing.compare(contenders, reference, tolerance=TOLERANCE, rounds=rounds, settle_seconds=SETTLE_SECONDS)
        sizes = {OURS: file.stat().st_size, "onnx": _size(Path(folder) / "model.onnx")}
    return {
        "network": network.title, "batch": batch,
        "speedup": {name: times.speedup(name, OURS) for name in engines},
        "share_of_peak": times.speedup("peak", OURS) * 2 * batch * compiled.macs / peak.flops,
        "goals": network.goals[batch],
        "not_run": {name: reason for name, reason in found.items() if isinstance(reason, str)},
        "timings": [timing_.as_dict() for timing_ in times.timings.values()],
        "compile_seconds": compile_seconds, "load_ms": load_ms, "arena_bytes": compiled.arena_bytes,
        "file_bytes": sizes,
    }  # fmt: skip


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def lines(row: dict[str, Any]) -> list[str]:
    """Return a row for the terminal."""
    ours = next(t for t in row["timings"] if t["name"] == OURS)
    text = [
        f"{row['network']}, batch {row['batch']}: {ours['median_ms']:.2f} ms (n={ours['n']}), "
        f"{row['share_of_peak']:.0%} of peak, error {ours['error']:.1e}, file {row['file_bytes'][OURS] / 1e6:.1f} MB, "
        f"arena {row['arena_bytes'] / 1e6:.1f} MB, loads in {row['load_ms']:.0f} ms"
    ]
    for name, speedup in row["speedup"].items():
        goal = row["goals"].get(name)
        verdict = "" if goal is None else f"  goal {goal:.1f}x  {'reached' if speedup >= goal else 'MISSED'}"
        other = next(t for t in row["timings"] if t["name"] == name)
        text.append(f"  {name:16}{other['median_ms']:9.2f} ms  {speedup:6.2f}x slower{verdict}")
    return text + [f"  {name:16}not run: {reason}" for name, reason in row["not_run"].items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 where the CPU backend is not available."""
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: proves that it runs, no more")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each contender (default %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, help="only these batch sizes")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--deepsparse", metavar="PYTHON", help="interpreter of an environment with deepsparse 1.8")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args(arguments)
    if (reason := library.available()) is not True:
        print(f"error: the CPU backend is not available: {reason}", file=sys.stderr)
        return 2
    rows = []
    for network in (NETWORKS[name] for name in options.networks):
        for batch in network.goals:
            if options.batches is None or batch in options.batches:
                rounds = 3 if options.quick else options.rounds
                rows.append(measure(network, batch, rounds, options.rivals, options.deepsparse))
                print(*lines(rows[-1]), sep="\n", flush=True)
    if options.out is not None:
        report = {
            "schema": 1,
            "quick": options.quick,
            "provenance": provenance.collect(),
            "threads": asdict(timing.Threads.now()),
            "rows": rows,
        }
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
