"""torchvision's ImageNet networks under our names."""

from __future__ import annotations

from torch import nn

from clicktrain._torchvision import load_torchvision
from clicktrain.errors import InvalidArgument
from clicktrain.models.spec import ModelSpec

_PREFIX = "imagenet_"
_SMALLEST_INPUT = 32  # below, vgg16_bn's five max-pools leave no pixel


def build(spec: ModelSpec) -> nn.Module:
    """Build torchvision's network of the same name, with another first convolution for other channel counts.

    Raises
    ------
    InvalidArgument
        For a width other than 1 (torchvision fixes the channel counts) or an input below 32 pixels.
    """
    if spec.width != 1.0:
        raise InvalidArgument(f"width: {spec.name} comes from torchvision at width 1 only, got {spec.width}")
    if spec.input_size < _SMALLEST_INPUT:
        raise InvalidArgument(f"input_size: {spec.name} needs at least {_SMALLEST_INPUT} pixels, got {spec.input_size}")
    torchvision = load_torchvision()
    model: nn.Module = torchvision.models.get_model(
        spec.name.removeprefix(_PREFIX), weights=None, num_classes=spec.num_classes
    )
    if spec.in_channels != 3:
        _replace_first_conv(model, spec.in_channels)
    return model


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(name, new)
