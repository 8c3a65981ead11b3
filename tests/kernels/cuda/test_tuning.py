"""Choosing how passes are cut up: estimates, measured choices, checkpoints, the cache on disk."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from clicktrain.errors import InvalidArgument
from clicktrain.kernels import build
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import backend, gradient_tiling, tiling, tuning
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, GradientSpec
from clicktrain.kernels.cuda.tiling import CODE_BYTES, Limits
from clicktrain.patterns import official_pool
from tests.kernels.cases import Case
from tests.kernels.cuda.host import on_host

H200 = Limits(227 << 10, 132)
LAYER = Layer.forward(Case(official_pool(4), 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1).plan())
CONTEXT = (LAYER, 128, "float32", H200)


@pytest.fixture(autouse=True)
def forgotten(tmp_path, monkeypatch):
    """Start with no choice, in memory or on disk."""
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path))
    assert build.cache_directory() == tmp_path
    backend.forget()
    yield
    backend.forget()


def test_candidates_fit_the_device():
    found = tiling.candidates(*CONTEXT)
    assert len(found) > 50
    for spec in found:
        assert spec.warps * 32 * spec.resident <= 1024
        assert tiling.code_bytes(spec) <= CODE_BYTES
        shared = tiling.shared_bytes(spec, 0, 0) + tiling.RESERVED_BYTES
        assert spec.resident * shared <= H200.shared_bytes + tiling.RESERVED_BYTES


def test_likely_candidates_start_with_the_estimate_and_differ():
    found = tuning.likely(*CONTEXT)
    assert found[0] == tiling.convolution_spec(*CONTEXT)
    assert len({tuning.choice_of(spec) for spec in found}) == len(found) == tuning.CANDIDATES


def test_a_choice_is_used_exported_and_imported():
    first, second = tuning.likely(*CONTEXT)[:2]
    assert tuning.convolution_spec(*CONTEXT) == first
    exported = json.loads(json.dumps(backend.choices()))
    (key,) = exported
    exported[key] = json.loads(json.dumps(tuning.asdict(tuning.choice_of(second))))
    backend.forget()
    backend.use_choices(exported)
    assert tuning.convolution_spec(*CONTEXT) == second
    assert backend.choices()[key]["slots"] == second.slots


def test_nonsense_is_no_choice():
    with pytest.raises(InvalidArgument, match=r"choice k=.*expected tile, images"):
        backend.use_choices({"k": {"tile": [1, 2]}})


def test_the_measured_choice_is_kept_on_disk(monkeypatch):
    wanted = tuning.likely(*CONTEXT)[3]
    measured = []
    monkeypatch.setattr(tuning, "fastest", lambda specs, run: measured.append(specs) or wanted)
    for _ in range(2):
        tuning.forget()
        tuning.tune(ConvolutionSpec, *CONTEXT, tuning.likely, lambda spec: lambda: None)
        assert tuning.convolution_spec(*CONTEXT) == wanted
    assert len(measured) == 1  # the second time it was on disk
    assert len(measured[0]) == tuning.CANDIDATES


@pytest.mark.parametrize(
    ("functions", "fused", "passes"), [(("forward",), True, 1), (("grad_input", "grad_values"), False, 2)]
)
def test_only_what_will_be_asked_for_is_compiled_and_measured(functions, fused, passes, launcher, monkeypatch):
    compiled, ran = [], []

    def fastest(specs, run):
        results = [run(spec)() for spec in specs]
        torch.testing.assert_close(results, [results[0]] * len(results), rtol=1e-4, atol=1e-4)
        ran.append(len(specs))
        return specs[-1]

    monkeypatch.setattr(backend, "compile_ahead", compiled.extend)
    monkeypatch.setattr(tuning, "fastest", fastest)
    made = Case(official_pool(4), 5, 6, 3, (7, 6), (1, 1), (1, 1), 0.5, 1).plan()
    with on_host(launcher):
        backend.tune([made], functions=functions, fused=fused)
        assert backend.choices().keys() == {
            tuning.fingerprint(layer, 3, "float32", launcher.limits(backend._device()), kind)
            for layer, kind, name in (
                (Layer.forward(made), ConvolutionSpec, "forward"),
                (Layer.transposed(made), ConvolutionSpec, "grad_input"),
                (Layer.forward(made), GradientSpec, "grad_values"),
            )
            if name in functions
        }
        assert len(ran) == passes
        assert sum(ran) == len(compiled)
        assert launcher.texts <= set(compiled)
        assert all("constexpr int FUSED = 1;" in text for text in compiled) == fused
        compiled.clear()
        tuning.forget()
        backend.tune([made], functions=functions, fused=fused)  # as found on disk
        assert len(compiled) == len(ran) == passes


def test_layouts_that_a_graph_may_have_recorded_outlive_tuning(launcher, monkeypatch):
    monkeypatch.setattr(backend, "compile_ahead", lambda texts: None)
    monkeypatch.setattr(tuning, "fastest", lambda specs, run: specs[-1])
    made, x, values, _ = Case(official_pool(4), 5, 6, 3, (7, 6), (1, 1), (1, 1), 0.5, 1).operands()
    with on_host(launcher):
        y = backend.forward(x, values, made)
        (former,) = (weakref.ref(runtime.forward) for runtime in backend._runtimes[made].values())
        backend.tune([made], functions=("forward",))
        torch.testing.assert_close(backend.forward(x, values, made), y)
        gc.collect()
        assert former() is not None
        assert all(runtime.forward is not former() for runtime in backend._runtimes[made].values())


def test_the_fastest_is_the_one_with_the_smallest_median(monkeypatch):
    specs, clock = tuning.likely(*CONTEXT)[:3], [0.0]
    durations = {specs[0]: [3.0], specs[1]: [9.0, 1.0, 1.0], specs[2]: [2.0]}
    calls = dict.fromkeys(specs, 0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    def run(spec):
        def launch():
            series = durations[spec]
            clock[0] += series[calls[spec] % len(series)]
            calls[spec] += 1

        return launch

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(tuning.torch, "empty", lambda *a, **k: torch.zeros(1))
    assert tuning.fastest(specs, run) == specs[1]


@pytest.mark.parametrize(("pieces", "regions"), [(30, 128), (1, 7), (1000, 40), (131, 1)])
def test_regions_are_divided_so_that_no_multiprocessor_works_much_longer(pieces, regions):
    parts = gradient_tiling.splits(pieces, regions, 1, H200)
    assert 1 <= parts <= regions

    def rounds(parts):
        return -(-pieces * parts // 132) * (-(-regions // parts) + 2)

    assert rounds(parts) <= rounds(1)


def test_what_is_prepared_is_what_will_run(monkeypatch, launcher):
    case, compiled = Case(official_pool(4), 9, 10, 3, (6, 6), (1, 1), (1, 1), 0.5, 1), []
    monkeypatch.setattr(backend, "compile_ahead", lambda texts: compiled.append(set(texts)))
    with on_host(launcher):
        made, x, values, dy = case.operands()
        (call,) = backend.preparations(made, ("forward", "grad_values"))
        call()
        assert made not in backend._runtimes, "nothing is laid out on the device, whose work may be being recorded"
        backend.forward(x, values, made)
        backend.grad_values(x, dy, made)
        assert compiled == [launcher.texts]
        empty = Case(official_pool(4), 9, 10, 3, (6, 6), (1, 1), (1, 1), 0.0, 1).plan()
        assert backend.preparations(empty, ("forward",)) == []


def test_batches_of_about_a_size_are_cut_up_alike():
    assert [tuning.typical(images) for images in (0, 1, 2, 3, 112, 128, 250)] == [0, 1, 2, 2, 64, 128, 128]
    layer, _, *rest = CONTEXT
    assert tuning.convolution_spec(layer, 250, *rest) is tuning.convolution_spec(*CONTEXT)
    assert tuning.gradient_spec(layer, 250, *rest) is tuning.gradient_spec(*CONTEXT)
    assert len(backend.choices()) == 2
    assert tuning.convolution_spec(layer, 3, *rest) != tuning.convolution_spec(*CONTEXT)
