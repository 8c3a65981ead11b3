import subprocess
import sys

import torch

PROGRAM = """
import sys
import torch
from clicktrain import memory
before = memory.peak(torch.device("cpu"))
torch.ones(int(sys.argv[1]))
print(before, memory.peak(torch.device("cpu")), memory.counted("VmRSS"))
"""


def peaks(floats: int) -> tuple[int, int, int]:
    """Return peaks of a new process before and after it made and freed so many floats, and what it holds then."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(floats)], check=True, capture_output=True, text=True)
    before, after, held = map(int, done.stdout.split())
    return before, after, held


def test_the_peak_stays_when_memory_is_freed() -> None:
    before, after, held = peaks(64 * 2**20)
    assert after - before > 200 * 2**20
    assert after - held > 200 * 2**20


def test_a_small_child_of_a_large_process_is_small() -> None:
    large = torch.ones(512 * 2**20)
    assert peaks(1)[1] < large.nbytes
