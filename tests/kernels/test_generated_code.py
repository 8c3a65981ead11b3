"""The C++ that is written for a pool and a tile: it compiles for machines other than this one, and fits registers."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from clicktrain.kernels.cpu import accumulators, codegen, library, sweeps
from clicktrain.kernels.cpu.accumulators import AccumulatorSpec, by_register, merged, taps_by_pixel
from clicktrain.kernels.cpu.codegen import SweepSpec, TileShape
from clicktrain.patterns import official_pool

PATTERNS = tuple(tuple(pattern) for pattern in official_pool(12).positions().tolist())
REGISTERS = {"avx512": 32, "avx2": 16}
SHAPES = (
    TileShape(1, 2, 4, (0, 4), (0, 6)),
    TileShape(1, 2, 3, (1, 4), (0, 5)),  # an odd row, below padding
    TileShape(1, 1, 4, (0, 2), (1, 6)),
)


def compile_only(text: str, tmp_path: Path) -> None:
    """Let g++ check a translation unit, whatever this machine can run."""
    unit = tmp_path / "unit.cpp"
    unit.write_text(text)
    command = ["g++", *codegen.FLAGS, "-Werror", "-fsyntax-only", "-I", str(Path(library.__file__).parent), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
@pytest.mark.parametrize("sweep", codegen.REGISTERS)
def test_sweeps_compile_for_every_instruction_set(sweep: codegen.Sweep, instruction_set: str, tmp_path: Path) -> None:
    register = codegen.REGISTERS[sweep]
    if register.name == "Pair" and instruction_set != "avx512":
        return  # the others have no registers for pairs, and nothing asks for them
    tile = (register.blocks, 2, 4)
    spec = SweepSpec(sweep, instruction_set, 3, PATTERNS, len(PATTERNS), (1, 1), (1, 1), (0, 0), 4, 6, tile)
    shapes = (*SHAPES, replace(SHAPES[0], blocks=register.blocks))
    places: tuple[codegen.Weights, ...] = ("packed", "values", "reversed")
    for weights in places[: 3 if codegen.goes_by_channel(sweep) else 1]:
        compile_only(sweeps.render(replace(spec, weights=weights), shapes), tmp_path)


def accumulator_spec(instruction_set: str, width: int | None = None) -> AccumulatorSpec:
    rows, pixels = taps_by_pixel(5, 5, 3, 1, 1), by_register(taps_by_pixel(5, 5, 3, 1, 1), instruction_set)
    if width is None:
        rows, pixels = merged(rows)[0], merged(pixels)[0]
    return AccumulatorSpec(instruction_set, 3, PATTERNS, (1, 1), rows, pixels, width)


@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
def test_accumulators_compile_for_every_instruction_set(
    instruction_set: str, width: int | None, tmp_path: Path
) -> None:
    compile_only(accumulators.render(accumulator_spec(instruction_set, width)), tmp_path)


@pytest.mark.parametrize("instruction_set", REGISTERS)
def test_accumulators_fit_the_registers(instruction_set: str) -> None:
    """Sums, what is held and what passes by: with one more, AVX2 took twice as long."""
    spec = accumulator_spec(instruction_set)
    text = accumulators.render(spec)
    inner = re.findall(r"for \(; c < a->column_ends.*?\n      \}", text, re.DOTALL)
    held = max(len(re.findall(r"^        (?:Vec|Pair) ", loop, re.MULTILINE)) for loop in inner)
    assert held >= 1
    assert spec.filters * len(PATTERNS[0]) + held + 1 <= REGISTERS[instruction_set]
