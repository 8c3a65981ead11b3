"""The gradient of the values with windows in registers: on the CPU against float64, races, registers, choices."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from clicktrain.kernels import plan, reference
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import backend, codegen, gradient_tiling, tuning, window_layout, window_text, window_tiling
from clicktrain.kernels.cuda.codegen import GradientSpec
from clicktrain.kernels.cuda.tiling import RESERVED_BYTES, Limits
from clicktrain.kernels.cuda.window import WindowGradient
from clicktrain.kernels.cuda.window_text import WindowSpec
from clicktrain.patterns import PRUNED, PatternPool, all_patterns, full_pool, official_pool
from tests.kernels.cases import Case, expected, relative_error
from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.host import Fault, HostLauncher, host_unit, kernel_text, on_host
from tests.kernels.cuda.test_host import without

SQUARES = official_pool(4)
H100 = Limits(227 << 10, 132)


@dataclass(frozen=True)
class Used:
    """Code for one size of images: what is compiled in is here, everything else is drawn."""

    size: tuple[int, int]
    tile: tuple[int, int]
    lanes: tuple[int, int, int]
    images: int = 1
    pool: PatternPool = SQUARES
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    warps: int = 2
    filters: int = 4

    def spec(self, layer: Layer) -> WindowSpec:
        """Return a specification with several pieces of a small layer; full ones overflow into more."""
        made = window_tiling.cut(layer, self.tile, self.images, self.lanes, self.warps, 1)
        return replace(made, filters=self.filters, channels=3, kernels=2 * self.filters)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the backend cut everything up like this."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(window_tiling, "spec", lambda layer, *context: self.spec(layer))
            backend.forget()
            yield
        backend.forget()

    def draw(self, random: np.random.Generator) -> Case:
        """Draw a small layer."""
        filters, channels = (int(random.integers(1, 12)) for _ in range(2))
        images = int(random.choice((1, 2, 3, self.lanes[0] * self.images + 1, 2 * self.lanes[0] * self.images)))
        density = float(random.choice((0.0, 0.1, 0.3, 0.6, 1.0), p=(0.05, 0.2, 0.3, 0.25, 0.2)))
        seed = int(random.integers(0, 2**32))
        return Case(self.pool, filters, channels, images, self.size, self.stride, self.padding, density, seed)


USED = {
    "whole images": Used((4, 4), (4, 4), (3, 1, 1)),
    "whole images, two of a patch": Used((4, 4), (4, 4), (2, 1, 1), images=2),
    "whole images of four pixels": Used((2, 2), (2, 2), (2, 1, 1), images=4),
    "whole odd images": Used((7, 7), (7, 7), (2, 1, 1)),
    "one pixel": Used((1, 1), (1, 1), (5, 1, 1)),
    "rows of four, whole height": Used((8, 8), (4, 4), (2, 2, 2)),
    "rows of four, part of the height": Used((8, 8), (2, 8), (1, 2, 1)),
    "rows of four, two images of a patch": Used((4, 8), (2, 4), (2, 1, 2), images=2),
    "rows of four, wide window": Used((6, 12), (3, 4), (1, 2, 3)),
    "odd rows": Used((6, 7), (3, 7), (2, 2, 1)),
    "part of a row": Used((4, 16), (2, 4), (2, 1, 2)),
    "patches as high as images": Used((14, 4), (14, 2), (2, 1, 2)),
    "stride 2": Used((8, 12), (2, 3), (2, 2, 1), stride=(2, 2)),
    "stride 2, whole images": Used((6, 6), (3, 3), (3, 1, 1), stride=(2, 2)),
    "twelve patterns, much padding": Used((3, 4), (7, 3), (2, 1, 2), pool=official_pool(12), padding=(3, 2)),
    "single taps, mixed strides": Used(
        (4, 9), (1, 1), (2, 2, 5), images=2, pool=all_patterns(1),
        stride=(1, 2), padding=(0, 1),
    ),
    "all nine taps": Used((5, 6), (3, 4), (3, 1, 1), pool=all_patterns(9), padding=(0, 0)),
    "seven entries, one pattern": Used((6, 6), (2, 3), (2, 3, 2), pool=PatternPool(tuple(all_patterns(7))[:1])),
    "three entries": Used((6, 8), (3, 4), (2, 2, 2), pool=PatternPool(tuple(all_patterns(3))[:5]), warps=3),
    "pointwise": Used((4, 6), (2, 6), (4, 2, 1), pool=full_pool(1), padding=(0, 0)),
}  # fmt: skip
CASES = 12


def gradient(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the backend gives for a case, and what it should give."""
    made, x, values, dy = case.operands()
    return backend.grad_values(x, dy, made), expected(made, x, values, dy)["grad_values"]


@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_random_layers(used, launcher):
    random = np.random.default_rng(sum(used.size) + used.images)
    with on_host(launcher), used.used():
        for _ in range(CASES):
            case = used.draw(random)
            got, want = gradient(case)
            assert relative_error(got.double(), want) < 1e-5, case
    assert len(launcher.texts) == 1


WHOLE = {
    "rows of four": Case(SQUARES, 13, 9, 5, (8, 8), (1, 1), (1, 1), 0.6, 3),
    "whole images": Case(SQUARES, 40, 12, 70, (4, 4), (1, 1), (1, 1), 0.3, 3),
    "odd": Case(SQUARES, 6, 5, 3, (14, 14), (1, 1), (1, 1), 0.6, 3),
    "one filter": Case(SQUARES, 1, 30, 3, (4, 4), (1, 1), (1, 1), 0.6, 3),
    "one channel": Case(SQUARES, 30, 1, 3, (4, 4), (1, 1), (1, 1), 1.0, 3),
}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_what_the_backend_chooses_by_itself(case, units):
    with on_host(HostLauncher(units, Limits(64 << 10, 4, warps=4))) as launcher:
        got, want = gradient(case)
        assert relative_error(got.double(), want) < 1e-5
        assert isinstance(backend._runtime(case.plan(), got).gradient, WindowGradient)
    assert all("window_gradient" in text for text in launcher.texts)


def test_results_are_the_same_bits_in_any_order_of_threads(units):
    results = []
    for order in ("forward", "reverse", "random", "eager"):
        with on_host(HostLauncher(units, orders=(order,))), RACED.used():
            results.append(gradient(CASE)[0])
    assert all(torch.equal(result, results[0]) for result in results)


RACED = Used((16, 8), (2, 4), (3, 4, 2))
"""Both warps copy patches and have several channels; lanes and the last region's images are too few."""
UNSHUFFLED = Used((8, 8), (2, 8), (2, 2, 1), pool=full_pool(1), padding=(0, 0), filters=80)
"""Its lanes do not wait for each other to add up sums, and a warp completes more than once."""
CASE = Case(SQUARES, 7, 8, 5, (16, 8), (1, 1), (1, 1), 0.8, seed=3)
"""Several pieces, channels of a warp, kernels at once, and regions of a block."""
SYNCHRONISATION = r"(?<=\s)(__syncthreads|wait_for_copies|sync_warp|wait_for_batches<0>)\(\);"
SOURCES = {name: (codegen.DIRECTORY / name).read_text() for name in ("window_gradient.cuh", "finish.cuh")}
POINTS = [(name, i) for name, text in SOURCES.items() for i in range(len(re.findall(SYNCHRONISATION, text)))]


def outcome(launcher: HostLauncher, used: Used = RACED, case: Case = CASE) -> str:
    """Return "right", "wrong", or the fault that the host found."""
    with on_host(launcher), used.used():
        try:
            got, want = gradient(case)
        except Fault as fault:
            return str(fault)
    return "right" if relative_error(got.double(), want) < 1e-5 else "wrong"


def test_all_points_of_synchronisation_are_tried():
    assert len(POINTS) == 11


@pytest.mark.parametrize(
    ("name", "number", "edited"), [("finish.cuh", 0, False), *((name, number, True) for name, number in POINTS)]
)
def test_deleting_any_barrier_or_wait_is_noticed(name, number, edited, units):
    source = SOURCES[name]

    def edit(unit: str) -> str:
        return unit.replace(source, without(SYNCHRONISATION, number)(source))

    pointwise = Case(full_pool(1), 80, 8, 3, (8, 8), (1, 1), (0, 0), 1.0, seed=3)
    outcomes = []
    for order in ("forward", "eager"):
        for used, case in ((RACED, CASE), (UNSHUFFLED, pointwise)):
            launcher = HostLauncher(units, orders=(order,))
            launcher.edit = edit if edited else str
            outcomes.append(outcome(launcher, used, case))
    assert (set(outcomes) == {"right"}) != edited, outcomes


MUTANTS = {
    "reads beyond the last image": ("bool exists = at.image + image < images;", "bool exists = true;"),
    "reads dy beyond the last image": ("const bool exists = at.image + image < images;", "const bool exists = true;"),
    "reads below the image": (" && top + row < IN_HEIGHT", ""),
    "reads above the image": ("exists && top + row >= 0", "exists"),
    "padding is not cleared": ("if (X_LEFT || X_TOP)", "if (false)"),
    "earlier regions are forgotten": ("= total + before;", "= total;"),
    "earlier regions are always there": ("region != split);\n    walk", "true);\n    walk"),
    "a warp's last kernels are not completed": ("if (pending.held) pending.complete();", ""),
    "another filter": ("planes + kernel / PATTERN_SPAN", "planes + kernel / PATTERN_SPAN * 0"),
    "filters beyond the last one": ("filters - first_filter < FILTERS ? filters - first_filter : FILTERS", "FILTERS"),
    "lanes without a patch are counted": ("if (SEATS < 32 && lane >= SEATS)", "if (false)"),
    "a channel of another region": ("at, words[2 + count], channels", "place_of(0), words[2 + count], channels"),
    "a diverging barrier": ("__syncthreads();\n    const", "if (lane) __syncthreads();\n    const"),
    "the sums of another kernel": ("places[i / entries] * pitch", "i / entries * pitch"),
}  # fmt: skip


@pytest.mark.parametrize("old_new", MUTANTS.values(), ids=MUTANTS)
def test_mistakes_are_noticed(old_new, units):
    launcher, edited = HostLauncher(units), []

    def edit(unit: str) -> str:
        edited.append(old_new[0] in unit)
        return unit.replace(*old_new)

    launcher.edit = edit
    assert outcome(launcher) != "right"
    assert all(edited)


def test_nan_under_pruned_taps_does_not_spread(launcher):
    index = torch.full((2, 2), PRUNED, dtype=torch.uint8)
    index[0, 0] = 3  # the square up and left
    made = plan(index, SQUARES, (3, 2, 16, 8), 1, 1)
    x = torch.randn(made.input_shape)
    x[0, 1], x[0, 0, 15, 7] = torch.nan, torch.inf  # a channel of no kernel; a corner that only the last pixel reads
    dy, values = torch.randn(made.output_shape), torch.randn(made.values_shape)
    with on_host(launcher), RACED.used():
        got = backend.grad_values(x, dy, made)
    assert torch.isfinite(got).tolist() == [[True, True, True, False]]
    finite = torch.isfinite(reference.grad_values(x.nan_to_num(0, 0, 0), dy, made))
    assert finite.all()
    assert values.shape == got.shape


def test_operands_may_start_anywhere(launcher):
    made, x, values, dy = CASE.operands()
    want = expected(made, x, values, dy)["grad_values"]
    x, dy = (torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape) for t in (x, dy))
    with on_host(launcher), RACED.used():
        assert relative_error(backend.grad_values(x, dy, made).double(), want) < 1e-5


def test_every_kernel_has_a_place_of_its_own():
    layer = Layer.forward(Case(SQUARES, 33, 21, 4, (8, 8), (1, 1), (1, 1), 0.7, 1).plan())
    spec = RACED.spec(layer)
    made = window_layout.programs(layer, spec)
    assert len(np.unique(made.places)) == len(made.places) == len(layer.kernels.filters)
    assert made.places.max() < made.kernels
    assert made.kernels % spec.groups == 0
    assert made.count > -(-33 // spec.filters) * -(-21 // spec.channels)  # full pieces were cut
    sizes = np.diff(made.pieces[:, 1])
    room = (
        spec.shared_bytes // 4 - spec.filters * spec.plane_words - spec.warps * (spec.slot_words + spec.pending_words)
    )
    assert sizes.max() <= room


def test_the_text_is_pure_and_the_same_as_for_nvrtc():
    layer = Layer.forward(CASE.plan())
    first, second = (RACED.spec(layer) for _ in range(2))
    text = window_text.unit(first)
    assert text == window_text.unit(second) != window_text.unit(replace(first, filters=5))
    digest = hashlib.sha256(window_text.render(first).encode()).hexdigest()
    assert hashlib.sha256(kernel_text(text).encode()).hexdigest() == digest
    assert host_unit(text).startswith(window_text.render(first))
    assert not re.search(r"^\s*#\s*(if|include|define)", window_text.render(first), re.MULTILINE)


LAYERS = {
    "64x32": Case(SQUARES, 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1),
    "256x8": Case(SQUARES, 256, 256, 128, (8, 8), (1, 1), (1, 1), 0.28, 1),
    "512x4": Case(SQUARES, 512, 512, 128, (4, 4), (1, 1), (1, 1), 0.28, 1),
    "512x2": Case(SQUARES, 512, 512, 128, (2, 2), (1, 1), (1, 1), 0.1, 1),
    "128x56/2": Case(SQUARES, 128, 64, 64, (56, 56), (2, 2), (1, 1), 0.28, 1),
    "256x14, twelve patterns": Case(official_pool(12), 256, 256, 64, (14, 14), (1, 1), (1, 1), 0.28, 1),
    "512x7, all taps": Case(all_patterns(9), 512, 512, 64, (7, 7), (1, 1), (1, 1), 0.1, 1),
}
GPUS = {"sm_80": Limits(163 << 10, 108), "sm_90": H100}
REGISTERS = 1 << 16


@pytest.mark.skipif(not nvrtc.libraries(), reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_registers_and_no_spills(case, gpu):
    layer = Layer.forward(case.plan())
    for spec in tuning._different_windows(window_tiling.candidates(layer, case.images, "float32", GPUS[gpu]))[:2]:
        assert spec.resident * (spec.shared_bytes + RESERVED_BYTES) <= GPUS[gpu].shared_bytes + RESERVED_BYTES
        found = nvrtc.compile_for(window_text.unit(spec), gpu)
        assert set(found) == {"window_gradient", "finish"}
        for kernel, resources in found.items():
            assert resources.spilled_bytes == resources.stack_bytes == 0, (kernel, resources)
            most = REGISTERS // (spec.warps * 32 * spec.resident) if kernel != "finish" else 40
            assert resources.registers <= min(255, most), (spec, resources)


def test_tuning_has_both_kinds_to_choose_from_in_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path))
    layer = Layer.forward(LAYERS["256x8"].plan())
    backend.forget()
    context = layer, 128, "float32", H100
    found = tuning.likely_gradients(*context)
    kinds = [type(spec) for spec in found]
    assert kinds == [WindowSpec] * tuning.WINDOWS + [GradientSpec] * tuning.OTHERS
    assert tuning.gradient_spec(*context) == found[0]
    assert len({tuning.choice_of(spec) for spec in found}) == len(found)
    exported = json.loads(json.dumps(backend.choices()))
    (key,) = exported
    for spec in (found[3], found[-1]):
        exported[key] = json.loads(json.dumps(tuning.asdict(tuning.choice_of(spec))))
        backend.forget()
        backend.use_choices(exported)
        assert tuning.gradient_spec(*context) == spec
    assert all(isinstance(spec, GradientSpec) for spec in tuning.likely_gradients(layer, 128, "bfloat16", H100))
    backend.forget()


def test_five_by_five_is_left_to_the_other_kernel():
    layer = Layer.forward(Case(full_pool(5), 8, 8, 2, (8, 8), (1, 1), (2, 2), 0.5, 1).plan())
    assert window_tiling.candidates(layer, 2, "float32", H100) == []
    assert isinstance(tuning.gradient_spec(layer, 2, "float32", H100), GradientSpec)
    assert gradient_tiling.candidates(layer, 2, "float32", H100)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (56, 56)])
def test_patches_that_do_not_fit_rule_out_none_that_do(size):
    """Whole images of 7 x 7 pixels are the cheapest patches, and need too many registers."""
    layer = Layer.forward(Case(official_pool(4), 512, 512, 64, size, (1, 1), (1, 1), 0.28, 1).plan())
    found = window_tiling.candidates(layer, 64, "float32", Limits(227 << 10, 132))
    assert len({spec.tile for spec in found}) > 1
