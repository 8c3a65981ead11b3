"""The later phases of methods that prune after training."""

from __future__ import annotations

from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase
from clicktrain.schedule import LRSchedule


def finetune_phase(epochs: int, finetune_epochs: int | None, lr: float, name: str = "finetune") -> Phase:
    """Return fine-tuning at a constant rate.

    The default length is that of the code of Liu et al. (ICLR 2019): 40 epochs after 160 of training.

    Parameters
    ----------
    epochs : int
        Length of the dense training.
    finetune_epochs : int or None
        Length of the fine-tuning; None: a quarter of `epochs`, at least 1.
    lr : float
        Learning rate.
    name : str
        Of the phase.

    Raises
    ------
    InvalidArgument
        If a length or the rate is not above 0.
    """
    length = max(1, round(epochs / 4)) if finetune_epochs is None else finetune_epochs
    if length < 1:
        raise InvalidArgument(f"{name}_epochs={finetune_epochs}: expected at least 1")
    if not lr > 0:
        raise InvalidArgument(f"{name}_lr={lr}: expected a rate above 0")
    return Phase(name, length, lr=lr, schedule=LRSchedule("constant"))
