"""Inference engines: each loads a file for one shape of input, on as many threads as torch has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clicktrain import deploy
from clicktrain._torchvision import load_torchvision

Run = Callable[[Tensor], Tensor]


def load_clicktrain(path: Path, x: Tensor) -> Run:
    """Load what `CompiledModel.save` wrote."""
    return deploy.load(path)


def load_torch(path: Path, x: Tensor) -> Run:
    """Load a module that torch.save wrote, to run in channels_last."""
    model = torch.load(path, weights_only=False).eval().to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda x: model(x.contiguous(memory_format=torch.channels_last)))


def load_onnxruntime(path: Path, x: Tensor) -> Run:
    """Load an ONNX file with onnxruntime."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def load_openvino(path: Path, x: Tensor) -> Run:
    """Load an ONNX file with OpenVINO, for one batch at a time."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(x.shape))
    properties = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0])


ENGINES: dict[str, Callable[[Path, Tensor], Run]] = {
    "clicktrain": load_clicktrain,
    "torch": load_torch,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}
IMPORTS: dict[str, Callable[[], object]] = {
    "torch": load_torchvision,  # which some models of the zoo are made of
    "onnxruntime": partial(importlib.import_module, "onnxruntime"),
    "openvino": partial(importlib.import_module, "openvino"),
}
"""What is imported before an engine loads a model, and not counted as that."""
