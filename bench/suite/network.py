"""asv: a whole network, dense and pruned."""

from __future__ import annotations

from functools import partial

import torch

from .cases import DENSE
from .networks import Setting, Step
from .optional import need, need_backend
from .units import unit


class Inference:
    """VGG-13, pruned by 9.0x or dense, in evaluation mode."""

    params = (["sparse", "dense"], [32, 1])
    param_names = ("network", "batch")
    version = "1"

    def setup(self, network: str, batch: int) -> None:
        setting = Setting(batch=batch)
        if network == "sparse":
            need_backend("cpu")
        self._model = (setting.sparse("cpu") if network == "sparse" else setting.model()[0]).eval()
        self._x = setting.images(0)[0]

    def time_forward(self, network: str, batch: int) -> None:
        with torch.inference_mode():
            self._model(self._x)


class Training:
    """One training step of VGG-13 at half of its width, 64 images, pruned by 9.0x or dense."""

    params = (["sparse", "dense"],)
    param_names = ("network",)
    version = "1"
    setting = Setting(0.5)

    def setup(self, network: str) -> None:
        if network == "sparse":
            need_backend("cpu")
        self._step = Step(self.setting.sparse("cpu") if network == "sparse" else self.setting.model()[0])
        self._batch = self.setting.images(0)

    def time_step(self, network: str) -> None:
        self._step(*self._batch)

    def peakmem_step(self, network: str) -> None:
        for _ in range(2):
            self._step(*self._batch)


class Speedup:
    """The same step, pruned against dense in the faster of torch's layouts, in the same rounds."""

    version = "1"

    @unit("times the best dense layout")
    def track_step_speedup(self) -> float:
        compare, setting = need("clicktrain.timing:compare"), Training.setting
        need_backend("cpu")
        x, y = setting.images(0)
        steps = {}
        for name, layout in DENSE.items():
            step = Step(setting.model()[0].to(memory_format=layout))  # type: ignore[call-overload]
            steps[name] = partial(step, x.contiguous(memory_format=layout), y)
        times = compare({**steps, "sparse": partial(Step(setting.sparse("cpu")), x, y)}, None, rounds=9)
        return float(times.speedup(times.best(*DENSE), "sparse"))


class Selecting:
    """Everything between the dense stage and the next: importance on 2 batches, a pool of 4, assignments for 9.0x."""

    version = "1"
    timeout = 300

    def setup(self) -> None:
        self._measure = need("clicktrain.importance:measure")
        self._layers, self._select = need("clicktrain.selection:prunable_layers"), need("clicktrain.selection:select")
        self._costs, sparsity = need("clicktrain.flops:layer_costs"), need("clicktrain:Sparsity")
        self._sparsity = sparsity(target_compression=9.0)
        setting = Setting(0.5)
        self._model = setting.model()[0]
        self._batches = [setting.images(seed) for seed in range(2)]

    def time_select(self) -> None:
        shape = (3, 32, 32)
        weights = {name: conv.weight for name, conv in self._layers(self._model, shape).items()}
        scores = self._measure(self._model, weights, self._batches)
        self._select(scores, self._costs(self._model, shape), self._sparsity)
