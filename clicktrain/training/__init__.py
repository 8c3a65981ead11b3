"""Training runs: the loop, and what makes a run on disk survive anything."""

from clicktrain.training.callbacks import Callback
from clicktrain.training.loop import Trainer
from clicktrain.training.run import evaluate_run, train, trained_network
from clicktrain.training.session import Session, build

__all__ = ["Callback", "Session", "Trainer", "build", "evaluate_run", "train", "trained_network"]
