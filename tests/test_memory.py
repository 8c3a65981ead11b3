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


def test_kept_memory_costs_its_page_faults_once() -> None:
    program = (
        "import resource, sys, torch\n"
        "from clicktrain import memory\n"
        "if sys.argv[1] == 'kept': assert memory.keep()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.zeros(10_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())\n"
    )
    # 40 MB is 10,000 pages, or 20 huge ones.
    counts = {
        how: int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True).stdout)
        for how in ("torch", "kept")
    }
    assert counts["kept"] < counts["torch"] / 2


def test_kept_memory_can_be_handed_back() -> None:
    program = (
        "import torch\n"
        "from clicktrain import memory\n"
        "assert memory.keep()\n"
        "torch.ones(64 * 2**20)\n"
        "kept = memory.counted('VmRSS')\n"
        "assert memory.release()\n"
        "print(kept - memory.counted('VmRSS'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert int(done.stdout) > 200 * 2**20
