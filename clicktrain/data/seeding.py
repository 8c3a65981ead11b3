"""Random generators that are functions of a key, not of what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def derived_generator(purpose: str, *key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on its purpose and key only.

    Parameters
    ----------
    purpose : str
        What the numbers are for, such as ``"order"``; other purposes get unrelated streams.
    *key : int
        Seed, epoch, batch index...

    Returns
    -------
    torch.Generator
        Fresh, so that two calls with equal arguments give equal streams. Torch's global generator is
        neither read nor advanced.
    """
    text = "/".join([purpose, *map(str, key)])
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)
