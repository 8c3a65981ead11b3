"""asv: tiny trainings from start to end, of ClickTrain and of what it is compared with."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from .optional import need
from .units import unit

TARGET, EPOCHS, WIDTH = 6.0, 6, 0.25
TRAINING = {"batch_size": 50, "optimizer": "adam", "lr": 2e-3, "augment": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "baselines:Dense"},
    "PAT": {"name": "baselines:TrainPruneFinetune", "options": {"target_compression": TARGET, "finetune_epochs": 2}},
    "PDT": {"name": "baselines:PruneTrain", "options": {"every": 2}},
    "ClickTrain": {"name": "clicktrain", "options": {"target_compression": TARGET}},
}
"""The four ways of the paper to a network: no pruning, pruning after training, rivals during training, ours."""


def run(method: str, images: int = 1000, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train VGG-13 at a quarter of its width on embedded images, prune and finish.

    Returns
    -------
    dict
        The run's result, as the trainer writes it, and "wall_seconds" for all of it, data and evaluation included.

    Raises
    ------
    NotImplementedError
        If this commit cannot do it.
    """
    train, config = need("clicktrain.training:train"), need("clicktrain.config:RunConfig")
    if ":" in METHODS[method]["name"]:
        need(METHODS[method]["name"])
    values = {
        "data": {"name": "fashion-mnist-small", "train_limit": images},
        "model": {"name": "vgg13", "width": WIDTH},
        # A fixed memory format: which one is faster is measured, and may change between two runs.
        "train": TRAINING | {"epochs": epochs, "eval_every": epochs, "channels_last": "off"},
        "method": METHODS[method],
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = train(config.from_dict(values), Path(folder) / "run", callbacks=())
        return {**result, "wall_seconds": time.perf_counter() - start}


class EndToEnd:
    """A method on 1,000 images for 6 epochs, with equal seeds; PAT fine-tunes for 2 more."""

    params = (list(METHODS),)
    param_names = ("method",)
    version = "1"
    timeout = 300

    def setup_cache(self) -> dict[str, dict[str, Any] | str]:
        results: dict[str, dict[str, Any] | str] = {}
        for method in METHODS:
            try:
                results[method] = run(method)
            except NotImplementedError as reason:
                results[method] = str(reason)
        return results

    def setup(self, results: dict[str, dict[str, Any] | str], method: str) -> None:
        result = results[method]
        if isinstance(result, str):
            raise NotImplementedError(result)
        self._result = result

    @unit("s")
    def track_wall_seconds(self, results: object, method: str) -> float:
        return float(self._result["wall_seconds"])

    @unit("percent of dense training")
    def track_training_flops_saved(self, results: object, method: str) -> float:
        return float(self._result["training_flops"]["saved_percent"])

    @unit("weights / kept weights")
    def track_compression(self, results: object, method: str) -> float:
        return float(self._result["compression"]["paper"])

    @unit("percent")
    def track_inference_macs_saved(self, results: object, method: str) -> float:
        macs = self._result["inference_macs"]
        return float(100 * (1 - macs["sparse"] / macs["dense"]))

    @unit("percent of test images")
    def track_accuracy(self, results: object, method: str) -> float:
        return float(self._result["accuracy"]["last"])
