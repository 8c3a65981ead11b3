"""Arrays that stay on the device."""

from __future__ import annotations

import threading

import numpy as np
import torch

from clicktrain.kernels.cuda.arrays import on_device


def test_another_thread_allocates(monkeypatch):
    threads, to = set(), torch.Tensor.to

    def noting(tensor, device):
        threads.add(threading.get_ident())
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", noting)
    found = on_device(np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2], torch.device("cpu"))
    assert found.tolist() == [0, 2, 3, 5]
    assert threads
    assert threading.get_ident() not in threads
