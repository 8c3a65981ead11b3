"""The gate's result for people: a table in Markdown, and one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bench.gate.decision import SLOWDOWN, Verdict
from bench.gate.items import Item

_ORDER = {"slower": 0, "open": 1, "not slower": 2}
_WORDS = {"slower": "**slower**", "open": "**not sure**", "not slower": "not slower"}


def table(
    chosen: Sequence[Item], verdicts: Mapping[str, Verdict], missing: Mapping[str, str], base: str, head: str
) -> str:
    """Return the table of what was measured, the slower first, and below it what was not, and why."""
    lines = [f"Time of {head[:12]} over time of {base[:12]}, one thread on one core:"]
    rows = sorted(
        (item for item in chosen if item.name in verdicts), key=lambda item: _ORDER[verdicts[item.name].state]
    )
    if rows:
        lines += [
            "",
            "| kernel | layer | ratio | noise | sessions | verdict | confidence |",
            "|---|---|--:|--:|--:|---|--:|",
        ]
    for item in rows:
        v = verdicts[item.name]
        lines.append(
            f"| {item.kernel} | {item.layer} | {v.ratio:.3f} | {v.noise:.1%} | {v.sessions} | {_WORDS[v.state]} | "
            f"{v.confidence:.2%} |"
        )
    lines += [f"Not in the base commit: {reason}" for reason in missing.values()]
    skipped = Counter(item.kernel for item in chosen if item.name not in verdicts and item.name not in missing)
    if skipped:
        listed = ", ".join(f"{kernel} ({count})" for kernel, count in skipped.items())
        lines += ["", f"Not measured, as nothing that they use has changed (layers): {listed}."]
    return "\n".join(lines)


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """Return one line: what is slower."""
    slower = [f"{name} ({v.ratio:.2f} x)" for name, v in verdicts.items() if v.state == "slower"]
    unsure = [f"{name} ({v.ratio:.2f} x)" for name, v in verdicts.items() if v.state == "open"]
    if not verdicts:
        return "Nothing was measured: no change can have made a kernel slower."
    said = []
    if slower:
        said.append(f"Slower: {', '.join(slower)}. To accept that, name this commit in bench/gate-base and say why.")
    if unsure:
        said.append(f"Could not be told in the time given, for the noise of this machine: {', '.join(unsure)}.")
    return " ".join(said) or f"None of {len(verdicts)} items is slower (by {SLOWDOWN - 1:.0%} or more)."
