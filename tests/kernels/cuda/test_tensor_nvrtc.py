"""The tensor-core kernels as NVRTC compiles them: registers, shared memory and spills."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest

from clicktrain.kernels.cuda import tensor_estimate, tensor_layout, tensor_text, tensor_tiling
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.patterns import full_pool, official_pool
from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.shared import SQUARES, SharedCase

GPUS = {"sm_80": Limits(163 << 10, 108), "sm_90": Limits(227 << 10, 132)}
LAYERS = {
    "64x32": SharedCase(SQUARES, 64, 64, 128, (32, 32), (1, 1), (1, 1), 0.28, 1),
    "256x8": SharedCase(SQUARES, 256, 256, 128, (8, 8), (1, 1), (1, 1), 1.0, 1),
    "512x2": SharedCase(SQUARES, 512, 512, 128, (2, 2), (1, 1), (1, 1), 0.28, 1),
    "128x56/2": SharedCase(SQUARES, 128, 64, 64, (56, 56), (2, 2), (1, 1), 0.28, 1),
    "256x7, twelve patterns": SharedCase(official_pool(12), 256, 256, 64, (7, 7), (1, 1), (1, 1), 0.28, 1),
    "five by five": SharedCase(full_pool(5), 64, 64, 64, (14, 14), (1, 1), (2, 2), 0.3, 1),
    "pointwise": SharedCase(full_pool(1), 256, 256, 64, (14, 14), (1, 1), (0, 0), 0.3, 1),
}
KERNELS = {"forward": {"tensor_forward"}, "input": {"tensor_input"}, "values": {"tensor_values", "finish"}}


def compile_unit(name, function, gpu, batch_last):
    """Compile a unit as the backend chooses it for a layer; return its shared memory and what its kernels use."""
    made = LAYERS[name].plan()
    spec = getattr(tensor_tiling, f"{function}_spec")(made, "bfloat16", GPUS[gpu], batch_last)
    shared = spec.shared_bytes
    if function == "input":
        found = tensor_layout.input_jobs(made, spec)
        shared += spec.weight_bytes(int(found.kernels[..., 1].max())) + spec.job_bytes(int(np.diff(found.bounds).max()))
    elif function == "forward":
        shared += tensor_estimate.row_bytes(spec, made)
    return shared, nvrtc.compile_for(tensor_text.unit(spec), gpu)


@pytest.fixture(scope="module")
def compiling():
    """Compile all units, two at a time, while the tests look at the first ones."""
    pool = ThreadPoolExecutor(2)
    units = product(LAYERS, KERNELS, GPUS, (False, True))
    yield {unit: pool.submit(compile_unit, *unit) for unit in units}
    pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(not nvrtc.libraries(), reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("batch_last", [False, True])
def test_registers_and_no_spills(name, function, gpu, batch_last, compiling):
    shared, found = compiling[name, function, gpu, batch_last].result()
    assert shared <= GPUS[gpu].shared_bytes
    assert set(found) == KERNELS[function]
    for kernel, resources in found.items():
        assert resources.spilled_bytes == resources.stack_bytes == 0, (kernel, resources)
        # 16 warps of 128 registers fill a multiprocessor.
        assert resources.registers <= (40 if kernel == "finish" else 128), (kernel, resources)
