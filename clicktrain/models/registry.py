"""Names of the networks, and `create`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from clicktrain.errors import InvalidArgument
from clicktrain.models import imagenet, resnet, vgg
from clicktrain.models.spec import ModelSpec

_BUILDERS: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "resnet32": resnet.official_resnet32,
    "resnet50": resnet.official_resnet50,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "vgg16": vgg.vgg16,
    "prunetrain_resnet32": resnet.prunetrain_resnet32,
    "prunetrain_resnet50": resnet.prunetrain_resnet50,
    "imagenet_resnet18": imagenet.build,
    "imagenet_resnet50": imagenet.build,
    "imagenet_vgg16_bn": imagenet.build,
}


def names() -> tuple[str, ...]:
    """Names that `create` knows."""
    return tuple(_BUILDERS)


def create(name: str, num_classes: int, *, width: float = 1.0, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build a freshly initialised network.

    Parameters
    ----------
    name : str
        One of `names()`.
    num_classes : int
        Number of outputs.
    width : float
        Channel multiplier; counts are rounded to a multiple of 8 and are at least 8. Networks from
        torchvision (``imagenet_*``) exist at width 1 only.
    in_channels : int
        Channels of the images.
    input_size : int
        Height and width of the images in pixels. No parameter depends on it.

    Returns
    -------
    nn.Module
        Maps float images [N, in_channels, input_size, input_size] to logits [N, num_classes].

    Raises
    ------
    InvalidArgument
        If the name is unknown or an argument is outside of what the network can do.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InvalidArgument(f"model: unknown name {name!r}{hint}; known: {', '.join(_BUILDERS)}")
    return builder(ModelSpec(name, num_classes, width, in_channels, input_size))
