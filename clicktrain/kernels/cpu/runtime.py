"""What the CPU backend keeps for a plan: its passes, laid out on first use, by direction and layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from clicktrain.kernels.cpu.accumulators import PIXELS
from clicktrain.kernels.cpu.codegen import LANES
from clicktrain.kernels.cpu.estimates import estimate
from clicktrain.kernels.cpu.gradients import prepare_gradient
from clicktrain.kernels.cpu.layer import Layer, Pair
from clicktrain.kernels.cpu.library import Lanes, instruction_set
from clicktrain.kernels.cpu.passes import Prepared, prepare
from clicktrain.kernels.cpu.tiles import Choice
from clicktrain.kernels.cpu.tuning import choice_for, import_choices, tune_pass
from clicktrain.kernels.plan import Plan

GRIDS: tuple[Pair, ...] = ((1, 1), (4, 2), (2, 4), (8, 1), (1, 8))
"""How the eight lanes may share an image; (1, 1): they do not, each is an image of its own."""
TYPICAL_TILE: Pair = (2, 4)
PIXELS_OF_A_TILE = 2
"""How much work the loop over kernels and their weights are for each tile, whatever its size. So 7 x 7 pixels are 8
strips of 2 x 4, one tile each, rather than 7 strips of 1 x 7, two tiles each: 1.4x with 512 channels under AVX2."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How the input and the output of a pass become lanes, and the pass on those lanes."""

    layer: Layer
    source: Lanes
    target: Lanes

    @property
    def blocks(self) -> int:
        """Groups of eight lanes."""
        return int(self.source.blocks)

    @classmethod
    def of(cls, layer: Layer, images: int) -> Packing:
        """Choose the grid with the least work."""

        def work(grid: Pair) -> int:
            strip, _, _ = layer.strips(grid)
            blocks = -(-images // LANES) if grid == (1, 1) else images
            _, rows, columns = estimate(strip, blocks).tile
            return blocks * plane_work(strip.out_size, (rows, columns))

        grid = min(GRIDS, key=work)
        if grid == (1, 1):
            source = whole_images(images, layer.channels, layer.in_size)
            return cls(layer, source, whole_images(images, layer.filters, layer.out_size))
        strip, start, step = layer.strips(grid)
        return cls(
            strip,
            image_strips(images, layer.channels, layer.in_size, strip.in_size, grid, start, step),
            image_strips(images, layer.filters, layer.out_size, strip.out_size, grid, (0, 0), strip.out_size),
        )


def plane_work(size: Pair, tile: Pair = TYPICAL_TILE) -> int:
    """Return what a plane in such tiles takes, in pixels: where registers hold two, a last odd column counts twice."""
    (height, width), (rows, columns), per_register = size, tile, PIXELS[instruction_set()]
    pixels = height * -(-width // per_register) * per_register
    return pixels + PIXELS_OF_A_TILE * -(-height // rows) * -(-width // columns)


def whole_images(images: int, channels: int, size: Pair) -> Lanes:
    """Return the lanes that are images, each one long row of pixels."""
    pixels, blocks = size[0] * size[1], -(-images // LANES)
    return Lanes(
        images=images, channels=channels, image_h=1, image_w=pixels, blocks=blocks, lane_h=1, lane_w=pixels,
        grid_h=1, grid_w=1,
    )  # fmt: skip


def image_strips(images: int, channels: int, size: Pair, strip: Pair, grid: Pair, start: Pair, step: Pair) -> Lanes:
    """Return the lanes that are strips of images: where the first starts, and from one to the next."""
    return Lanes(
        images=images, channels=channels, image_h=size[0], image_w=size[1], blocks=images, lane_h=strip[0],
        lane_w=strip[1], grid_h=grid[0], grid_w=grid[1], start_h=start[0], start_w=start[1], step_h=step[0],
        step_w=step[1],
    )  # fmt: skip


T = TypeVar("T")


class _Lazy(Generic[T]):
    """A property that is computed on first use and kept.

    Without a lock, other than Python 3.11's `cached_property`: that one would let threads lay out one pass at a time.
    Two that lay out the same pass at once get equal ones.
    """

    def __init__(self, compute: Callable[[Runtime], T]) -> None:
        self._compute, self._name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, runtime: Runtime, owner: type | None = None) -> T:
        made = self._compute(runtime)
        runtime.__dict__[self._name] = made  # found there first from now on
        return made


def fills_lanes(images: int) -> bool:
    """Tell whether images fill at least three quarters of the lanes: fewer run faster as strips of images."""
    return 4 * images >= 3 * LANES * -(-images // LANES)


class Runtime:
    """The passes of a plan.

    `forward`, `grad_input` and `gradient` work on blocked activations; their `_strips` twins on the lanes that
    `forward_packing` and `grad_input_packing` make of NCHW tensors.
    """

    def __init__(self, plan: Plan) -> None:
        self.layers = {"forward": Layer.forward(plan), "grad_input": Layer.transposed(plan)}
        self._images = plan.input_shape[0]
        self.blocks = -(-self._images // LANES)

    @_Lazy
    def forward_packing(self) -> Packing:
        """Lanes of x and y."""
        return Packing.of(self.layers["forward"], self._images)

    @_Lazy
    def grad_input_packing(self) -> Packing:
        """Lanes of dy and dx."""
        return Packing.of(self.layers["grad_input"], self._images)

    @_Lazy
    def forward(self) -> Prepared:
        """Lay out the forward pass."""
        return _chosen(self.layers["forward"], self.blocks)

    @_Lazy
    def grad_input(self) -> Prepared:
        """Lay out the input gradient."""
        return _chosen(self.layers["grad_input"], self.blocks)

    @_Lazy
    def gradient(self) -> Prepared:
        """Lay out the gradient of the values."""
        return prepare_gradient(self.layers["forward"], self.blocks)

    @_Lazy
    def forward_strips(self) -> Prepared:
        """Lay out the forward pass on `forward_packing`."""
        packing = self.forward_packing
        if packing.layer is self.layers["forward"]:
            return self.forward
        return _chosen(packing.layer, packing.blocks)

    @_Lazy
    def grad_input_strips(self) -> Prepared:
        """Lay out the input gradient on `grad_input_packing`."""
        packing = self.grad_input_packing
        if packing.layer is self.layers["grad_input"]:
            return self.grad_input
        return _chosen(packing.layer, packing.blocks)

    @_Lazy
    def gradient_strips(self) -> Prepared:
        """Lay out the gradient of the values on `forward_packing`."""
        packing = self.forward_packing
        return prepare_gradient(packing.layer, packing.blocks)

    def pass_of(self, function: str) -> str:
        """Return which pass a network will use: that on blocked activations, if the images fill the lanes."""
        name = {"grad_values": "gradient"}.get(function, function)
        return name if fills_lanes(self._images) else f"{name}_strips"


def _chosen(layer: Layer, blocks: int) -> Prepared:
    return prepare(layer, blocks, choice_for(layer, blocks))


_runtimes: WeakKeyDictionary[Plan, Runtime] = WeakKeyDictionary()


def runtime_of(plan: Plan) -> Runtime:
    """Return the passes of a plan, made on first use and kept as long as the plan."""
    runtime = _runtimes.get(plan)
    if runtime is None:
        runtime = _runtimes[plan] = Runtime(plan)
    return runtime


def preparations(plan: Plan, functions: Collection[str]) -> list[Callable[[], object]]:
    """Return what has to be done before the first use of a plan: each call compiles and lays out one pass."""
    if not plan.input_shape[0] or not plan.values_shape[0]:
        return []  # nothing will be computed
    runtime = runtime_of(plan)
    return [partial(getattr, runtime, runtime.pass_of(function)) for function in functions]


def tune(plans: Iterable[Plan]) -> list[dict[str, Choice]]:
    """Measure how the passes of plans on blocked activations are best cut up, and use that from now on.

    Takes some tens of calls of each pass; the result is kept on disk, so that the next process does not measure.

    Returns
    -------
    list of dict
        For each plan the choices for "forward" and "grad_input".
    """
    runtimes = [runtime_of(plan) for plan in plans]
    choices = [{name: tune_pass(layer, made.blocks) for name, layer in made.layers.items()} for made in runtimes]
    forget()
    return choices


def use_choices(choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Cut up passes as `tuning.export_choices` says; raises InvalidArgument as `tuning.import_choices`."""
    import_choices(choices)
    forget()


def forget() -> None:
    """Lay out all passes anew on their next use, because choices have changed."""
    _runtimes.clear()
