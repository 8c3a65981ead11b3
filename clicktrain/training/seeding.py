"""Torch's global random state: seeded anew for every step, so that it never depends on what ran before."""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.data.seeding import derived_generator


def seed_torch(purpose: str, *key: int) -> None:
    """Seed torch's global generators (initialisation, dropout) on all devices.

    Two methods that draw different amounts of random numbers between steps still drop the same units.

    Parameters
    ----------
    purpose : str
        What the numbers are for.
    *key : int
        Seed of the run, and where it stands: epoch, batch.
    """
    seed = derived_generator(purpose, *key).initial_seed()
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else torch would queue the seed, and a stack trace with it, for ever
        torch.cuda.manual_seed_all(seed)


def torch_state() -> dict[str, list[Tensor]]:
    """Return the states of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": [torch.get_rng_state()], "cuda": cuda}


def restore_torch_state(state: dict[str, list[Tensor]]) -> None:
    """Set torch's global generators to what `torch_state` returned."""
    torch.set_rng_state(state["cpu"][0].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
