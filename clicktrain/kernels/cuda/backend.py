"""The CUDA backend's three functions, and the deployment forward with a fused epilogue.

Where blocks of 16 filters share channels and patterns, tensor cores serve 16-bit operands; see `tensor.applies`.

Formats. Images are NCHW, and so are results. Tensor cores also take images batch last, that is in memory as
[C][H][W][N] (`as_batch_last`, an ordinary tensor (N, C, H, W) with other strides), and then give results batch last.
That spares them the turning of pixels into units of 8 images; on an H100 the input gradient gains by it, and the
forward pass of ImageNet's layers, not that of CIFAR's (bench/evidence/gpu.json). Where they do not serve, N is not a
multiple of 8 or operands differ in format, operands are copied into NCHW. Modules hand on NCHW.

Results are the same bits from call to call on one device: sums have a fixed order, there are no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import convolution, gradient, tuning
from clicktrain.kernels.cuda import tensor as tensor_cores
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype, GradientSpec
from clicktrain.kernels.cuda.convolution import Convolution
from clicktrain.kernels.cuda.epilogue import NO_EPILOGUE, Epilogue
from clicktrain.kernels.cuda.launch import CupyLauncher, Launcher, available, compile_ahead
from clicktrain.kernels.cuda.runtime import Runtime
from clicktrain.kernels.cuda.tensor import as_batch_last, is_batch_last
from clicktrain.kernels.cuda.tuning import choices, use_choices
from clicktrain.kernels.plan import Plan
from clicktrain.kernels.preparation import FUNCTIONS

__all__ = [
    "as_batch_last", "available", "choices", "forward", "forward_fused", "grad_input", "grad_values", "preparations",
    "tune", "units", "use_choices",
]  # fmt: skip

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip
INDEX_LIMIT = 2**31 - 1
T = TypeVar("T")


def forward(x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Convolve x (N, C_in, H, W) with values (kept_kernels, entries); returns (N, C_out, H_out, W_out), in x's format.

    Raises
    ------
    InvalidArgument
        If an operand is not a CUDA tensor of the plan's shape in float32, float16 or bfloat16, or too large.
    """
    return forward_fused(x, values, plan, NO_EPILOGUE)


def forward_fused(x: Tensor, values: Tensor, plan: Plan, epilogue: Epilogue) -> Tensor:
    """As `forward`, with an epilogue on the sums in float32; for inference, not differentiable."""
    _check_operands(("x", x, plan.input_shape), ("values", values, plan.values_shape))
    if epilogue is not NO_EPILOGUE:
        _check_epilogue(epilogue, x, plan)
    runtime = _runtime(plan, x)
    if epilogue.residual is not None and not runtime.batch_last:
        epilogue = replace(epilogue, residual=epilogue.residual.contiguous())
    return runtime.forward.run(runtime.arranged(x), values.contiguous(), plan.output_shape, epilogue)


def grad_input(dy: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (N, C_in, H, W) of the input for dy (N, C_out, H_out, W_out), in dy's format.

    Raises as `forward`.
    """
    _check_operands(("dy", dy, plan.output_shape), ("values", values, plan.values_shape))
    runtime = _runtime(plan, dy)
    return runtime.grad_input.run(runtime.arranged(dy), values.contiguous(), plan.input_shape, NO_EPILOGUE)


def grad_values(x: Tensor, dy: Tensor, plan: Plan) -> Tensor:
    """Return the gradient (kept_kernels, entries) of the values; raises as `forward`."""
    _check_operands(("x", x, plan.input_shape), ("dy", dy, plan.output_shape))
    if not plan.input_shape[0] or not plan.values_shape[0]:
        return x.new_zeros(plan.values_shape)
    runtime = _runtime(plan, x, dy)
    return runtime.gradient.run(runtime.arranged(x), runtime.arranged(dy), plan.values_shape)


launcher: Launcher = CupyLauncher()
"""Runs the kernels."""


_runtimes: WeakKeyDictionary[Plan, dict[tuple[Dtype, torch.device, bool], Runtime]] = WeakKeyDictionary()
_former: WeakKeyDictionary[Plan, list[Runtime]] = WeakKeyDictionary()
"""What other layouts have replaced: kept as long as the plan, since CUDA graphs read the arrays that they recorded."""


def _runtime(plan: Plan, *images: Tensor) -> Runtime:
    known = _runtimes.setdefault(plan, {})
    key = (DTYPES[images[0].dtype], images[0].device, all(map(is_batch_last, images)))
    if key not in known:
        _check_size(plan)
        known[key] = Runtime(plan, *key[:2], launcher, key[2])
    return known[key]


def preparations(plan: Plan, functions: Collection[str]) -> list[Callable[[], None]]:
    """Return the work before the first use of some functions in float32: compiling, on all cores.

    It may be done beside anything: a GPU whose work is being recorded must not be asked for anything else.
    """
    if not plan.input_shape[0] or not plan.values_shape[0]:
        return []
    images, limits = plan.input_shape[0], launcher.limits(_device())

    def texts() -> Iterable[str]:
        if "forward" in functions:
            yield convolution.text(tuning.convolution_spec(Layer.forward(plan), images, "float32", limits))
        if "grad_input" in functions:
            yield convolution.text(tuning.convolution_spec(Layer.transposed(plan), images, "float32", limits))
        if "grad_values" in functions:
            yield gradient.text(tuning.gradient_spec(Layer.forward(plan), images, "float32", limits))

    return [lambda: compile_ahead(texts())]


def _lay_out_anew(made: Plan) -> None:
    """Let the passes of a plan be laid out on their next use, by the choices of then."""
    _former.setdefault(made, []).extend(_runtimes.pop(made, {}).values())


def forget() -> None:
    """Lay out all passes anew on their next use, as estimated."""
    for made in list(_runtimes):
        _lay_out_anew(made)
    tuning.forget()


def tune(
    plans: Iterable[Plan],
    dtype: torch.dtype = torch.float32,
    batch_last: bool = False,
    functions: Collection[str] = FUNCTIONS,
    fused: bool = False,
) -> None:
    """Measure on the current device in which way each pass is fastest, and do it that way from now on.

    The result is kept on disk. What is chosen from is compiled on all cores first, which takes a second or two for
    each pass and core.

    Parameters
    ----------
    plans : iterable of Plan
        From `clicktrain.kernels.plan`.
    dtype : torch.dtype
        Of the operands that will come.
    batch_last : bool
        Their format.
    functions : collection of {"forward", "grad_input", "grad_values"}
        What will be asked for.
    fused : bool
        Whether the forward pass will have an epilogue.
    """
    plans = list(plans)
    compile_ahead(text for made in plans for text in units(made, dtype, None, batch_last, functions, fused))
    for made in plans:
        _tune(made, dtype, batch_last, functions, fused)


def _tune(made: Plan, dtype: torch.dtype, batch_last: bool, functions: Collection[str], fused: bool) -> None:
    device = _device()
    shapes = made.input_shape, made.values_shape, made.output_shape
    x, values, dy = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    epilogue = Epilogue(shift=torch.randn(shapes[2][1], device=device), relu=True) if fused else NO_EPILOGUE
    runtime = Runtime(made, DTYPES[dtype], device, launcher, batch_last)
    if runtime.on_tensor_cores:
        if runtime.batch_last:
            x, dy = as_batch_last(x), as_batch_last(dy)
        tensor_cores.tune(made, DTYPES[dtype], launcher, (x, values, dy), NO_EPILOGUE, functions)
        _lay_out_anew(made)
        return
    layers = Layer.forward(made), Layer.transposed(made)
    context = made.input_shape[0], DTYPES[dtype], launcher.limits(device)
    laid_out = *context[:2], device, launcher

    def tune_convolution(layer: Layer, operand: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> None:
        def run(spec: ConvolutionSpec) -> Callable[[], object]:
            return partial(Convolution(layer, *laid_out, spec).run, operand, values, shape, epilogue)

        tuning.tune(ConvolutionSpec, layer, *context, tuning.likely, run)

    if "forward" in functions:
        tune_convolution(layers[0], x, made.output_shape, epilogue)
    if "grad_input" in functions:
        tune_convolution(layers[1], dy, made.input_shape, NO_EPILOGUE)
    if "grad_values" in functions:
        tuning.tune(
            GradientSpec, layers[0], *context, tuning.likely_gradients,
            lambda spec: partial(gradient.lay_out(layers[0], *laid_out, spec).run, x, dy, made.values_shape),
        )  # fmt: skip
    _lay_out_anew(made)


def units(
    made: Plan,
    dtype: torch.dtype = torch.float32,
    candidates: int | None = None,
    batch_last: bool = False,
    functions: Collection[str] = FUNCTIONS,
    fused: bool = False,
) -> list[str]:
    """Return the texts among which `tune` chooses, one where it has chosen; or so many of each pass, the likeliest."""
    name, images, device = DTYPES[dtype], made.input_shape[0], _device()
    limits = launcher.limits(device)
    runtime = Runtime(made, name, device, launcher, batch_last)
    if runtime.on_tensor_cores:
        return tensor_cores.units(made, name, limits, candidates, runtime.batch_last, functions)

    def specs(
        layer: Layer, kind: type[tuning.Spec], likely: Callable[..., list[T]], chosen: Callable[..., T]
    ) -> list[T]:
        context = layer, images, name, limits
        if candidates is None and tuning.settled(tuning.fingerprint(*context, kind)):
            return [chosen(*context)]
        return likely(*context)[:candidates]

    forward, found = Layer.forward(made), list[str]()
    if "forward" in functions:
        made_of = specs(forward, ConvolutionSpec, tuning.likely, tuning.convolution_spec)
        found += [convolution.text(spec, fused) for spec in made_of]
    if "grad_input" in functions:
        made_of = specs(Layer.transposed(made), ConvolutionSpec, tuning.likely, tuning.convolution_spec)
        found += [convolution.text(spec) for spec in made_of]
    if "grad_values" in functions:
        gradients = specs(forward, GradientSpec, tuning.likely_gradients, tuning.gradient_spec)
        found += [gradient.text(spec) for spec in gradients]
    return found


DEVICE_TYPE: Literal["cuda", "cpu"] = "cuda"
"""Where operands have to be; the tests run the kernels on the CPU."""


def _device() -> torch.device:
    return torch.device("cpu") if DEVICE_TYPE == "cpu" else torch.device("cuda", torch.cuda.current_device())


def _check_operands(*operands: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, tensor, shape in operands:
        if tensor.device.type != DEVICE_TYPE:
            raise InvalidArgument(f"{name} is on {tensor.device}: the cuda backend computes on cuda tensors")
        if tensor.dtype not in DTYPES:
            names = ", ".join(map(str, DTYPES))
            raise InvalidArgument(f"{name} is {tensor.dtype}: the cuda backend computes in {names}")
        if tuple(tensor.shape) != shape:
            raise InvalidArgument(f"{name} has shape {tuple(tensor.shape)}: the plan expects {shape}")
    (name, first, _), (other, second, _) = operands
    if first.dtype != second.dtype or first.device != second.device:
        raise InvalidArgument(
            f"{name} is {first.dtype} on {first.device}, {other} {second.dtype} on {second.device}: "
            "expected one type and one device"
        )


def _check_size(plan: Plan) -> None:
    for name, shape in (("x", plan.input_shape), ("y", plan.output_shape)):
        if math.prod(shape) > INDEX_LIMIT:
            raise InvalidArgument(
                f"{name} of shape {shape} has {math.prod(shape)} elements: the cuda backend addresses {INDEX_LIMIT}; "
                "split the batch"
            )


def _check_epilogue(epilogue: Epilogue, x: Tensor, plan: Plan) -> None:
    filters = (plan.output_shape[1],)
    for name, tensor, shape, dtype in (
        ("scale", epilogue.scale, filters, torch.float32),
        ("shift", epilogue.shift, filters, torch.float32),
        ("residual", epilogue.residual, plan.output_shape, x.dtype),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise InvalidArgument(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: "
                f"expected {dtype} {shape} on {x.device}"
            )
        if not (tensor.is_contiguous() or is_batch_last(tensor)):
            raise InvalidArgument(f"{name} has strides {tensor.stride()}: expected a contiguous tensor")
