"""The training loop: yields a record for every step and every epoch, and does no input or output itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from clicktrain import distributed, kernels
from clicktrain.data import Loader, Split
from clicktrain.errors import DivergedError, InvalidArgument
from clicktrain.flops import layer_costs
from clicktrain.training.evaluate import accuracy
from clicktrain.training.layout import use_channels_last
from clicktrain.training.meter import CostMeter
from clicktrain.training.optim import build_optimizer, optimizer_state, restore_optimizer, set_lr
from clicktrain.training.seeding import restore_torch_state, seed_torch, torch_state
from clicktrain.training.session import Session
from clicktrain.training.step import Stepper
from clicktrain.training.timeline import Timeline

Record = dict[str, Any]


@dataclass
class Position:
    """Where training stands, and sums over the steps of the current epoch."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    phase: int = 0
    images: int = 0
    loss_sum: float = 0.0
    train_seconds: float = 0.0
    select_seconds: float = 0.0


class Trainer:
    """Trains the network of a session with its method.

    Between any two records the whole state can be taken with `state_dict`; a trainer made `from_state` of it
    and a fresh session yields the remaining records with equal numbers, times apart.

    Parameters
    ----------
    session : Session
        Freshly built; its network is trained in place.
    channels_last : bool
        Memory format of the network.
    phase : int
        Phase whose optimizer is built.

    Attributes
    ----------
    position : Position
        Where training stands.
    total_steps : int
        Steps of all phases together.
    layers : list of LayerCost
        Of the dense network.
    meter : CostMeter
        FLOPs spent so far.
    """

    def __init__(self, session: Session, *, channels_last: bool = False, phase: int = 0) -> None:
        self.session, self.method = session, session.method
        self.channels_last = channels_last
        self.timeline = Timeline(session.method.phases, session.config.train)
        self.position = Position(phase=phase)
        self._loaders = [session.train_loader(entry) for entry in self.timeline.phases]
        lengths = zip(self.timeline.phases, self._loaders, strict=True)
        self.total_steps = sum(entry.epochs * len(loader) for entry, loader in lengths)
        self.layers = layer_costs(session.model, session.data.image_shape)
        self.meter = CostMeter(self.layers)
        self._stepper = Stepper(session, self.meter)
        self.method.seed, self.method.lr_at = session.seed, self.timeline.lr
        sizes = _sizes(self._loaders)
        if sizes[0] < distributed.processes():
            raise InvalidArgument(
                f"a batch of {sizes[0]} images cannot be shared out to {distributed.processes()} processes"
            )
        self.method.batch_sizes = sorted({len(range(size)[distributed.share(size)]) for size in sizes})
        self.method.eval_batch_sizes = _sizes(session.eval_loader(split) for split in session.eval_splits)
        model = use_channels_last(session.model) if channels_last else session.model
        optimizer = build_optimizer(model, session.config.train, self.timeline.phases[phase])
        self.method.setup(model, optimizer, session.example_input())

    @classmethod
    def from_state(cls, session: Session, state: dict[str, Any]) -> Trainer:
        """Go on from a `state_dict`: structure first (the method's), then weights, then the optimizer.

        What the run chose among ways to compute that differ in the last bits holds from now on, for this process.
        """
        kernels.use_choices(state.get("kernels", {}))
        trainer = cls(session, channels_last=state["channels_last"], phase=state["position"]["phase"])
        trainer.method.load_state_dict(state["method"])
        trainer._restore(state)
        return trainer

    @classmethod
    def from_dense_state(cls, session: Session, state: dict[str, Any]) -> Trainer:
        """Begin after the epochs that another run trained dense: all but the method is taken from its `state_dict`.

        Raises
        ------
        InvalidArgument
            The method changes the network when it is set up, so that no dense state fits it.
        """
        phase = Timeline(session.method.phases, session.config.train).index(state["position"]["epoch"] - 1)
        trainer = cls(session, channels_last=state["channels_last"], phase=phase)
        method, meter = trainer.method, state["meter"]
        if method.model.state_dict().keys() != state["model"].keys():
            raise InvalidArgument(
                f"dense_epochs={method.dense_epochs} of method {method.name}: its setup changes the network, expected 0"
            )
        by_stage = {method.stage: sum(meter["by_stage"].values())}  # the other may call its dense stage otherwise
        own = {"position": {**state["position"], "phase": phase}, "meter": {**meter, "by_stage": by_stage}}
        trainer._restore({**state, **own})
        return trainer

    def _restore(self, state: dict[str, Any]) -> None:
        """Take all of a `state_dict` but the method's part and the memory format."""
        method = self.method
        method.model.load_state_dict(state["model"])
        restore_optimizer(method.optimizer, method.model, state["optimizer"])
        self.position = Position(**state["position"])
        self.meter.load_state_dict(state["meter"])
        self._stepper.scaler.load_state_dict(state["scaler"])
        restore_torch_state(state["rng"])

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides the remaining records: tensors and plain Python values, not copied."""
        return {
            "channels_last": self.channels_last,
            "position": asdict(self.position),
            "method": self.method.state_dict(),
            "model": self.method.model.state_dict(),
            "optimizer": optimizer_state(self.method.optimizer, self.method.model),
            "meter": self.meter.state_dict(),
            "scaler": self._stepper.scaler.state_dict(),
            "rng": torch_state(),
            "kernels": kernels.choices(),
        }

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch == self.timeline.epochs

    def records(self) -> Iterator[Record]:
        """Train from the current position to the end.

        Yields
        ------
        dict
            ``kind`` "step" after each step and "epoch" after each epoch, as ``metrics.jsonl`` holds them.

        Raises
        ------
        DivergedError
            The loss is NaN or infinite.
        """
        while not self.is_done:
            if self.position.batch == 0:
                self._begin_epoch()
            yield from self._steps()
            yield self._finish_epoch()

    def check_finite(self) -> None:
        """Raise DivergedError if a weight or statistic of the network is NaN or infinite."""
        for name, tensor in self.method.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"{name} is no longer finite after step {self.position.step - 1}")

    def evaluate(self, split: Split | None, network: nn.Module | None = None) -> float | None:
        """Return the accuracy in percent on a split, of the network as it is or of another; None without a split."""
        if split is None:
            return None
        batches = self.session.eval_batches(split)
        return accuracy(network or self.method.model, batches, self.session.config.train.amp)

    def _loader(self) -> Loader:
        """Return the batches of the current epoch."""
        loader = self._loaders[self.position.phase]
        loader.set_epoch(self.position.epoch)
        return loader

    def _begin_epoch(self) -> None:
        """Enter a phase that begins here, with an optimizer of its own, and let the method begin the epoch."""
        position, method = self.position, self.method
        start = time.perf_counter()
        seed_torch("epoch", self.session.seed, position.epoch)
        phase = self.timeline.index(position.epoch)
        if phase != position.phase:
            position.phase = phase
            train = self.session.config.train
            method.begin_phase(phase, build_optimizer(method.model, train, self.timeline.phases[phase]))
        method.on_epoch(position.epoch, self._loader())
        self.meter.add_extra(method)
        position.images, position.loss_sum, position.train_seconds = 0, 0.0, 0.0
        position.select_seconds = time.perf_counter() - start

    def _steps(self) -> Iterator[Record]:
        position, method = self.position, self.method
        loader = self._loader()
        method.model.train()
        start = time.perf_counter()
        for x, y in loader.batches(position.batch):
            stage = method.stage
            lr = self.timeline.lr(position.epoch + position.batch / len(loader))
            set_lr(method.optimizer, lr)
            images = loader.images(position.batch)
            loss, penalty = self._stepper.step(x, y, position.epoch, position.batch, images)
            if not math.isfinite(loss + penalty):
                raise DivergedError(
                    f"the loss is {loss + penalty} in step {position.step} (epoch {position.epoch}, lr {lr:g})"
                )
            seconds = time.perf_counter() - start
            step = {"kind": "step", "epoch": position.epoch, "step": position.step, "stage": stage}
            position.batch += 1
            position.step += 1
            position.images += images
            position.loss_sum += loss * images
            position.train_seconds += seconds
            yield {**step, "loss": loss, "penalty": penalty, "lr": lr, "seconds": seconds}
            start = time.perf_counter()

    def _finish_epoch(self) -> Record:
        position, method, session = self.position, self.method, self.session
        self.meter.add_extra(method)
        distributed.check_equal("the weights", distributed.content(method.model.parameters()))
        start = time.perf_counter()
        position.epoch, position.batch = position.epoch + 1, 0
        due = position.epoch % session.config.train.eval_every == 0 or self.is_done
        return {
            "kind": "epoch",
            "epoch": position.epoch - 1,
            "stage": method.stage,
            "phase": self.timeline.phases[position.phase].name,
            "lr": method.optimizer.param_groups[0]["lr"],
            "train_loss": position.loss_sum / position.images,
            "val_accuracy": distributed.from_first(lambda: self.evaluate(session.validation)) if due else None,
            "test_accuracy": distributed.from_first(lambda: self.evaluate(session.test)) if due else None,
            "train_seconds": position.train_seconds,
            "select_seconds": position.select_seconds,
            "eval_seconds": time.perf_counter() - start,
            "flops": self.meter.cost.flops,
            "flops_dense": self.meter.cost.dense_flops,
            "density": self.meter.density(method.densities()),
            **method.log(),
        }


def _sizes(loaders: Iterable[Loader]) -> list[int]:
    """Return the sizes of batches that loaders give."""
    sizes: set[int] = set()
    for loader in loaders:
        images = len(loader.split)
        sizes |= {min(images, loader.batch_size), images % loader.batch_size} - {0}
    return sorted(sizes)
