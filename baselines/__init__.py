"""Every competitor of ClickTrain: training methods, each one file, each a `clicktrain.Method`."""

from baselines.dense import Dense
from baselines.train_prune_finetune import TrainPruneFinetune

__all__ = ["Dense", "TrainPruneFinetune"]
