"""Pieces that several networks share: scaled channel counts and the residual blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """Channel count times the width multiplier, rounded to a multiple of 8 (half up), at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


def projection(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Shortcut of a residual block: the identity, or a 1x1 convolution and BN where the shape changes."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first one strides.

    Parameters
    ----------
    c_in : int
        Channels of the input.
    channels : int
        Channels of both convolutions and, times `expansion`, of the output.
    stride : int
        Stride of the block.
    """

    expansion = 1

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = projection(c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, channels, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the 3x3 one strides.

    Parameters
    ----------
    c_in : int
        Channels of the input.
    channels : int
        Channels of the first two convolutions; the output has `expansion` times as many.
    stride : int
        Stride of the block.
    """

    expansion = 4

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        c_out = channels * self.expansion
        self.conv1 = nn.Conv2d(c_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, 4 channels, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x))
