"""Runs a program, from any number of threads at once."""

from __future__ import annotations

import ctypes
import operator
import time
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.deploy.graph import Node
from clicktrain.deploy.memory import ARENA, INPUT, OUTPUT, Storage
from clicktrain.deploy.program import NativeStep, Program, TorchStep
from clicktrain.kernels.cpu.library import Step, run_steps


class Engine:
    """A program, ready to run.

    Parameters
    ----------
    program : Program
        Is kept, because the steps point into it.
    output_shape : tuple of int
        Of the result for a whole batch.
    """

    def __init__(self, program: Program, output_shape: tuple[int, ...]) -> None:
        self.program = program
        self._output_shape = output_shape
        self._parts: list[_Native | TorchStep] = []
        for _, group in groupby(program.steps, lambda step: isinstance(step, NativeStep)):
            steps = list(group)
            native = [step for step in steps if isinstance(step, NativeStep)]
            self._parts += [_Native(native)] if native else [step for step in steps if isinstance(step, TorchStep)]
        self._idle: list[_Workspace] = []  # append and pop are atomic

    def run(self, x: Tensor, seconds: list[float] | None = None) -> Tensor:
        """Return the result for a contiguous batch of exactly the program's size.

        Parameters
        ----------
        x : Tensor
            The batch.
        seconds : list of float, optional
            One entry for each step, to which its time is added.
        """
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = _Workspace(self.program)
        try:
            return self._run(x, workspace, seconds)
        finally:
            workspace.computed.clear()
            self._idle.append(workspace)

    def times_ms(self, x: Tensor, rounds: int) -> dict[int, float]:
        """Return the median milliseconds of every node, repacking before it included."""
        steps = self.program.steps
        self.run(x)
        runs = []
        for _ in range(rounds):
            runs.append([0.0] * len(steps))
            self.run(x, runs[-1])
        ms: dict[int, float] = {}
        for step, seconds in zip(steps, torch.tensor(runs).median(0).values.tolist(), strict=True):
            ms[step.number] = ms.get(step.number, 0.0) + 1e3 * seconds
        return ms

    def _run(self, x: Tensor, workspace: _Workspace, seconds: list[float] | None) -> Tensor:
        y = torch.empty(self._output_shape)
        workspace.buffers[INPUT], workspace.buffers[OUTPUT] = x.data_ptr(), y.data_ptr()
        timed = 0
        for part in self._parts:
            if isinstance(part, TorchStep):
                start = time.perf_counter()
                workspace.compute(part, x)
                if seconds is not None:
                    seconds[timed] += time.perf_counter() - start
                timed += 1
            else:
                part.run(workspace.buffers, seconds, timed)
                timed += part.count
        output = self.program.output
        return y if isinstance(output, Storage) else workspace.computed[output].contiguous()


class _Native:
    """Steps that follow one another without torch: one call of C."""

    def __init__(self, steps: list[NativeStep]) -> None:
        self.count = len(steps)
        self._steps = (Step * self.count)(*(step.as_c() for step in steps))

    def run(self, buffers: Any, seconds: list[float] | None, first: int) -> None:
        """Run them, and add to `seconds` from entry `first` on."""
        times = None if seconds is None else (ctypes.c_double * self.count)()
        run_steps()(ctypes.addressof(self._steps), self.count, buffers, times, torch.get_num_threads())
        if seconds is not None and times is not None:
            for i, taken in enumerate(times):
                seconds[first + i] += taken


class _Workspace:
    """The memory that one run at a time uses."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._arena = torch.empty(program.arena_floats)
        self.buffers = (ctypes.c_void_p * (OUTPUT + 1 + len(program.externals)))()
        self.buffers[ARENA] = self._arena.data_ptr()
        self.computed: dict[int, Any] = {}

    def compute(self, step: TorchStep, x: Tensor) -> None:
        """Let torch compute an operator."""
        result = apply(step.node, [self._operand(source, x) for source in step.sources])
        if step.number in self._program.externals:
            result = result.contiguous()
            self.buffers[self._program.externals[step.number]] = result.data_ptr()
        self.computed[step.number] = result

    def _operand(self, source: tuple[Storage, tuple[int, ...]] | int, x: Tensor) -> Any:
        if isinstance(source, int):
            return self.computed[source]
        storage, shape = source
        if storage.buffer == INPUT:
            return x.view(shape)
        if storage.buffer != ARENA:
            number = next(n for n, buffer in self._program.externals.items() if buffer == storage.buffer)
            return self.computed[number].view(shape)
        # A copy: the result may be a view, and the arena is used again.
        return self._arena[storage.offset : storage.offset + storage.floats].view(shape).clone()


def apply(node: Node, operands: list[Any]) -> Any:
    """Compute an operation with torch."""
    if node.op == "conv":
        return _dense_convolution(node, *operands)
    arguments = [_decoded(argument, node, operands) for argument in node.attributes["arguments"]]
    keywords = {key: _decoded(argument, node, operands) for key, argument in node.attributes["keywords"].items()}
    return resolve(node.attributes["target"])(*arguments, **keywords)


def _decoded(argument: Any, node: Node, operands: list[Any]) -> Any:
    if isinstance(argument, list):
        return [_decoded(entry, node, operands) for entry in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "input":
        return operands[value]
    return node.tensors[value] if kind == "tensor" else getattr(torch, value)


def _dense_convolution(node: Node, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.conv2d(x, node.tensors["weight"], node.tensors["bias"], node.attributes["stride"], node.attributes["padding"])
    if residual is not None:
        y += residual
    return y.relu_() if node.relu else y


def resolve(target: str) -> Any:
    """Return the operator of a name such as aten.relu.default."""
    if target == "getitem":
        return operator.getitem
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
