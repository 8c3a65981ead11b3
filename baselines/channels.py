"""Which layers share channels: found by following them through a model's graph.

Our own rather than torch-pruning's, because a training method must also know which layers end a residual branch, must
carry the optimizer's state along, and must refuse what it does not understand instead of guessing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from clicktrain.errors import InvalidArgument

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Conv2d, nn.Linear)

_PASSING_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.Dropout,
    nn.Flatten,
    nn.GELU,
    nn.Hardswish,
    nn.Identity,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
)
_PASSING = {
    "adaptive_avg_pool2d", "avg_pool2d", "contiguous", "dropout", "flatten", "max_pool2d", "relu", "relu_", "reshape",
    "view",
}  # fmt: skip
_ADDITIONS = {"add", "add_", "iadd"}
_NO_CHANNELS = {"size", "getattr", "getitem"}


@dataclass
class ChannelGroup:
    """Channels that exist together or not at all: what some layers write, added up, and what others read.

    Attributes
    ----------
    channels : int
        How many; 0 where unknown (the image).
    producers, consumers : list of str
        Names of the convolutions and linear layers that write and that read them.
    norms : list of str
        Names of the BatchNorms that scale them.
    is_image, is_output : bool
        Whether they are the image's or the logits: such a group cannot shrink.
    """

    channels: int
    producers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    is_image: bool = False
    is_output: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether the group cannot shrink."""
        return self.is_image or self.is_output

    @property
    def is_join(self) -> bool:
        """Whether several layers write to the same channels."""
        return len(self.producers) > 1


class ChannelGraph:
    """The groups of channels of a model.

    Parameters
    ----------
    model : nn.Module
        Convolutions, linear layers, BatchNorms and what acts on each channel alone; joined by additions only.

    Raises
    ------
    InvalidArgument
        If channels cannot be followed through the model; the message names the operation.

    Attributes
    ----------
    groups : list of ChannelGroup
        In the order in which the model makes them.
    reads, writes : dict
        Layer name -> number of the group it reads, and of the one it writes.
    norm_of : dict
        Layer name -> the BatchNorm right behind it.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            graph = fx.symbolic_trace(model).graph
        except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InvalidArgument(
                f"model {type(model).__name__}: its channels cannot be followed ({str(error).splitlines()[0]})"
            ) from None
        self.norm_of: dict[str, str] = {}
        self._made: list[ChannelGroup] = []
        self._modules = dict(model.named_modules())
        self._of: dict[fx.Node, ChannelGroup | None] = {}
        for node in graph.nodes:
            self._of[node] = self._follow(node)
        self.groups = [group for group in self._made if group.producers or group.consumers]
        numbers = {id(group): number for number, group in enumerate(self.groups)}
        self.reads = {name: numbers[id(group)] for group in self.groups for name in group.consumers}
        self.writes = {name: numbers[id(group)] for group in self.groups for name in group.producers}

    def open_layers(self, dead: Collection[int], removed: Iterable[str] = ()) -> set[str] | None:
        """Return the layers through which an image still acts on the output.

        Parameters
        ----------
        dead : collection of int
            Groups without any channel left.
        removed : iterable of str
            Layers that are gone.

        Returns
        -------
        set of str or None
            None where no way is left from the image to the output.
        """
        gone = set(removed)
        open_ = {
            name for name in self.reads if name not in gone and not {self.reads[name], self.writes[name]} & {*dead}
        }
        fed = self._reached(open_, self.reads, self.writes, {i for i, g in enumerate(self.groups) if g.is_image})
        used = self._reached(open_, self.writes, self.reads, {i for i, g in enumerate(self.groups) if g.is_output})
        left = {name for name in open_ if self.reads[name] in fed and self.writes[name] in used}
        return left if any(self.groups[number].is_output for number in fed) else None

    @staticmethod
    def _reached(layers: set[str], tail: dict[str, int], head: dict[str, int], start: set[int]) -> set[int]:
        reached = set(start)
        while new := {head[name] for name in layers if tail[name] in reached} - reached:
            reached |= new
        return reached

    def _follow(self, node: fx.Node) -> ChannelGroup | None:
        """Return the group of what a node computes; None for what has no channels."""
        if node.op == "placeholder":
            return self._new(ChannelGroup(0, is_image=True))
        if node.op == "call_module":
            return self._through_module(node)
        inputs = [self._find(arg) for arg in node.all_input_nodes]
        groups = [group for group in inputs if group is not None]
        if node.op == "output":
            for group in groups:
                group.is_output = True
            return None
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if not groups or name in _NO_CHANNELS:
            return None
        if name in _ADDITIONS:
            return self._join(node, groups)
        if name in _PASSING:
            return groups[0]
        raise InvalidArgument(f"channels cannot be followed through {name} ({node.name}): only additions join branches")

    def _through_module(self, node: fx.Node) -> ChannelGroup:
        name, module = str(node.target), self._modules[str(node.target)]
        source = node.all_input_nodes[0]
        group = self._find(source)
        if group is None:
            raise InvalidArgument(f"channels cannot be followed into layer {name}")
        if isinstance(module, LAYERS):
            return self._through_layer(name, module, group)
        if isinstance(module, NORMS):
            group.norms.append(name)
            if source.op == "call_module" and source.target in self._written and len(source.users) == 1:
                self.norm_of[str(source.target)] = name
            return group
        if isinstance(module, _PASSING_MODULES):
            return group
        raise InvalidArgument(f"channels cannot be followed through layer {name}, a {type(module).__name__}")

    def _through_layer(self, name: str, module: nn.Conv2d | nn.Linear, group: ChannelGroup) -> ChannelGroup:
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise InvalidArgument(f"layer {name} has groups={module.groups}: expected 1 to remove channels")
        if name in self._written:
            raise InvalidArgument(f"layer {name} runs several times: its channels cannot be removed")
        group.consumers.append(name)
        channels = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        return self._new(ChannelGroup(channels, producers=[name]))

    def _join(self, node: fx.Node, groups: list[ChannelGroup]) -> ChannelGroup:
        """Merge the groups of a sum's terms: a channel stays if any of them needs it."""
        first, *others = groups
        for other in others:
            if other is first:
                continue
            if first.is_image or other.is_image or first.channels != other.channels:
                sizes = " and ".join("the image" if g.is_image else f"{g.channels} channels" for g in (first, other))
                raise InvalidArgument(f"the residual join {node.name} of {sizes} cannot be shrunk")
            first.producers += other.producers
            first.consumers += other.consumers
            first.norms += other.norms
            self._made.remove(other)
            self._of = {known: first if group is other else group for known, group in self._of.items()}
        return first

    @property
    def _written(self) -> set[str]:
        return {name for group in self._made for name in group.producers}

    def _new(self, group: ChannelGroup) -> ChannelGroup:
        self._made.append(group)
        return group

    def _find(self, node: fx.Node) -> ChannelGroup | None:
        return self._of[node]
