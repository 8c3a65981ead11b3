"""The protocol that every training method follows: one trainer, one evaluator and one cost model serve all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.assignment import Assignment
from clicktrain.flops import Densities
from clicktrain.kernels import Preparation
from clicktrain.preparation import prepare
from clicktrain.schedule import LRSchedule

if TYPE_CHECKING:
    from clicktrain.config import RunConfig


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """What `on_epoch` gets: the training loader, any sized iterable of (x, y) batches."""


@dataclass(frozen=True)
class Phase:
    """A part of a run that has its own optimizer and learning rate; None stands for the run's own setting.

    Attributes
    ----------
    name : str
        For logs and tables.
    epochs : int
        Length.
    lr, weight_decay, batch_size, optimizer, schedule
        Settings of the phase where they differ from the run's.
    """

    name: str
    epochs: int
    lr: float | None = None
    schedule: LRSchedule | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    optimizer: str | None = None


class Method:
    """A way to train: dense, ClickTrain, or a rival. Subclasses override what they need.

    The calls come in the order of this loop, which is all that a method asks of a trainer::

        method.setup(model, optimizer, example_input)
        for epoch in range(epochs):
            method.on_epoch(epoch, loader)
            for x, y in loader:
                x, y = method.prepare_batch(x, y)
                method.before_forward()
                loss = criterion(model(x), y) + method.penalty()
                loss.backward(); method.after_backward()
                optimizer.step(); optimizer.zero_grad(); method.after_step()
        model = method.finish()

    A method whose first epochs are plain dense training says how many in `dense_epochs`; its runs can then begin
    from those epochs of another run, see there for what it promises.

    Attributes
    ----------
    name : str
        Name in tables.
    seed : int
        Seed of the method's own draws; a trainer sets it before `setup`.
    lr_at : callable or None
        Learning rate at an epoch position (epoch + batch / batches); a trainer that schedules the rate sets
        it, so that a method can look ahead. None means that the optimizer's present rate will stay.
    recordable : bool
        Whether what the network computes in training depends on nothing but its parameters and buffers, so that a
        trainer may replay it as CUDA graphs (`clicktrain.record`) until these are other tensors. Not so where modules
        read anything else that changes from step to step.
    batch_sizes, eval_batch_sizes : sequence of int
        Sizes of the batches to come, in training and in evaluation, as far as they are known: for `prepare_kernels`. A
        trainer sets them before `setup`.
    """

    name: str = "method"
    seed: int = 0
    lr_at: Callable[[float], float] | None = None
    recordable: bool = False
    batch_sizes: Sequence[int] = ()
    eval_batch_sizes: Sequence[int] = ()
    model: nn.Module
    optimizer: Optimizer

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Build from a run's configuration: its `method.options`, and its epochs."""
        options = {"epochs": config.train.epochs, **config.method.options}
        return cls(**options)

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases of a run, in order; their epochs add up to the whole cost."""
        raise NotImplementedError(f"{type(self).__name__} declares no phases")

    @property
    def dense_epochs(self) -> int:
        """Leading epochs in which the method does exactly what dense training does; 0 promises nothing.

        A run may take these epochs over from a dense run of the same seed instead of training them. Then
        `setup` is followed by `on_epoch(k, ...)` with k up to this number (or by `begin_phase`, if a phase begins
        there), on a network and an optimizer that already did k epochs, with the method's own state as it was
        made. So in these epochs a method changes no batch, loss, gradient, weight or optimizer, spends no extra
        FLOPs, logs nothing, stays in the stage it begins with, and remembers nothing that it needs later; and
        its `setup` leaves the network as it is. Learning rates and other settings of its phases may differ from
        the dense run's: the trainer compares them, and shares only what is equal.
        """
        return 0

    @property
    def stage(self) -> str:
        """Name of what is being done now, for logs and times."""
        return self.phases[0].name

    @property
    def extra_flops(self) -> int:
        """FLOPs spent so far outside ordinary steps, such as on measuring importance."""
        return 0

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and its optimizer, both fresh.

        Parameters
        ----------
        model : nn.Module
            On its device.
        optimizer : Optimizer
            Over the model's parameters.
        example_input : Tensor, (N, C, H, W)
            Any input that the model accepts.
        """
        self.model, self.optimizer = model, optimizer
        self._image_shape = tuple(example_input.shape[1:])

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Take the optimizer of a later phase; called before its first epoch."""
        self.optimizer = optimizer

    def on_epoch(self, epoch: int, loader: Batches) -> None:
        """Begin an epoch (counted over all phases); may measure on batches of `loader`, and change the model."""

    def prepare_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch to train on; targets may become class probabilities (N, classes)."""
        return x, y

    def before_forward(self) -> None:
        """Act before the model runs."""

    def penalty(self) -> Tensor:
        """Return what is added to the loss, a scalar tensor."""
        return torch.zeros((), device=next(self.model.parameters()).device)

    def after_backward(self) -> None:
        """Act on gradients."""

    def after_step(self) -> None:
        """Act after the optimizer's step."""

    def finish(self) -> nn.Module:
        """Return the trained model."""
        return self.model

    def masks(self) -> dict[str, Tensor]:
        """Return by layer name what is kept, bool (C_out, C_in, k, k); empty before anything is chosen."""
        return {}

    def densities(self) -> Densities:
        """Return by layer name the density in [0, 1] of the forward, grad-input and grad-weight pass of a step.

        Layers left out run dense.
        """
        return {}

    def log(self) -> dict[str, float]:
        """Return figures worth a line in each epoch's log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all state beside model and optimizer, as tensors and plain Python values."""
        return {}

    def prepare_kernels(self, assignments: Mapping[str, Assignment], backend: str = "auto") -> Preparation:
        """Compile what the model will need once it is pruned so: in the background for a GPU, at once for the CPU.

        Training on the CPU has all cores, and each step waits for the slowest of its threads. A compiler that takes
        one core for a second therefore costs a second, and all compilers together, on all cores, cost less than that.

        Call it as soon as the assignments are known, and `wait` for what it returns where the model is converted.
        """
        training = [(images, *self._image_shape) for images in self.batch_sizes]
        evaluation = [(images, *self._image_shape) for images in self.eval_batch_sizes]
        background = next(self.model.parameters()).device.type != "cpu"
        return prepare(
            self.model, training, evaluation, assignments=assignments, backend=backend, background=background
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, called after `setup` on a fresh model and optimizer.

        Structural changes are made again here (layers converted, channels removed), so that the states of
        model and optimizer fit when they are loaded afterwards.
        """
