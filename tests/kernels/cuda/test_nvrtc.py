"""Every kind of CUDA unit compiles for Ampere and Hopper, within its registers and without spilling."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import codegen, gradient_tiling, tiling
from clicktrain.patterns import full_pool, official_pool
from tests.kernels.cases import Case
from tests.kernels.cuda import nvrtc

pytestmark = pytest.mark.skipif(not nvrtc.libraries(), reason="the wheel nvidia-cuda-nvrtc is not installed")

GPUS = {"sm_80": tiling.Limits(163 << 10, 108), "sm_90": tiling.Limits(227 << 10, 132)}
REGISTERS = 1 << 16
"""Of a multiprocessor."""
SQUARES, TWELVE = official_pool(4), official_pool(12)
LAYERS = {
    "64x32": Case(SQUARES, 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1),
    "512x2": Case(SQUARES, 512, 512, 128, (2, 2), (1, 1), (1, 1), 0.1, 1),
    "128x56/2": Case(SQUARES, 128, 64, 64, (56, 56), (2, 2), (1, 1), 0.28, 1),
    "256x14, twelve patterns": Case(TWELVE, 256, 256, 64, (14, 14), (1, 1), (1, 1), 0.28, 1),
    "five by five": Case(full_pool(5), 64, 64, 64, (14, 14), (1, 1), (2, 2), 0.3, 1),
    "pointwise": Case(full_pool(1), 256, 256, 64, (14, 14), (1, 1), (0, 0), 0.3, 1),
}
UNITS = [
    ("64x32", "forward", "float32"), ("64x32", "forward", "bfloat16"), ("64x32", "gradient", "float32"),
    ("64x32", "gradient", "float16"), ("512x2", "forward", "float16"), ("128x56/2", "forward", "float32"),
    ("128x56/2", "grad_input", "float32"), ("128x56/2", "gradient", "bfloat16"),
    ("256x14, twelve patterns", "grad_input", "float32"), ("256x14, twelve patterns", "gradient", "float32"),
    ("five by five", "forward", "float32"), ("five by five", "gradient", "float32"),
    ("pointwise", "forward", "float32"), ("pointwise", "gradient", "float32"),
]  # fmt: skip


def compile_unit(name, function, dtype, gpu):
    """Compile a unit as the backend chooses it for a layer; return its shared memory and what its kernels use."""
    case = LAYERS[name]
    layer = Layer.transposed(case.plan()) if function == "grad_input" else Layer.forward(case.plan())
    if function == "gradient":
        spec = gradient_tiling.spec(layer, case.images, dtype, GPUS[gpu])
        shared = gradient_tiling.shared_bytes(spec)
    else:
        spec = tiling.convolution_spec(layer, case.images, dtype, GPUS[gpu])
        shared = tiling.shared_bytes(spec, 0, 0)
    return spec, shared, nvrtc.compile_for(codegen.unit(spec), gpu)


@pytest.fixture(scope="module")
def compiling():
    """Compile all units, two at a time, while the tests look at the first ones."""
    pool = ThreadPoolExecutor(2)
    yield {(*unit, gpu): pool.submit(compile_unit, *unit, gpu) for unit in UNITS for gpu in GPUS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "function", "dtype"), UNITS)
@pytest.mark.parametrize("gpu", GPUS)
def test_registers_and_no_spills(name, function, dtype, gpu, compiling):
    spec, shared, found = compiling[name, function, dtype, gpu].result()
    assert spec.resident * (shared + tiling.RESERVED_BYTES) <= GPUS[gpu].shared_bytes + tiling.RESERVED_BYTES
    assert set(found) == ({"gradient", "finish"} if function == "gradient" else {"convolve"})
    for kernel, resources in found.items():
        assert resources.spilled_bytes == resources.stack_bytes == 0, (kernel, resources)
        most = REGISTERS // (spec.warps * 32 * spec.resident) if kernel != "finish" else 40
        assert resources.registers <= min(255, most), (kernel, resources)


def test_old_gpus_get_copies_without_the_asynchronous_instruction():
    layer = Layer.forward(LAYERS["64x32"].plan())
    spec = tiling.convolution_spec(layer, 128, "bfloat16", tiling.Limits(64 << 10, 40))
    assert set(nvrtc.compile_for(codegen.unit(spec), "sm_75")) == {"convolve"}


def test_the_limits_are_sharp():
    """Four times the sums of a lane do not fit: the report that the other tests read would say so."""
    layer = Layer.forward(LAYERS["64x32"].plan())
    spec = tiling.cut(layer, "float32", (8, 16), 1, 1, (1, 4, 2), 16)
    found = nvrtc.compile_for(codegen.unit(replace(spec, channels=4)), "sm_80")
    assert found["convolve"].spilled_bytes > 0
