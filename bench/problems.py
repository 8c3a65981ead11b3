"""Workloads as the problems that operators compute."""

from __future__ import annotations

from baselines.operators import Function, Problem
from bench.suite.workloads import Workload


def problem(workload: Workload, function: Function = "forward") -> Problem:
    """Return a workload's operands, the weight masked."""
    mask = workload.assignment().mask()
    x, dy, weight = workload.operands()
    return Problem(function, x, dy, weight * mask, mask, workload.shape.stride, workload.shape.padding)
