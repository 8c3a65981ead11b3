"""Import torchvision, also beside a torch build that its compiled operators do not match."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

import torch

from clicktrain.errors import BackendUnavailable

# torchvision registers fake implementations for these while it is imported, and fails where its compiled
# library (which defines them) cannot be loaded: a CUDA wheel beside a CPU-only torch, the usual pairing
# where the package index of torch's CPU builds was used for torch alone.
_MISSING_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_definitions: list[torch.library.Library] = []  # an operator lives only as long as its Library object


def load_torchvision() -> ModuleType:
    """Import torchvision and return it.

    Where torchvision's compiled library cannot be loaded, the operators its Python part insists on are
    declared first. Data sets, transforms and classification models then work; detection operators and
    ``torchvision.io`` decoders do not. A working torchvision is imported untouched.

    Returns
    -------
    module
        The ``torchvision`` package.

    Raises
    ------
    BackendUnavailable
        torchvision is not installed.
    """
    if "torchvision" not in sys.modules and not _definitions:
        spec = find_spec("torchvision")
        if spec is None:
            raise BackendUnavailable("torchvision is not installed: pip install torchvision")
        if not _compiled_library_loads(spec):
            _declare_missing_ops()
    return importlib.import_module("torchvision")


def _compiled_library_loads(package: ModuleSpec) -> bool:
    library = PathFinder.find_spec("_C", package.submodule_search_locations)
    if library is None or library.origin is None:
        return False
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return True


def _declare_missing_ops() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _MISSING_OPS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _definitions.append(library)
