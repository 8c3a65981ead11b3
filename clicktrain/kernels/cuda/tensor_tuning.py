"""How passes on tensor cores are cut up: as estimated, or the fastest of a few that were measured; see `tuning`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import get_args
from weakref import WeakKeyDictionary

from clicktrain.kernels.cuda import tensor_text as text
from clicktrain.kernels.cuda import tensor_tiling as tiling
from clicktrain.kernels.cuda import tuning
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.tensor_estimate import estimate
from clicktrain.kernels.cuda.tensor_text import Function, TensorSpec
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.cuda.tuning import TensorChoice
from clicktrain.kernels.plan import Plan

FUNCTIONS: tuple[Function, ...] = get_args(Function)
CANDIDATES, MOST_ALIKE, MOST_OF_A_WAY = 9, 3, 3
"""Of a pass that are measured; of these with like rectangles of as many groups of images, and with as many buffers
for all channels or for chunks, if there are others: what hides the wait for memory is the hardest to estimate."""
HOPELESS = 2.0
"""So many times the smallest estimate are not measured for variety's sake."""


def choose(function: Function, plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool) -> TensorSpec:
    """Return how to cut up a pass: as tuned, imported or chosen before, else as estimated."""
    context = plan, dtype, limits, batch_last
    key = _fingerprint(function, *context)
    if tuning.knows(key):  # mostly one of a few that are known already: all others take a while to write down
        choice = tuning.remembered(key, choice_of(likely(function, *context)[0]))
        for spec in likely(function, *context):
            if choice_of(spec) == choice:
                return spec
    spec = _estimated(function)(*context)
    choice = tuning.remembered(key, choice_of(spec))
    if choice == choice_of(spec):
        return spec
    found = (s for s in _candidates(function)(*context) if choice_of(s) == choice)
    return tiling.for_one_size(next(found, spec), plan)


Context = tuple[Function, Dtype, Limits, bool]
_likely: WeakKeyDictionary[Plan, dict[Context, list[TensorSpec]]] = WeakKeyDictionary()


def likely(function: Function, plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool) -> list[TensorSpec]:
    """Return the ways that are worth measuring, the estimate first, no two of them alike."""
    known, context = _likely.setdefault(plan, {}), (function, dtype, limits, batch_last)
    if context not in known:
        known[context] = _different(function, plan, dtype, limits, batch_last)
    return known[context]


def _different(function: Function, plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool) -> list[TensorSpec]:
    def cost(spec: TensorSpec) -> float:
        return estimate(spec, plan, limits)

    ordered = sorted(_candidates(function)(plan, dtype, limits, batch_last), key=cost)
    hopeful = [spec for spec in ordered if cost(spec) <= HOPELESS * cost(ordered[0])]
    found = _varied(hopeful, plan, MOST_OF_A_WAY)
    found += [spec for spec in _varied(ordered, plan, CANDIDATES) if spec not in found]
    return [tiling.for_one_size(spec, plan) for spec in sorted(found[:CANDIDATES], key=cost)]


def _varied(ordered: list[TensorSpec], plan: Plan, most_of_a_way: int) -> list[TensorSpec]:
    """Return those of some specifications that are not too much like better ones."""
    found: list[TensorSpec] = []
    seen: Counter[object] = Counter()
    for spec in ordered:
        places = (tuple(sorted(spec.rect)), spec.input.groups)
        warps = (*places, spec.warps, spec.blocks, spec.parts)
        way = min(spec.buffers, 3), spec.input.channels == plan.input_shape[1]
        if seen[places] < MOST_ALIKE and seen[way] < most_of_a_way and not seen[warps, way]:
            found.append(spec)
            seen.update((places, way, (warps, way)))
    return found


def tune(
    function: Function,
    plan: Plan,
    dtype: Dtype,
    limits: Limits,
    batch_last: bool,
    run: Callable[[TensorSpec], Callable[[], object]],
) -> None:
    """Choose the fastest way to cut up a pass: as found on disk, or else measured and written there."""
    tuning.measure(
        _fingerprint(function, plan, dtype, limits, batch_last),
        lambda: likely(function, plan, dtype, limits, batch_last), choice_of, run,
    )  # fmt: skip


def settled(function: Function, plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool) -> bool:
    """Return whether the measured choice is on disk; if so, it holds from now on."""
    return tuning.settled(_fingerprint(function, plan, dtype, limits, batch_last))


def choice_of(spec: TensorSpec) -> TensorChoice:
    """Return the choice that a specification was made from."""
    return TensorChoice(
        spec.rect, spec.input.groups, spec.warps, spec.blocks, spec.parts, spec.tiles, spec.input.channels,
        spec.channels, spec.columns, spec.buffers,
    )  # fmt: skip


def _estimated(function: Function) -> Callable[[Plan, Dtype, Limits, bool], TensorSpec]:
    makers = {"forward": tiling.forward_spec, "grad_input": tiling.input_spec, "grad_values": tiling.values_spec}
    return makers[function]


def _candidates(function: Function) -> Callable[[Plan, Dtype, Limits, bool], list[TensorSpec]]:
    makers = {
        "forward": tiling.forward_candidates, "grad_input": tiling.input_candidates,
        "grad_values": tiling.values_candidates,
    }  # fmt: skip
    return makers[function]


def _fingerprint(function: Function, plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool) -> str:
    """Return a name for all passes that are cut up alike."""
    facts = (
        function, plan.input_shape, plan.output_shape, plan.values_shape, len(plan.pool), plan.pool.kernel_size,
        plan.stride, plan.padding, dtype, limits, batch_last, text.sources(),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
