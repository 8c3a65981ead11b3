"""Images that are batch last: which format results have, where operands are copied, and how passes are tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from clicktrain.errors import InvalidArgument
from clicktrain.kernels import build, reference
from clicktrain.kernels.cuda import backend, tensor, tensor_tiling, tensor_tuning, tuning
from clicktrain.kernels.cuda.epilogue import NO_EPILOGUE, Epilogue
from clicktrain.kernels.cuda.tensor_estimate import estimate, row_bytes
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.patterns import official_pool
from tests.kernels.cases import expected, relative_error
from tests.kernels.cuda.configurations import TOLERANCES
from tests.kernels.cuda.host import HostLauncher, on_host
from tests.kernels.cuda.shared import SharedCase

CASE = SharedCase(official_pool(4), 32, 9, 16, (5, 6), (1, 1), (1, 1), 0.5, seed=1)
H200 = Limits(227 << 10, 132)
FORMATS = {False: torch.Tensor.contiguous, True: backend.as_batch_last}


def operands(case=CASE, dtype="bfloat16"):
    made, *tensors = case.operands()
    return made, *(t.to(getattr(torch, dtype)) for t in tensors)


def results(made, x, values, dy):
    return {
        "forward": backend.forward(x, values, made), "grad_input": backend.grad_input(dy, values, made),
        "grad_values": backend.grad_values(x, dy, made),
    }  # fmt: skip


def test_batch_last_is_an_ordinary_tensor_with_other_strides():
    x = torch.randn(16, 3, 4, 5)
    there = backend.as_batch_last(x)
    assert torch.equal(there, x)
    assert there.shape == x.shape
    assert there.stride() == (1, 4 * 5 * 16, 5 * 16, 16)
    assert tensor.is_batch_last(there)
    assert backend.as_batch_last(there).data_ptr() == there.data_ptr()
    assert not any(map(tensor.is_batch_last, (x, x.contiguous(memory_format=torch.channels_last), x.flatten(1))))


@pytest.mark.parametrize("batch_last", FORMATS)
def test_results_have_the_format_of_the_images(batch_last, launcher):
    made, x, values, dy = operands()
    x, dy = FORMATS[batch_last](x), FORMATS[batch_last](dy)
    with on_host(launcher):
        got = results(made, x, values, dy)
    assert tensor.is_batch_last(got["forward"]) is tensor.is_batch_last(got["grad_input"]) is batch_last
    assert got["grad_values"].is_contiguous()
    assert {text.count("BATCH_LAST = 1;") for text in launcher.texts} == {int(batch_last)}
    for name, want in expected(made, x, values, dy).items():
        assert relative_error(got[name].double(), want) < TOLERANCES["bfloat16"]


ELSEWHERE = {
    "a batch that is no multiple of 8": (replace(CASE, images=12), "bfloat16"),
    "few images": (replace(CASE, images=4), "bfloat16"),
    "float32": (CASE, "float32"),
}


@pytest.mark.parametrize("case", ELSEWHERE.values(), ids=ELSEWHERE)
def test_operands_are_copied_into_nchw_where_tensor_cores_do_not_serve_them(case, launcher):
    made, x, values, dy = operands(*case)
    with on_host(launcher):
        got = results(made, backend.as_batch_last(x), values, backend.as_batch_last(dy))
    assert all(result.is_contiguous() for result in got.values())
    assert not any("BATCH_LAST = 1;" in text for text in launcher.texts)
    for name, want in expected(made, x, values, dy).items():
        assert relative_error(got[name].double(), want) < TOLERANCES[case[1]]


def test_operands_of_two_formats_are_copied_into_nchw(launcher):
    made, x, values, dy = operands()
    with on_host(launcher):
        got = backend.grad_values(backend.as_batch_last(x), dy, made)
    assert "BATCH_LAST = 0;" in "".join(launcher.texts)
    assert relative_error(got.double(), expected(made, x, values, dy)["grad_values"]) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("residual_batch_last", FORMATS)
@pytest.mark.parametrize("batch_last", FORMATS)
def test_a_residual_in_either_format(batch_last, residual_batch_last, launcher):
    made, x, values, dy = operands()
    scale, shift = torch.randn(32), torch.randn(32)
    want = reference.forward(x.double(), values.double(), made)
    want = (want * scale[:, None, None] + shift[:, None, None] + dy).relu()
    epilogue = Epilogue(scale, shift, FORMATS[residual_batch_last](dy), relu=True)
    with on_host(launcher):
        y = backend.forward_fused(FORMATS[batch_last](x), values, made, epilogue)
    assert tensor.is_batch_last(y) is batch_last
    assert relative_error(y.double(), want) < TOLERANCES["bfloat16"]
    strided = Epilogue(residual=dy.contiguous(memory_format=torch.channels_last))
    with on_host(launcher), pytest.raises(InvalidArgument, match="residual has strides"):
        backend.forward_fused(x, values, made, strided)


def test_images_may_start_anywhere(launcher):
    made, x, values, dy = operands()
    moved = [torch.cat((t.new_zeros(1), t.permute(1, 2, 3, 0).flatten()))[1:] for t in (x, dy)]
    x_there, dy_there = (
        m.view(*t.shape[1:], t.shape[0]).permute(3, 0, 1, 2) for m, t in zip(moved, (x, dy), strict=True)
    )
    assert tensor.is_batch_last(x_there)
    assert x_there.data_ptr() % 16 == 2
    with on_host(launcher):
        got = results(made, x_there, values, dy_there)
    assert tensor.is_batch_last(got["forward"])
    for name, want in expected(made, x, values, dy).items():
        assert relative_error(got[name].double(), want) < TOLERANCES["bfloat16"]


@pytest.fixture
def forgotten(tmp_path, monkeypatch):
    """Start with no choice, in memory or on disk."""
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path))
    assert build.cache_directory() == tmp_path
    backend.forget()
    yield
    backend.forget()


LAYER = SharedCase(official_pool(4), 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1).plan()


@pytest.mark.parametrize("batch_last", FORMATS)
@pytest.mark.parametrize("function", tensor_tuning.FUNCTIONS)
def test_likely_candidates_start_with_the_estimate_and_differ(function, batch_last, forgotten):
    context = (LAYER, "bfloat16", H200, batch_last)
    found = tensor_tuning.likely(function, *context)
    assert found[0] == tensor_tuning.choose(function, *context)
    assert all(spec.batch_last is batch_last for spec in found)
    assert len({tensor_tuning.choice_of(spec) for spec in found}) == len(found) == tensor_tuning.CANDIDATES
    estimates = [estimate(spec, LAYER, H200) for spec in found]
    assert estimates == sorted(estimates)


def test_likely_forward_passes_hide_the_wait_for_memory_in_different_ways(forgotten):
    found = tensor_tuning.likely("forward", LAYER, "bfloat16", H200, True)
    ways = {(min(spec.buffers, 3), spec.input.channels == 64) for spec in found}
    assert ways >= {(1, True), (2, True), (2, False), (3, False)}
    assert all(spec.all_rows for spec in found)  # weights of 64 channels fit beside any tiles
    best = estimate(found[0], LAYER, H200)
    assert all(estimate(spec, LAYER, H200) < tensor_tuning.HOPELESS * best for spec in found)


def test_rows_come_at_once_exactly_where_a_block_has_room(forgotten):
    made = SharedCase(official_pool(4), 256, 256, 64, (14, 14), (1, 1), (1, 1), 0.28, 1).plan()
    candidates = tensor_tiling.forward_candidates(made, "bfloat16", H200, True)
    assert {spec.all_rows for spec in candidates} == {False, True}
    for spec in candidates:
        at_once = replace(spec, all_rows=True)
        assert spec.all_rows == (at_once.shared_bytes + row_bytes(at_once, made) <= H200.shared_bytes)
        assert spec.shared_bytes + row_bytes(spec, made) <= H200.shared_bytes


@pytest.mark.parametrize("function", tensor_tuning.FUNCTIONS)
def test_a_measured_choice_is_used_exported_imported_and_kept_on_disk(function, forgotten, monkeypatch):
    context = (function, LAYER, "bfloat16", H200, True)
    wanted, measured = tensor_tuning.likely(*context)[3], []
    monkeypatch.setattr(tuning, "fastest", lambda specs, run: measured.append(specs) or wanted)
    for _ in range(2):
        tuning.forget()
        tensor_tuning.tune(*context, lambda spec: lambda: None)
        assert tensor_tuning.choose(*context) == wanted
    assert len(measured) == 1  # the second time it was on disk
    assert len(measured[0]) == tensor_tuning.CANDIDATES
    assert tensor_tuning.choose(function, LAYER, "bfloat16", H200, False) != wanted
    exported = json.loads(json.dumps(backend.choices()))
    backend.forget()
    backend.use_choices(exported)
    assert tensor_tuning.choose(*context) == wanted
    with pytest.raises(InvalidArgument, match=r"for tensor cores rect, groups"):
        backend.use_choices({"k": {"rect": [1, 2]}})


def test_each_candidate_computes_the_same(units, forgotten, monkeypatch):
    """Tuning runs every candidate of every pass on the operands that it measures."""
    small = Limits(shared_bytes=48 << 10, multiprocessors=4, warps=4)
    ran = []

    def fastest(specs, run):
        launches = [run(spec) for spec in specs]
        found = [launch().double() for launch in launches]
        assert all(relative_error(one, found[0]) < 2 * TOLERANCES["bfloat16"] for one in found)
        ran.append(len(found))
        return specs[-1]

    monkeypatch.setattr(tuning, "fastest", fastest)
    made, x, values, dy = operands(replace(CASE, images=24))
    there = (backend.as_batch_last(x), values, backend.as_batch_last(dy))
    texts = tensor.units(made, "bfloat16", small, None, True)
    with on_host(HostLauncher(units, small)) as launcher:
        tensor.tune(made, "bfloat16", launcher, there, NO_EPILOGUE, tensor_tuning.FUNCTIONS)
        got = results(made, *there)
        assert launcher.texts <= set(texts)
        assert len(tensor.units(made, "bfloat16", small, None, True)) == 3  # as found on disk
        last = tensor_tuning.likely("forward", made, "bfloat16", small, True)[-1]
        assert backend._runtime(made, there[0]).forward.spec == last
    assert len(ran) == 3
    assert min(ran) > 1
    for name, want in expected(made, x, values, dy).items():
        assert relative_error(got[name].double(), want) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("name", ["forward", "input", "values"])
def test_candidates_fit_the_device(name):
    candidates = getattr(tensor_tiling, f"{name}_candidates")(LAYER, "bfloat16", H200, True)
    assert len(candidates) > 50
    assert all(spec.shared_bytes <= H200.shared_bytes and spec.warps <= 16 for spec in candidates)
    assert {spec.buffers for spec in candidates} >= {2, 3}
