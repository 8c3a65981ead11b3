"""How passes are cut up on a GPU: an estimate without measuring, or the fastest of a few that were measured.

As on the CPU, every choice that is handed out is remembered and can be exported, imported and, if measured, kept on
disk; only `tune` measures.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch

from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.files import write_atomic
from clicktrain.kernels import build
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import codegen, gradient_tiling, tiling, window_tiling
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype, GradientSpec
from clicktrain.kernels.cuda.region import Pair
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.cuda.window_text import WindowSpec

CANDIDATES = 6
WINDOWS, MOST_ALIKE, OTHERS = 8, 3, 4
"""Gradients of the values with windows in registers that are measured, of these with like patches, and others."""
ROUNDS = 7
FLUSH_BYTES = 128 << 20
"""Written before each sample, so that operands come from memory as they do between two layers."""

Spec = ConvolutionSpec | GradientSpec
AnyGradientSpec = GradientSpec | WindowSpec
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What a specification depends on beside the layer.

    Attributes
    ----------
    tile : (int, int)
        Rows and columns of a patch.
    images : int
        Images of a patch.
    warps, resident : int
        Warps of a block, and blocks of a multiprocessor.
    slots : int
        Filters of a warp; for the gradient, kernels of a task.
    tasks : int
        For the gradient, tasks of a warp.
    """

    tile: Pair
    images: int
    warps: int
    resident: int
    slots: int
    tasks: int = 0


@dataclass(frozen=True)
class TensorChoice:
    """The same for a pass on tensor cores: what of a `TensorSpec` does not follow from the layer.

    Attributes
    ----------
    rect : (int, int)
        Rows and columns of a rectangle of positions.
    groups : int
        Groups of 8 images.
    warps, blocks, parts, tiles, columns, buffers : int
        As in `TensorSpec`.
    channels : int
        Of a chunk.
    sums : int
        Input gradient: channels of a block of threads.
    """

    rect: Pair
    groups: int
    warps: int
    blocks: int
    parts: int
    tiles: int
    channels: int
    sums: int
    columns: int
    buffers: int


@dataclass(frozen=True)
class WindowChoice:
    """The same for the gradient of the values with windows in registers.

    Attributes
    ----------
    patch : (int, int)
        Rows and columns of a patch.
    images, warps, resident, filters, channels : int
        As in `WindowSpec`.
    """

    patch: Pair
    images: int
    warps: int
    resident: int
    filters: int
    channels: int


AnyChoice = Choice | TensorChoice | WindowChoice
C = TypeVar("C", Choice, TensorChoice)
_choices: dict[str, AnyChoice] = {}
_specs: dict[tuple[str, AnyChoice], Any] = {}
"""What choices mean: to think through all ways to cut up a pass takes a second."""
_likely: dict[str, list[Any]] = {}


def choices() -> dict[str, dict[str, Any]]:
    """Return all choices made so far as plain data, by fingerprint."""
    return {key: asdict(choice) for key, choice in sorted(_choices.items())}


def use_choices(made: Mapping[str, Mapping[str, Any]]) -> None:
    """Make exported choices valid for all passes that are laid out from now on.

    Raises
    ------
    InvalidArgument
        If an entry is not what `choices` gives.
    """
    _choices.update({key: _parsed(key, fields) for key, fields in made.items()})


def forget() -> None:
    """Drop all choices."""
    for memory in (_choices, _specs, _likely):
        memory.clear()


def typical(images: int) -> int:
    """Return the size of batches as which a batch is cut up: the largest power of two that is not larger.

    So the last batch of an epoch and those of an evaluation need little code of their own.
    """
    return 1 << images.bit_length() - 1 if images else 0


def convolution_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> ConvolutionSpec:
    """Return how to cut up a convolution pass: as tuned, imported or chosen before, else as estimated."""
    context = layer, typical(images), dtype, limits
    return chosen(
        fingerprint(*context, ConvolutionSpec), lambda: tiling.convolution_spec(*context),
        lambda: tiling.candidates(*context), choice_of,
    )  # fmt: skip


def gradient_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> AnyGradientSpec:
    """Return how to cut up the gradient of the values, likewise."""

    def estimated() -> AnyGradientSpec:
        return window_tiling.spec(*context) or gradient_tiling.spec(*context)

    def everything() -> list[AnyGradientSpec]:
        return [*window_tiling.candidates(*context), *gradient_tiling.candidates(*context)]

    context = layer, typical(images), dtype, limits
    return chosen(fingerprint(*context, GradientSpec), estimated, everything, choice_of)


def likely(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[ConvolutionSpec]:
    """Return the convolution passes that are worth measuring, the estimate first, no two of them alike."""
    images = typical(images)
    key = fingerprint(layer, images, dtype, limits, ConvolutionSpec)
    if key not in _likely:
        ordered = sorted(
            tiling.candidates(layer, images, dtype, limits),
            key=lambda spec: tiling.estimate(spec, layer, images, limits),
        )
        different = {(tuple(sorted(s.tile)), s.images, s.slots, s.warps): s for s in reversed(ordered)}
        _likely[key] = [spec for spec in ordered if spec in different.values()][:CANDIDATES]
    return _likely[key]


def likely_gradients(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[AnyGradientSpec]:
    """Return the same for the gradient of the values: of both kinds, where windows in registers are possible."""
    images = typical(images)
    key = fingerprint(layer, images, dtype, limits, GradientSpec)
    if key not in _likely:
        windows = _different_windows(window_tiling.candidates(layer, images, dtype, limits))
        others = gradient_tiling.candidates(layer, images, dtype, limits)
        _likely[key] = [*windows, *(others[:OTHERS] if windows else others)]
    return _likely[key]


def _different_windows(ordered: list[WindowSpec]) -> list[WindowSpec]:
    """Return the first of some specifications that are not too much alike."""
    found: list[WindowSpec] = []
    seen: Counter[object] = Counter()
    for spec in ordered:
        way = tuple(sorted(spec.tile)), spec.images, spec.resident
        if len(found) < WINDOWS and seen[way] < MOST_ALIKE and not seen[way, spec.filters]:
            found.append(spec)
            seen.update((way, (way, spec.filters)))
    return found


def fastest(specs: Sequence[T], run: Callable[[T], Callable[[], object]]) -> T:
    """Return the specification whose runs have the smallest median, all measured in turn.

    Parameters
    ----------
    specs : sequence
        What to choose from.
    run : callable
        Lays out a specification and returns what launches it.
    """
    if len(specs) == 1:
        return specs[0]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    launches = [run(spec) for spec in specs]
    samples: list[list[float]] = [[] for _ in specs]
    for _ in range(ROUNDS + 1):  # the first round warms up
        for launch, times in zip(launches, samples, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            launch()  # so that nothing of the one before is timed: see `clicktrain.timing`
            flush.zero_()
            start.record()
            launch()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)))
    medians = [statistics.median(times[1:]) for times in samples]
    return specs[medians.index(min(medians))]


def tune(
    kind: type[Spec],
    layer: Layer,
    images: int,
    dtype: Dtype,
    limits: Limits,
    candidates: Callable[[Layer, int, Dtype, Limits], list[T]],
    run: Callable[[T], Callable[[], object]],
) -> None:
    """Choose the fastest way to cut up a pass: as found on disk, or else measured and written there."""
    key = fingerprint(layer, images, dtype, limits, kind)
    measure(key, lambda: candidates(layer, images, dtype, limits), choice_of, run)


def measure(
    key: str,
    candidates: Callable[[], list[Any]],
    choice: Callable[[Any], AnyChoice],
    run: Callable[[Any], Callable[[], object]],
) -> None:
    """Choose the fastest of some specifications for a fingerprint, which are made from choices."""
    if not settled(key):
        _remember(key, choice(best := fastest(candidates(), run)), best)
        _write(key, _choices[key])


def settled(key: str) -> bool:
    """Return whether a fingerprint's measured choice is on disk; if so, it holds from now on."""
    if (known := _read(key)) is not None:
        _choices[key] = known
    return known is not None


def chosen(
    key: str,
    estimated: Callable[[], T],
    candidates: Callable[[], Iterable[T]],
    choice: Callable[[T], AnyChoice],
) -> T:
    """Return the specification for a fingerprint: as chosen before, else as estimated, which is remembered."""
    if key not in _choices:
        spec = estimated()
        _remember(key, choice(spec), spec)
    elif (key, _choices[key]) not in _specs:
        found = next((spec for spec in candidates() if choice(spec) == _choices[key]), None)
        _specs[key, _choices[key]] = found or estimated()
    return cast(T, _specs[key, _choices[key]])


def _remember(key: str, choice: AnyChoice, spec: object) -> None:
    _choices[key] = choice
    _specs[key, choice] = spec


def knows(key: str) -> bool:
    """Return whether there is a choice for a fingerprint."""
    return key in _choices


def remembered(key: str, estimated: C) -> C:
    """Return the choice for a fingerprint; from now on the estimated one, if there is none, or one of another kind."""
    choice = _choices.setdefault(key, estimated)
    return choice if isinstance(choice, type(estimated)) else estimated


def choice_of(spec: Spec | WindowSpec) -> Choice | WindowChoice:
    """Return the choice that a specification was made from."""
    if isinstance(spec, ConvolutionSpec):
        return Choice(spec.tile, spec.images, spec.warps, spec.resident, spec.slots)
    if isinstance(spec, WindowSpec):
        return WindowChoice(spec.tile, spec.images, spec.warps, spec.resident, spec.filters, spec.channels)
    return Choice(spec.tile, spec.images, spec.warps, spec.resident, spec.task_kernels, spec.tasks)


def fingerprint(layer: Layer, images: int, dtype: Dtype, limits: Limits, kind: type[Spec]) -> str:
    """Return a name for all passes that are cut up alike."""
    facts = (
        layer.filters, layer.channels, len(layer.kernels.filters), layer.patterns, layer.kernel_size, layer.in_size,
        layer.out_size, layer.stride, layer.spread, layer.padding, typical(images), dtype, limits, kind.__name__,
        codegen.sources(),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _parsed(key: str, fields: Mapping[str, Any]) -> AnyChoice:
    try:
        if "rect" in fields:
            return TensorChoice(_pair(fields["rect"]), **_integers(TensorChoice, "rect", fields))
        if "patch" in fields:
            return WindowChoice(_pair(fields["patch"]), **_integers(WindowChoice, "patch", fields))
        return Choice(_pair(fields["tile"]), **_integers(Choice, "tile", fields))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"choice {key}={fields!r}: expected tile, images, warps, resident, slots and tasks; or for tensor cores "
            f"{', '.join(TensorChoice.__dataclass_fields__)}; or for windows in registers "
            f"{', '.join(WindowChoice.__dataclass_fields__)}"
        ) from error


def _pair(sizes: Any) -> Pair:
    rows, columns = (int(size) for size in sizes)
    return rows, columns


def _integers(kind: type[AnyChoice], other: str, fields: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(fields[name]) for name in kind.__dataclass_fields__ if name != other}


def _file(key: str) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return f"choice-{key}-{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"


def _read(key: str) -> AnyChoice | None:
    try:
        return _parsed(key, json.loads((build.cache_directory() / _file(key)).read_text()))
    except (BackendUnavailable, InvalidArgument, OSError, ValueError):
        return None


def _write(key: str, choice: AnyChoice) -> None:
    try:
        write_atomic(build.cache_directory() / _file(key), json.dumps(asdict(choice)))
    except (BackendUnavailable, OSError):
        return  # measured again next time
