"""Accuracy on a split."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager[None]:
    """Return the autocast context of a run: ``none``, ``bf16`` or ``fp16``."""
    return torch.autocast(device.type, dtype=_AMP_TYPES.get(amp, torch.float32), enabled=amp != "none")


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: str = "none") -> float:
    """Return the top-1 accuracy in percent; the model is left in the mode it was in.

    Parameters
    ----------
    model : nn.Module
        Maps (N, C, H, W) to logits (N, K).
    batches : iterable of (x, y)
        Images and class indices (N,), on the model's device.
    amp : str
        Autocast type.
    """
    training = model.training
    model.eval()
    correct, count = 0, 0
    with torch.no_grad():
        for x, y in batches:
            with autocast(x.device, amp):
                logits = model(x)
            correct += int((logits.argmax(dim=1) == y).sum())
            count += len(y)
    model.train(training)
    return 100.0 * correct / count
