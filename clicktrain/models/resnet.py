"""Residual networks for small images: ClickTrain's wide ones and PruneTrain's thin ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.models.blocks import BasicBlock, Bottleneck, conv3x3, scaled
from clicktrain.models.spec import ModelSpec

Stages = Sequence[tuple[int, int]]
"""Channels and number of blocks, stage by stage."""

OFFICIAL_STAGES: Stages = ((64, 3), (128, 4), (256, 5), (512, 3))
OFFICIAL_BOTTLENECK_STAGES: Stages = ((64, 3), (128, 4), (256, 6), (512, 3))
PRUNETRAIN_STAGES: Stages = ((16, 5), (32, 5), (64, 5))
PRUNETRAIN_BOTTLENECK_STAGES: Stages = ((16, 8), (32, 8), (64, 8))


class ResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks (every stage but the first halves the image), pooling, one FC.

    Parameters
    ----------
    block : type
        `BasicBlock` or `Bottleneck`.
    stages : sequence of (channels, blocks)
        Shape of the network; the stem has as many channels as the first stage.
    num_classes, in_channels : int
        Outputs and image channels.
    width : float
        Channel multiplier (`scaled`).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stages: Stages,
        *,
        num_classes: int,
        in_channels: int,
        width: float,
    ) -> None:
        super().__init__()
        channels = [scaled(c, width) for c, _ in stages]
        self.conv1 = conv3x3(in_channels, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        c_in = channels[0]
        self.stage_names = tuple(f"layer{i}" for i in range(1, len(stages) + 1))
        for name, c, (_, blocks) in zip(self.stage_names, channels, stages, strict=True):
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(block(c_in, c, stride=2 if i == 0 and name != "layer1" else 1))
                c_in = c * block.expansion
            self.add_module(name, stage)
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def official_resnet32(spec: ModelSpec) -> nn.Module:
    """ClickTrain's resnet32: 15 basic blocks at 64 to 512 channels, PyTorch's default initialisation."""
    return _build(BasicBlock, OFFICIAL_STAGES, spec)


def official_resnet50(spec: ModelSpec) -> nn.Module:
    """ClickTrain's resnet50: 16 bottlenecks at 64 to 512 (x4) channels, PyTorch's default initialisation."""
    return _build(Bottleneck, OFFICIAL_BOTTLENECK_STAGES, spec)


def prunetrain_resnet32(spec: ModelSpec) -> nn.Module:
    """PruneTrain's resnet32: 15 basic blocks at 16 to 64 channels."""
    return _he_normal(_build(BasicBlock, PRUNETRAIN_STAGES, spec))


def prunetrain_resnet50(spec: ModelSpec) -> nn.Module:
    """PruneTrain's resnet50: 24 bottlenecks at 16 to 64 (x4) channels."""
    return _he_normal(_build(Bottleneck, PRUNETRAIN_BOTTLENECK_STAGES, spec))


def _build(block: type[BasicBlock] | type[Bottleneck], stages: Stages, spec: ModelSpec) -> ResNet:
    return ResNet(block, stages, num_classes=spec.num_classes, in_channels=spec.in_channels, width=spec.width)


def _he_normal(model: nn.Module) -> nn.Module:
    """Draw every convolution from N(0, 2 / (k k C_out)), as is the custom for thin CIFAR networks."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
