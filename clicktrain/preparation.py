"""The plans of a whole model, and getting the kernels for them ready before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from clicktrain import kernels
from clicktrain.assignment import Assignment
from clicktrain.blocked.convolution import dense_plan
from clicktrain.flops import dry_run
from clicktrain.kernels import Plan, Preparation
from clicktrain.kernels.preparation import FUNCTIONS
from clicktrain.layers import PatternConv2d

Shape = tuple[int, int, int, int]


def plans(
    model: nn.Module, input_shape: Sequence[int], assignments: Mapping[str, Assignment] | None = None
) -> dict[str, list[Plan]]:
    """Return the plans by which a model's convolutions compute, in the order in which they first run.

    Parameters
    ----------
    model : nn.Module
        It is run once, on one image of zeros; its state stays as it was.
    input_shape : (int, int, int, int)
        Images, channels, height and width.
    assignments : mapping, optional
        Layer name -> Assignment, for a model that `clicktrain.convert` has not converted yet.

    Returns
    -------
    dict
        Layer name -> plans, several where a layer runs on inputs of several shapes. On the CPU dense convolutions have
        plans too: beside pattern convolutions they compute on the same blocked activations.
    """
    seen: dict[str, list[Shape]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | PatternConv2d)}
    dry_run(model, input_shape[1:], {name: partial(_record, seen, name) for name in layers})
    assignments = assignments or {}
    found: dict[str, list[Plan]] = {}
    for name, shapes in seen.items():
        made = [_plan(layers[name], assignments.get(name), (input_shape[0], *shape[1:])) for shape in shapes]
        if known := [plan for plan in made if plan is not None]:
            found[name] = list(dict.fromkeys(known))
    return found


def _record(seen: dict[str, list[Shape]], name: str, _module: nn.Module, inputs: Any, _output: object) -> None:
    x: Tensor = inputs[0]
    seen.setdefault(name, []).append(tuple(x.shape))  # type: ignore[arg-type]


def _plan(layer: nn.Module, assignment: Assignment | None, shape: Shape) -> Plan | None:
    if isinstance(layer, PatternConv2d):
        return kernels.plan(layer.get_assignment(), None, shape, layer.stride, layer.padding)
    assert isinstance(layer, nn.Conv2d)
    if assignment is None:
        return dense_plan(layer, shape) if layer.weight.device.type == "cpu" else None
    return kernels.plan(assignment, None, shape, layer.stride, layer.padding)  # type: ignore[arg-type]


def prepare(
    model: nn.Module,
    training_shapes: Iterable[Sequence[int]],
    inference_shapes: Iterable[Sequence[int]] = (),
    *,
    assignments: Mapping[str, Assignment] | None = None,
    backend: str = "auto",
    background: bool = False,
) -> Preparation:
    """Compile and lay out the kernels of a model, all at once instead of layer by layer as it first runs.

    Numbers do not depend on it, and nothing can fail: what cannot be compiled is served by the generic kernels.

    Parameters
    ----------
    model : nn.Module
        Converted by `clicktrain.convert`, or about to be.
    training_shapes, inference_shapes : iterable of (int, int, int, int)
        Shapes (N, C, H, W) of the batches to come, for forward and backward passes, and for forward passes only.
    assignments : mapping, optional
        Layer name -> Assignment, for a model that is about to be converted.
    backend : str
        That of the pattern convolutions.
    background : bool
        Return at once, and let the compilers give way to the rest of the machine.

    Returns
    -------
    Preparation
        To `wait` for; nothing is lost without.
    """
    wanted: dict[Plan, Sequence[str]] = {}
    device = next(model.parameters()).device
    for shape in inference_shapes:
        for made in plans(model, shape, assignments).values():
            wanted |= dict.fromkeys(made, ("forward",))
    for shape in training_shapes:
        for number, made in enumerate(plans(model, shape, assignments).values()):
            # The first layer sees images, which need no gradient; on a GPU it has no plan if it is dense.
            wanted |= dict.fromkeys(made, FUNCTIONS if number or device.type != "cpu" else ("forward", "grad_values"))
    return kernels.prepare(wanted, backend=backend, device=str(device), background=background)


def tune(model: nn.Module, input_shape: Sequence[int], *, backend: str = "auto") -> None:
    """Measure how each pattern convolution of a model is computed fastest; see `clicktrain.kernels.tune`.

    Parameters
    ----------
    model : nn.Module
        Converted by `clicktrain.convert`.
    input_shape : (int, int, int, int)
        Shape (N, C, H, W) of the batches to come.
    backend : str
        That of the pattern convolutions.
    """
    layers = plans(model, input_shape)
    device = str(next(model.parameters()).device)
    kernels.tune((plan for made in layers.values() for plan in made), backend, device)
