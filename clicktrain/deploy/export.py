"""A model for other programs: ONNX with dense weights, or a torch.export program; both checked against the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain import blocked
from clicktrain.conversion import to_dense
from clicktrain.errors import ClickTrainError, MissingPackage

TOLERANCE = 1e-4


class ExportMismatch(ClickTrainError):
    """An exported model computes something else than the model; it is not kept."""


def to_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> float:
    """Write a model as ONNX: standard operators, dense weights with zeros where pruned, any batch size.

    Parameters
    ----------
    model : nn.Module
        Is not changed.
    example : Tensor
        A batch, on which the file is checked.
    path : path-like
        Where to; replaced only when the check has passed.

    Returns
    -------
    float
        Norm-wise relative error against the model.

    Raises
    ------
    MissingPackage
        Without the extra `peers` (onnx, onnxscript, onnxruntime).
    ExportMismatch
        If the error is above 1e-4.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it and says so less clearly
    except ImportError as missing:
        raise MissingPackage(f"ONNX export needs {missing.name}: pip install 'clicktrain[peers]'") from missing
    dense = to_dense(copy.deepcopy(model)).eval()
    path, part = Path(path), Path(f"{path}.part")
    # With one image, torch.export would take the batch for a constant.
    traced = example.expand(2, *example.shape[1:]).contiguous() if len(example) == 1 else example
    program: Any = torch.onnx.export(
        dense, (traced,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["input"],
        output_names=["output"], verbose=False,
    )  # fmt: skip
    try:
        program.save(str(part), external_data=False)
        session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
        error = check(lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), dense, example, str(path))
        os.replace(part, path)
        return error
    finally:
        part.unlink(missing_ok=True)


def to_program(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> float:
    """Write a model as a torch.export program that keeps the pattern convolutions, as `torch.ops.clicktrain`.

    Whoever loads it with `torch.export.load` imports `clicktrain` before. Parameters, result and errors as
    `to_onnx`; it needs no further package.
    """
    model = copy.deepcopy(model).eval()
    blocked.remove(model)
    path, part = Path(path), Path(f"{path}.part.pt2")
    with torch.no_grad():
        program = torch.export.export(model, (example,))
    try:
        torch.export.save(program, part)
        error = check(torch.export.load(part).module(), model, example, str(path))
        os.replace(part, path)
        return error
    finally:
        part.unlink(missing_ok=True)


@torch.no_grad()
def check(exported: Callable[[Tensor], Tensor], model: nn.Module, example: Tensor, name: str) -> float:
    """Return the norm-wise relative error of what was made of a model; raises ExportMismatch if it is above 1e-4."""
    want = to_dense(copy.deepcopy(model)).eval()(example)
    error = float((exported(example) - want).norm() / want.norm().clamp_min(1e-30))
    if not error <= TOLERANCE:
        raise ExportMismatch(f"{name}: the exported model is off by {error:.3g} (tolerance {TOLERANCE:g})")
    return error
