"""ADMM: training under constraints that projections express, the shared part of two methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.method import Batches, Method, Phase

Weights = Mapping[str, Tensor]
Projection = Callable[[Weights], dict[str, Tensor]]
"""From weights to the nearest ones that meet a constraint."""


def admm_phase(epochs: int, lr: float, optimizer: str | None) -> Phase:
    """Return the phase in which weights are drawn to the constraints.

    Raises
    ------
    InvalidArgument
        If the length or the rate is not above 0.
    """
    if epochs < 1:
        raise InvalidArgument(f"admm_epochs={epochs}: expected at least 1")
    if not lr > 0:
        raise InvalidArgument(f"admm_lr={lr}: expected a rate above 0")
    return Phase("admm", epochs, lr=lr, optimizer=optimizer)


class Admm:
    """Auxiliary variables Z and scaled duals U of one or more constraints on the same weights.

    The weights minimise loss + sum over constraints of rho/2 ||W - Z + U||^2; then Z becomes the projection of
    W + U, and U grows by W - Z.

    Parameters
    ----------
    rho : float
        Strength.
    weights : mapping of Tensor
        Layer name -> weight, as the ADMM phase begins.
    projections : sequence of callable
        One for each constraint.

    Raises
    ------
    InvalidArgument
        If rho is not above 0.
    """

    def __init__(self, rho: float, weights: Weights, projections: Sequence[Projection]) -> None:
        self.rho, self.projections = rho, list(projections)
        self.duals = [{name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in projections]
        detached = {name: weight.detach() for name, weight in weights.items()}
        self.targets = [project(detached) for project in self.projections]

    def penalty(self, weights: Weights) -> Tensor:
        """Return the sum over constraints of rho/2 ||W - Z + U||^2, differentiable in the weights."""
        total = next(iter(weights.values())).new_zeros(())
        for target, dual in zip(self.targets, self.duals, strict=True):
            for name, weight in weights.items():
                total = total + (weight - (target[name] - dual[name])).square().sum()
        return self.rho / 2 * total

    def update(self, weights: Weights) -> None:
        """Project, and update the duals."""
        detached = {name: weight.detach() for name, weight in weights.items()}
        for number, project in enumerate(self.projections):
            dual = self.duals[number]
            self.targets[number] = project({name: weight + dual[name] for name, weight in detached.items()})
            for name, weight in detached.items():
                dual[name] += weight - self.targets[number][name]

    def residual(self, weights: Weights) -> float:
        """Return the largest relative distance ||W - Z|| / ||W|| over the constraints."""
        whole = sum(float(weight.detach().square().sum()) for weight in weights.values())
        left = [
            sum(float((weight.detach() - target[name]).square().sum()) for name, weight in weights.items())
            for target in self.targets
        ]
        return (max(left) / whole) ** 0.5 if whole else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return Z and U."""
        return {"targets": self.targets, "duals": self.duals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set Z and U to those of `state_dict`."""
        for mine, saved in ((self.targets, state["targets"]), (self.duals, state["duals"])):
            for entries, values in zip(mine, saved, strict=True):
                for name, value in values.items():
                    entries[name] = value.to(entries[name].device).clone()


class AdmmStage(Method):
    """What methods with an ADMM phase after `epochs` of dense training do while it lasts; first of their bases."""

    recordable = True
    epochs: int
    weights: Any  # by layer name: a property of the other base
    _admm: Admm | None

    @property
    def stage(self) -> str:
        """Return "admm" while it lasts, else what the method says without it."""
        return "admm" if self._admm else super().stage

    def on_epoch(self, epoch: int, loader: Batches) -> None:
        """Project and update the duals after every epoch of ADMM."""
        super().on_epoch(epoch, loader)
        if self._admm and epoch > self.epochs:
            self._admm.update(self.weights)

    def penalty(self) -> Tensor:
        """Return the distance to the constraints while ADMM lasts, else zero."""
        return self._admm.penalty(self.weights) if self._admm else super().penalty()

    def log(self) -> dict[str, float]:
        """Return how far the weights are from the constraints, while ADMM lasts."""
        return {"admm_residual": self._admm.residual(self.weights)} if self._admm else {}


def check_rho(rho: float) -> float:
    """Return rho.

    Raises
    ------
    InvalidArgument
        If it is not above 0.
    """
    if not rho > 0:
        raise InvalidArgument(f"rho={rho}: expected a strength above 0")
    return rho


def length(published: int, of: int, epochs: int, chosen: int | None) -> int:
    """Return a phase's chosen length, or the published one (beside `of` epochs of training) scaled to the run."""
    return max(1, round(published * epochs / of)) if chosen is None else chosen
