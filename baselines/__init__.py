"""Every competitor of ClickTrain: training methods, each one file, each a `clicktrain.Method`."""

from baselines.admm_elementwise import AdmmElementwise
from baselines.admm_pattern import AdmmPattern
from baselines.dense import Dense
from baselines.dpf import DPF
from baselines.gradual_magnitude import GradualMagnitude
from baselines.magnitude import MagnitudePruneFinetune
from baselines.network_slimming import NetworkSlimming
from baselines.one_shot_nm import OneShotNM
from baselines.prunetrain import PruneTrain
from baselines.rigl import RigL
from baselines.set import SET
from baselines.small_dense import SmallDense
from baselines.sr_ste import SRSTE
from baselines.train_prune_finetune import TrainPruneFinetune

__all__ = [
    "DPF",
    "SET",
    "SRSTE",
    "AdmmElementwise",
    "AdmmPattern",
    "Dense",
    "GradualMagnitude",
    "MagnitudePruneFinetune",
    "NetworkSlimming",
    "OneShotNM",
    "PruneTrain",
    "RigL",
    "SmallDense",
    "TrainPruneFinetune",
]
