"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on convolutions of every kind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clicktrain.kernels.cpu import backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backend.available() is not True, reason=str(backend.available())),
]

PROGRAM = """
import functools
import torch
from clicktrain.kernels import build, sources
from clicktrain.kernels.cpu import backend, codegen, library, memory

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
codegen.FLAGS = (*codegen.FLAGS, *FLAGS)
build.LINK_FLAGS = (*build.LINK_FLAGS, "-fsanitize=address,undefined")
units = tuple((path.name, path.read_text()) for path in sources.sources())
kernels = build.load(build.Library("sanitized", units, (*sources.FLAGS, *FLAGS)))
library.load = lambda: kernels
memory.empty = lambda *shape: torch.full(shape, torch.nan)  # each tensor between guards of its own

from clicktrain.patterns import all_patterns, full_pool, official_pool
from tests.kernels.cases import Case, expected, relative_error
from tests.kernels.test_cpu_backend import CASES, run

more = [
    Case(official_pool(8), 9, 17, 11, (5, 13), (1, 1), (3, 0), 0.4, 7),
    Case(all_patterns(9), 5, 3, 2, (4, 4), (2, 2), (1, 1), 1.0, 8),
    Case(all_patterns(4), 12, 9, 8, (6, 6), (1, 1), (1, 1), 0.7, 9),
    Case(full_pool(5), 6, 7, 3, (9, 8), (2, 1), (2, 2), 0.5, 10),
    Case(official_pool(4), 66, 70, 17, (2, 2), (1, 1), (1, 1), 0.2, 11),
    Case(official_pool(4), 4, 4, 1, (3, 3), (3, 3), (1, 1), 0.5, 12),
]
for case in [*CASES.values(), *more]:
    want, got = expected(*case.operands()), run(case)
    assert all(relative_error(got[name], want[name]) < 1e-5 for name in want), case

from tests.kernels.test_winograd import LARGE, check

check(LARGE)
for size, padding in [((5, 13), (3, 0)), ((1, 9), (1, 1)), ((3, 3), (2, 3))]:
    check(Case(official_pool(8), 9, 17, 11, size, (1, 1), padding, 0.4, 7))

from torch import nn
from clicktrain import deploy

torch.set_grad_enabled(False)
for images, size, kernel_size, stride, padding in [  # strips of images, widened
    (1, (13, 10), 3, 1, 1), (3, (9, 17), 3, 2, 1), (2, (5, 4), 5, 1, 2), (1, (8, 8), 1, 2, 0), (1, (3, 2), 3, 1, 2),
]:
    conv, x = nn.Conv2d(70, 18, kernel_size, stride, padding).eval(), torch.randn(images, 70, *size)
    assert relative_error(deploy.compile(conv, x)(x), conv(x)) < 1e-5, (images, size)
print("clean")
"""


def test_no_sanitizer_complains() -> None:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"
    assert "runtime error" not in done.stderr
