"""How passes are cut up: an estimate without measuring, or the best of a few measured candidates.

Every choice that is handed out is remembered under the pass's fingerprint, measured or not. `export_choices` gives
them all as plain data for a checkpoint and `import_choices` puts them back, so that a resumed run computes the same
bits, whatever it would choose itself. Only `tune` measures, and only it reads and writes choices on disk.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.files import write_atomic
from clicktrain.kernels import build, sources
from clicktrain.kernels.cpu import codegen
from clicktrain.kernels.cpu.estimates import candidates, estimate
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.library import function, instruction_set
from clicktrain.kernels.cpu.passes import can_pool, gather, prepare
from clicktrain.kernels.cpu.tiles import MOST_CHANNELS, Choice
from clicktrain.processor import processor

ROUNDS = 9
VERSION = 10
"""Of the candidates: choices on disk are of one version of these and of the C++ sources."""
_OLD_NAMES: dict[str, codegen.Sweep] = {"pairs": "channel_pairs"}
"""Of sweeps, in files that were written before there were pairs of two kinds."""

_choices: dict[str, Choice] = {}


def choice_for(layer: Layer, blocks: int, pooled: bool = False, transforms: bool = False) -> Choice:
    """Return how to cut up a pass: as tuned, imported or chosen before, else as estimated."""
    key = fingerprint(layer, blocks, pooled, transforms)
    if key not in _choices:
        _choices[key] = estimate(layer, blocks, pooled)
    return _choices[key]


def export_choices() -> dict[str, dict[str, Any]]:
    """Return all choices made so far as plain data, by fingerprint."""
    return {key: asdict(choice) for key, choice in sorted(_choices.items())}


def import_choices(choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Make exported choices valid for all passes that are laid out from now on.

    Raises
    ------
    InvalidArgument
        If an entry is not what `export_choices` gives.
    """
    _choices.update({key: _parsed(key, fields) for key, fields in choices.items()})


def forget() -> None:
    """Drop all choices."""
    _choices.clear()


def tune_pass(
    layer: Layer, blocks: int, pooled: bool = False, packed: bool = False, transforms: bool = False
) -> Choice:
    """Measure a few ways to cut up a pass and remember the fastest, in memory and on disk.

    If its result will be pooled, only ways that can do so at once are measured, if there are any: what they save is
    more than what tiles differ by. Where weights will be packed beforehand, none may gain by reading the values; where
    they may be transformed, Winograd's transform is one of the ways.
    """
    key = fingerprint(layer, blocks, pooled, transforms)
    stored = _read(key)
    _choices[key] = stored if stored is not None else _fastest(layer, blocks, pooled, packed, transforms)
    if stored is None:
        _write(key, _choices[key])
    return _choices[key]


def fingerprint(layer: Layer, blocks: int, pooled: bool = False, transforms: bool = False) -> str:
    """Return a name for passes that are cut up alike: geometry, patterns, how much they keep, what may be done."""
    facts = (
        layer.filters, layer.channels, len(layer.kernels.filters), layer.patterns, layer.kernel_size, layer.in_size,
        layer.out_size, layer.stride, layer.spread, layer.padding, blocks, instruction_set(),
        *(["pooled"] if pooled else []), *(["transforms"] if transforms else []),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _fastest(layer: Layer, blocks: int, pooled: bool, packed: bool, transforms: bool) -> Choice:
    """Run all candidates in turn, several times, and return the one with the best median."""
    x = torch.ones(blocks, layer.channels, *layer.in_size, 8)
    y = torch.empty(blocks, layer.filters, *layer.out_size, 8)
    values = torch.ones(len(layer.kernels.filters) * layer.entries)
    choices, threads = candidates(layer, blocks, pooled, transforms), torch.get_num_threads()
    passes = [(choice, prepare(layer, blocks, choice, packed=packed)) for choice in choices]
    if pooled:
        passes = [(choice, prepared) for choice, prepared in passes if can_pool(prepared)] or passes
    weights = [gather(prepared, values) if packed else values for _, prepared in passes]
    convolve = function("convolve_packed" if packed else "convolve")
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(ROUNDS + 1):  # the first round warms up
        for (_, prepared), w, times in zip(passes, weights, seconds, strict=True):
            start = time.perf_counter()
            convolve(prepared.address, x.data_ptr(), w.data_ptr(), y.data_ptr(), threads)
            times.append(time.perf_counter() - start)
    medians = [sorted(times[1:])[ROUNDS // 2] for times in seconds]
    return passes[medians.index(min(medians))][0]


def _parsed(key: str, fields: Mapping[str, Any]) -> Choice:
    try:
        b, r, c = (int(size) for size in fields["tile"])
        numbers = (int(fields[name]) for name in ("band", "channel_block", "group"))
        choice = Choice(_OLD_NAMES.get(fields["sweep"], fields["sweep"]), (b, r, c), *numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"choice {key}={fields!r}: expected sweep, tile, band, channel_block and group"
        ) from error
    if (
        not (codegen.is_sweep(choice.sweep) or choice.sweep in ("taps", "winograd"))
        or min(b, r, c, choice.band, choice.group, choice.channel_block) < 1
        or choice.channel_block > MOST_CHANNELS
        or (codegen.goes_by_channel(choice.sweep) and b * choice.band > 1)
        or (codegen.is_sweep(choice.sweep) and c % codegen.REGISTERS[choice.sweep].pixels)
        or (choice.sweep == "filter_blocks" and b != 2)
    ):
        raise InvalidArgument(f"choice {key}={fields!r}: a value is out of range")
    return choice


def _file(key: str) -> str:
    facts = (processor(), torch.get_num_threads(), sources.digest(), VERSION)
    machine = hashlib.sha256(repr(facts).encode())
    return f"choice-{key}-{machine.hexdigest()[:16]}.json"


def _read(key: str) -> Choice | None:
    try:
        return _parsed(key, json.loads((build.cache_directory() / _file(key)).read_text()))
    except (BackendUnavailable, OSError, ValueError):
        return None


def _write(key: str, choice: Choice) -> None:
    try:
        write_atomic(build.cache_directory() / _file(key), json.dumps(asdict(choice)))
    except (BackendUnavailable, OSError):
        return  # measured again next time
