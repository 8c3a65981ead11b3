"""The cubic sparsity schedule of gradual pruning."""

from __future__ import annotations

from clicktrain.errors import InvalidArgument


class CubicRamp:
    """The number of kept weights along a run: falls with the cube of what is left of the ramp (Zhu & Gupta, 2017).

    Parameters
    ----------
    begin, end : float
        Where the ramp begins and ends, as fractions of the run.
    every : int or None
        Steps between two changes; None: a hundredth of the run.

    Raises
    ------
    InvalidArgument
        Unless 0 <= begin < end <= 1 and every >= 1.
    """

    def __init__(self, begin: float, end: float, every: int | None) -> None:
        if not 0 <= begin < end <= 1:
            raise InvalidArgument(f"begin={begin}, end={end}: expected 0 <= begin < end <= 1, fractions of the run")
        if every is not None and every < 1:
            raise InvalidArgument(f"every={every}: expected at least 1 step")
        self.begin, self.end, self.every = begin, end, every

    def is_due(self, step: int, steps: int) -> bool:
        """Tell whether the masks change before this step: in regular intervals, and once as the ramp ends."""
        first, last = self._bounds(steps)
        every = self.every or max(1, steps // 100)
        return first <= step <= last and ((step - first) % every == 0 or step == last)

    def is_over(self, step: int, steps: int) -> bool:
        """Tell whether a step comes after the ramp."""
        return step > self._bounds(steps)[1]

    def kept(self, step: int, steps: int, weights: int, budget: int) -> int:
        """Return the weights that are kept at a step: all of them at first, `budget` from the end of the ramp on."""
        first, last = self._bounds(steps)
        if step >= last:
            return budget
        left = 1 - max(0, step - first) / (last - first)
        return budget + round((weights - budget) * left**3)

    def _bounds(self, steps: int) -> tuple[int, int]:
        last = min(steps - 1, int(self.end * steps))
        return min(int(self.begin * steps), last), last
