"""The C++ sources of the CPU kernels and how they are compiled; shared by `setup.py` and `build.py`.

Imports nothing but the standard library, because `setup.py` loads it where neither torch nor clicktrain is
installed yet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

DIRECTORY = Path(__file__).parent / "cpu"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi")
"""Compiler flags. No fast-math: sums keep their order; multiply and add contract to FMA, GCC's default."""
LINK_FLAGS = ("-shared", "-fopenmp")


def sources() -> list[Path]:
    """Return the translation units of the precompiled library."""
    return sorted(DIRECTORY.glob("*.cpp"))


def headers() -> list[Path]:
    """Return everything that the translation units include."""
    return sorted([*DIRECTORY.glob("*.h"), *DIRECTORY.glob("*.inc")])


def digest() -> str:
    """Return a SHA-256 of flags, sources and headers: what the precompiled library was made from."""
    content = hashlib.sha256(repr((FLAGS, LINK_FLAGS)).encode())
    for path in [*sources(), *headers()]:
        content.update(repr((path.name, path.read_bytes())).encode())
    return content.hexdigest()
