"""When a kernel is slower: a sequential test of each item against the machine's own noise.

A session gives, for each item, the median over rounds of log(head / base), with base the geometric mean of its two
processes, and the same of base against its twin, which is noise and nothing else. Two hypotheses compete: head is as
fast as base, or it takes `SLOWDOWN` times as long. Wald's test adds up the logarithm of their likelihood ratio,
session by session, until it is sure of one of them. What a session may say is bounded (`FOR`, `AGAINST`), so that no
single one, disturbed by something else, decides: it takes at least four to call a kernel slower, and two to clear it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.gate.items import Item
from bench.gate.measuring import Rounds

SLOWDOWN = 1.10
"""The slow-down that is looked for; half of it (on the scale of logarithms) is as likely either way."""
FALSE_ALARM, MISS = 0.0005, 0.01
"""Of one item, at most; some twenty items make one in a hundred for a gate."""
FOR, AGAINST = 2.0, 3.0
"""The most evidence in one session for a slow-down, and against it."""
SMALLEST_NOISE = 0.01
POOL_WEIGHT, OUTLIER = 4, 3.0
"""Sessions that the noise of all items together counts for in the noise of one, and how many times that noise a session
of one may add: more was a disturbance, against which those bounds stand."""

State = Literal["slower", "not slower", "open"]


@dataclass(frozen=True)
class Verdict:
    """What is known about an item.

    Attributes
    ----------
    state : {"slower", "not slower", "open"}
        "open": not sure yet.
    ratio : float
        Time of head over time of base, median over sessions.
    noise : float
        Standard deviation that a session's ratio has on this machine.
    confidence : float
        Of the state; for "open", that it is slower.
    sessions : int
        How often it was measured.
    """

    state: State
    ratio: float
    noise: float
    confidence: float
    sessions: int


def judge(measured: Mapping[str, Sequence[Rounds]]) -> dict[str, Verdict]:
    """Return what sessions say about each item, by name."""
    shifts = {name: [_shift(rounds) for rounds in sessions] for name, sessions in measured.items()}
    return _judge(shifts)


def _judge(shifts: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Verdict]:
    noises = [noise for sessions in shifts.values() for _, noise in sessions]
    # The median tells the ordinary noise, which a few disturbed items must not raise for all.
    pooled = 1.4826 * float(np.median(np.abs(noises))) if noises else SMALLEST_NOISE
    return {name: _verdict(sessions, pooled) for name, sessions in shifts.items()}


def decide(
    items: Sequence[Item],
    measure: Callable[[Sequence[Item]], Mapping[str, Rounds]],
    seconds: float,
    on_session: Callable[[Mapping[str, Verdict]], None] = lambda verdicts: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Verdict], dict[str, list[Rounds]]]:
    """Measure sessions until every item is decided or the time is up.

    Parameters
    ----------
    items : sequence of Item
        What to decide on.
    measure : callable
        Items -> their rounds in one session.
    seconds : float
        No session starts that would probably end later.
    on_session : callable
        Told the verdicts after each session.
    clock : callable
        Seconds.

    Returns
    -------
    verdicts : dict
        By name of the item.
    measured : dict
        Rounds of each session, by name of the item.
    """
    measured: dict[str, list[Rounds]] = {item.name: [] for item in items}
    shifts: dict[str, list[tuple[float, float]]] = {item.name: [] for item in items}
    verdicts: dict[str, Verdict] = {}
    start, last, still_open = clock(), 0.0, list(items)
    while still_open and (not verdicts or clock() - start + last < seconds):
        began = clock()
        for name, rounds in measure(still_open).items():
            measured[name].append(rounds)
            shifts[name].append(_shift(rounds))
        verdicts = _judge(shifts)
        on_session(verdicts)
        before, still_open = len(still_open), [item for item in items if verdicts[item.name].state == "open"]
        last = (clock() - began) * max(0.3, len(still_open) / before)  # starting the processes takes its time, too
    return verdicts, measured


def _shift(rounds: Rounds) -> tuple[float, float]:
    """Return log(head / base) and log(twin / base) of a session."""
    base, head, twin = (np.log(rounds[side]) for side in ("base", "head", "twin"))
    return float(np.median(head - (base + twin) / 2)), float(np.median(twin - base))


def _verdict(sessions: Sequence[tuple[float, float]], pooled: float) -> Verdict:
    shifts = np.array([shift for shift, _ in sessions])
    own = sum(min(abs(noise), OUTLIER * pooled) ** 2 for _, noise in sessions)
    # The mean of base and twin varies less than either: 3/4 of the variance between the two.
    variance = 0.75 * (POOL_WEIGHT * pooled**2 + own) / (POOL_WEIGHT + len(sessions))
    noise = max(math.sqrt(variance), SMALLEST_NOISE)
    slow = math.log(SLOWDOWN)
    evidence = float(np.clip(slow * (shifts - slow / 2) / noise**2, -AGAINST, FOR).sum())
    probability = 1 / (1 + math.exp(-evidence))
    state: State = "open"
    if evidence >= math.log((1 - MISS) / FALSE_ALARM):
        state = "slower"
    elif evidence <= math.log(MISS / (1 - FALSE_ALARM)):
        state, probability = "not slower", 1 - probability
    return Verdict(state, float(np.exp(np.median(shifts))), noise, probability, len(sessions))
