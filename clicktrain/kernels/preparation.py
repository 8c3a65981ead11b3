"""Getting kernels ready before they are needed, in parallel and, where wanted, in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch

from clicktrain.errors import BackendUnavailable
from clicktrain.kernels import build
from clicktrain.kernels.backends import select
from clicktrain.kernels.plan import Plan

logger = logging.getLogger(__name__)

FUNCTIONS = ("forward", "grad_input", "grad_values")
"""What a plan can be asked for; see `clicktrain.kernels.backends.Kernels`."""

_MANY = 32  # threads; nearly all of them wait for a compiler


class Preparation:
    """Work that runs in threads; they do not keep the process alive.

    Parameters
    ----------
    work : callable
        What is to be done; its errors are logged and end nothing: what is not ready is made on first use.
    background : bool
        Give way to the rest of the machine.
    """

    def __init__(self, work: Callable[[], object], background: bool) -> None:
        self._work, self._background = work, background
        self._thread = threading.Thread(target=self._run, name="clicktrain-prepare", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether everything is ready."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when everything is ready."""
        self._thread.join()

    def _run(self) -> None:
        if self._background:
            build.be_nice()
        try:
            self._work()
        except Exception as error:
            logger.warning("kernels are not ready before their first use: %s", error)


def prepare(
    plans: Iterable[Plan] | Mapping[Plan, Collection[str]],
    *,
    backend: str = "auto",
    device: str = "cpu",
    background: bool = False,
) -> Preparation:
    """Compile and lay out what plans need, all of them at once instead of one after the other on first use.

    What is computed does not depend on it. Where compiling fails or is not possible, the generic kernels will serve,
    as without it, and a line in the log says so.

    Parameters
    ----------
    plans : iterable of Plan, or mapping
        From `clicktrain.kernels.plan`; `clicktrain.prepare` takes a model instead. A mapping says which of `FUNCTIONS`
        will be needed of each plan; otherwise all are.
    backend, device : str
        As in `pattern_conv2d`, and where it is going to compute.
    background : bool
        Return at once, and let the compilers give way to the rest of the machine.

    Returns
    -------
    Preparation
        To `wait` for; nothing is lost without.
    """
    wanted = dict(plans) if isinstance(plans, Mapping) else dict.fromkeys(plans, FUNCTIONS)
    made = Preparation(partial(_prepare, wanted, backend, device, background), background)
    if not background:
        made.wait()
    return made


def _prepare(wanted: Mapping[Plan, Collection[str]], backend: str, device: str, background: bool) -> None:
    try:
        kernels = select(backend, torch.empty(0, device=device))  # may itself have to compile
    except BackendUnavailable:
        return  # the first use says why
    preparations = getattr(kernels, "preparations", None)
    if preparations is None:
        return
    work: list[Callable[[], object]] = [call for plan, uses in wanted.items() for call in preparations(plan, uses)]
    work = work[::-1]  # `pop` takes the first

    # Layouts are made by numpy, not by torch: a second thread with a team of OpenMP threads makes those of the main
    # thread sleep between any two operations of a training step, and waking them costs more than a small operation.
    def worker() -> None:
        if background:
            build.be_nice()
        while work:
            try:
                call = work.pop()
            except IndexError:  # another thread took the last one
                return
            call()

    build.in_parallel([worker] * min(_MANY, len(work)))
