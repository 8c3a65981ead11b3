"""The released code's VGG networks for 32x32 images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from clicktrain.errors import InvalidArgument
from clicktrain.models.blocks import conv3x3, scaled
from clicktrain.models.spec import ModelSpec

Stages = Sequence[Sequence[int]]
"""Output channels of each convolution, stage by stage; a 2x2 max-pool stands between stages."""

VGG11: Stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG13: Stages = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

_OFFICIAL_FC_INPUTS = 512


class VGG(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, four 2x2 max-pools, mean over the image, three FC layers.

    The mean over whatever is left of the image equals the official 2x2 average pool for 32x32 inputs. The
    initialisation is the official one: convolutions N(0, 2 / (k k C_out)), BatchNorm gamma 0.5, FC layers
    N(0, 0.01^2). At other widths than 1 the standard deviation of an FC layer grows with
    sqrt(512 / inputs), so that the scale of the logits, and with it early training, stays as it is.

    Parameters
    ----------
    stages : sequence of sequences of int
        Shape of the network.
    num_classes, in_channels : int
        Outputs and image channels.
    width : float
        Channel multiplier (`scaled`); the hidden FC layers are as wide as the last convolution.
    """

    def __init__(self, stages: Stages, *, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for i, stage in enumerate(stages):
            if i > 0:
                self.features.append(nn.MaxPool2d(2))
            for c in stage:
                c_out = scaled(c, width)
                self.features.extend([conv3x3(channels, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)])
                channels = c_out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, num_classes),
        )
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W], H and W at least 16, to logits [N, num_classes]."""
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
            elif isinstance(module, nn.Linear):
                std = 0.01 * math.sqrt(_OFFICIAL_FC_INPUTS / module.in_features)
                nn.init.normal_(module.weight, 0.0, std)
                nn.init.zeros_(module.bias)


def vgg11(spec: ModelSpec) -> nn.Module:
    """Eight convolutions."""
    return _build(VGG11, spec)


def vgg13(spec: ModelSpec) -> nn.Module:
    """Ten convolutions."""
    return _build(VGG13, spec)


def vgg16(spec: ModelSpec) -> nn.Module:
    """Thirteen convolutions."""
    return _build(VGG16, spec)


def _build(stages: Stages, spec: ModelSpec) -> nn.Module:
    smallest = 2 ** (len(stages) - 1)
    if spec.input_size < smallest:
        raise InvalidArgument(
            f"input_size: {spec.input_size} is too small for {spec.name}, which halves the image "
            f"{len(stages) - 1} times and needs at least {smallest}"
        )
    return VGG(stages, num_classes=spec.num_classes, in_channels=spec.in_channels, width=spec.width)
