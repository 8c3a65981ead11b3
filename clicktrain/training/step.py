"""One optimiser step: mixup, forward, loss, backward, clipping, update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from clicktrain.mixup import mixup
from clicktrain.training.evaluate import autocast
from clicktrain.training.meter import CostMeter
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
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=self._train.amp == "fp16")

    def step(self, x: Tensor, y: Tensor, epoch: int, batch: int) -> tuple[float, float]:
        """Take one step of the method's network.

        Parameters
        ----------
        x : Tensor, float32 (N, C, H, W)
            Images.
        y : Tensor, int64 (N,)
            Class indices.
        epoch, batch : int
            Where training stands: decides mixup and dropout, together with the seed.

        Returns
        -------
        loss, penalty : float
            Cross-entropy (with label smoothing and mixup), and what the method adds to it.
        """
        method, train = self._session.method, self._train
        seed_torch("step", self._session.seed, epoch, batch)
        if train.mixup:
            x, y = mixup(x, y, self._session.data.num_classes, train.mixup, (self._session.seed, epoch, batch))
        x, y = method.prepare_batch(x, y)
        method.before_forward()
        with autocast(self._session.device, train.amp):
            logits = method.model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=train.label_smoothing)
        penalty = method.penalty()
        torch.autograd.backward(self.scaler.scale(loss + penalty))
        self.scaler.unscale_(method.optimizer)
        method.after_backward()
        if train.clip_norm:
            clip_grad_norm_(method.model.parameters(), train.clip_norm)
        self._meter.add_step(method.stage, method.densities(), len(x))
        self.scaler.step(method.optimizer)
        self.scaler.update()
        method.optimizer.zero_grad()
        method.after_step()
        loss_value, penalty_value = torch.stack([loss, penalty]).tolist()  # the step's only wait for the device
        return loss_value, penalty_value
