"""What the GPU can do at most: the ceilings that the kernels' rates are compared with."""

from __future__ import annotations

import torch

from clicktrain import timing

SIZE = 8192
COPIED_BYTES = 1 << 30
FMA_PER_MULTIPROCESSOR = 128
"""Float32 multiply-adds of a cycle: compute capability 8.6 and newer, all but the A100's 64."""


def measure(rounds: int) -> dict[str, float]:
    """Return 10^9 operations a second of the FP32 units by the device's clock, of large products, and of a copy.

    Returns
    -------
    dict
        "fp32_gflops" (multiprocessors x multiply-adds x highest clock), "fp32_product_gflops" and
        "bf16_product_gflops" (8192 x 8192 x 8192), "copy_gbps" (bytes read and written).
    """
    from cupy.cuda import Device

    attributes = Device(torch.cuda.current_device()).attributes
    per_cycle = 64 if torch.cuda.get_device_capability() == (8, 0) else FMA_PER_MULTIPROCESSOR
    a, b = (torch.randn(SIZE, SIZE, device="cuda") for _ in range(2))
    narrow_a, narrow_b = a.bfloat16(), b.bfloat16()
    source = torch.ones(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    times = timing.compare(
        {"fp32": lambda: a @ b, "bf16": lambda: narrow_a @ narrow_b, "copy": lambda: target.copy_(source)},
        None, warmup_seconds=0.05, rounds=rounds, device="cuda",
    )  # fmt: skip
    return {
        "fp32_gflops": 2 * attributes["MultiProcessorCount"] * per_cycle * attributes["ClockRate"] / 1e6,
        "fp32_product_gflops": 2 * SIZE**3 / times["fp32"].median_ms / 1e6,
        "bf16_product_gflops": 2 * SIZE**3 / times["bf16"].median_ms / 1e6,
        "copy_gbps": 2 * COPIED_BYTES / times["copy"].median_ms / 1e6,
    }
