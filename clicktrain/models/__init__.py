"""Networks of the study, built by name.

The ``resnet*`` and ``vgg*`` networks are those of the released ClickTrain code, ``prunetrain_*`` the thin
CIFAR networks of PruneTrain, ``imagenet_*`` torchvision's. Convolutions outside residual shortcuts have a
parameter name with ``conv`` or ``feature`` in it, because the released compression counter goes by name.
"""

from clicktrain.models.registry import create, names

__all__ = ["create", "names"]
