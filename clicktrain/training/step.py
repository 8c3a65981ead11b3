"""One optimiser step: mixup, forward, loss, backward, clipping, update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from clicktrain import distributed
from clicktrain.mixup import mixup
from clicktrain.training.evaluate import autocast
from clicktrain.training.meter import CostMeter
from clicktrain.training.replica import Replica, own_randomness
from clicktrain.training.seeding import seed_torch
from clicktrain.training.session import Session


class Stepper:
    """Takes steps with the numerics that the configuration asks for.

    Parameters
    ----------
    session : Session
        Of which the method has been set up.
    meter : CostMeter
        Charged for each step.
    """

    def __init__(self, session: Session, meter: CostMeter) -> None:
        self._session = session
        self._train = session.config.train
        self._meter = meter
        self._network = Replica(session.method, autocast=self._train.amp != "none")
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=self._train.amp == "fp16")

    def step(self, x: Tensor, y: Tensor, epoch: int, batch: int, images: int) -> tuple[float, float]:
        """Take one step of the method's network.

        Parameters
        ----------
        x : Tensor, float32 (N, C, H, W)
            Images, of those of the step that are this process's share.
        y : Tensor, int64 (N,)
            Class indices.
        epoch, batch : int
            Where training stands: decides mixup and dropout, together with the seed.
        images : int
            Images of the step in all processes.

        Returns
        -------
        loss, penalty : float
            Cross-entropy (with label smoothing and mixup), mean over the images of all processes, and what the
            method adds to it.
        """
        method, train = self._session.method, self._train
        seed_torch("step", self._session.seed, epoch, batch)
        if train.mixup:
            x, y = mixup(x, y, self._session.data.num_classes, train.mixup, (self._session.seed, epoch, batch))
        x, y = method.prepare_batch(x, y)
        method.before_forward()
        with autocast(self._session.device, train.amp), own_randomness(self._session.seed, epoch, batch):
            logits = self._network(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=train.label_smoothing)
        penalty = method.penalty()
        share = distributed.processes() * len(x) / images  # makes the mean over processes that over images
        torch.autograd.backward(self.scaler.scale((loss if share == 1 else loss * share) + penalty))
        self.scaler.unscale_(method.optimizer)
        method.after_backward()
        if train.clip_norm:
            clip_grad_norm_(method.model.parameters(), train.clip_norm)
        self._meter.add_step(method.stage, method.densities(), images)
        self.scaler.step(method.optimizer)
        self.scaler.update()
        method.optimizer.zero_grad()
        method.after_step()
        # the step's only wait for the device
        loss_value, penalty_value = torch.stack([*distributed.averaged([loss.detach()], len(x)), penalty]).tolist()
        return loss_value, penalty_value
