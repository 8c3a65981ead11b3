"""From a graph to steps on planned memory."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor

from clicktrain.assignment import Assignment
from clicktrain.deploy import layout
from clicktrain.deploy.graph import TORCH, Graph, Node
from clicktrain.deploy.layout import Form, Windowed
from clicktrain.deploy.memory import ARENA, INPUT, OUTPUT, Storage, plan_arena
from clicktrain.kernels import build
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.library import AdaptivePooling, Linear, Pooling, Step
from clicktrain.kernels.cpu.passes import Prepared, can_pool, gather
from clicktrain.kernels.cpu.tiles import Choice
from clicktrain.kernels.cpu.tuning import choice_for, fingerprint, tune_pass
from clicktrain.kernels.plan import plan

OUTPUT_TILE = 16
"""Outputs of a linear layer that lie side by side, as in program.h."""

Place = Form | None
"""Where a result lies: in lanes, or (None) plain, as torch has it."""


class Kind(IntEnum):
    """Kinds of steps, numbered as in program.h."""

    CONVOLVE = 0
    PACK = 1
    UNPACK = 2
    POOL = 3
    MEAN = 4
    ADAPTIVE_POOL = 5
    LINEAR = 6
    ADD = 7
    SCALE = 8
    CLEAR_OUTSIDE = 9


@dataclass(eq=False)
class NativeStep:
    """A step of program.h, for the node of a number."""

    kind: Kind
    number: int
    x: Storage
    y: Storage
    residual: Storage | None = None
    relu: bool = False
    floats: int = 0
    geometry: ctypes.Structure | None = None
    weights: Tensor | None = None
    bias: Tensor | None = None
    prepared: Prepared | None = None

    def as_c(self) -> Step:
        """Return the C structure."""
        residual = self.residual
        return Step(
            kind=self.kind, relu=self.relu, x_buffer=self.x.buffer, y_buffer=self.y.buffer,
            residual_buffer=-1 if residual is None else residual.buffer,
            x=self.x.offset, y=self.y.offset, residual=0 if residual is None else residual.offset, floats=self.floats,
            geometry=None if self.geometry is None else ctypes.addressof(self.geometry),
            weights=None if self.weights is None else self.weights.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
        )  # fmt: skip


@dataclass(eq=False)
class TorchStep:
    """An operation that torch computes: one without a kernel, or a convolution that is faster dense.

    Attributes
    ----------
    number : int
        Of its node.
    node : Node
        The operation; a convolution has its dense weight in place of its values.
    sources : list
        For each operand the storage, in which it lies plain, and its shape; or the number of the node that torch
        computed it with.
    """

    number: int
    node: Node
    sources: list[tuple[Storage, tuple[int, ...]] | int]


@dataclass(eq=False)
class Program:
    """Steps, and the memory that they need.

    Attributes
    ----------
    steps : list
        In order.
    arena_floats : int
        Size of the memory for intermediate results.
    externals : dict
        Number of a node that torch computes -> buffer through which native steps read its result.
    output : Storage or int
        Where the result is: the buffer OUTPUT, or what torch computed for the node of that number.
    images : int
        Of a batch.
    choices : dict
        How the convolutions are cut up, by fingerprint (see `clicktrain.kernels.cpu.tuning`).
    """

    steps: list[NativeStep | TorchStep]
    arena_floats: int
    externals: dict[int, int]
    output: Storage | int
    images: int
    choices: dict[str, Choice]


def build_program(graph: Graph, images: int, tune: bool = False) -> Program:
    """Choose forms, lay out all passes and plan the memory.

    Parameters
    ----------
    graph : Graph
        Fused.
    images : int
        Of a batch.
    tune : bool
        Whether to measure how each convolution is cut up best, as `clicktrain.tune` does.
    """
    return _Builder(graph, images, tune).program()


@dataclass
class _Builder:
    graph: Graph
    images: int
    tune: bool
    steps: list[NativeStep | TorchStep] = field(default_factory=list)
    places: dict[tuple[int, Place], Storage] = field(default_factory=dict)
    externals: dict[int, int] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._uses = self.graph.uses()

    def program(self) -> Program:
        self._prepare_convolutions()
        self.places[0, None] = Storage(self._size(0), INPUT)
        for number, node in self.graph.nodes.items():
            if node.op != "input":
                getattr(self, f"_{node.op}")(number, node)
        output = self._output()
        for number, step in enumerate(self.steps):
            for storage in self._storages(step):
                storage.used_by(number)
        arena = plan_arena({id(s): s for step in self.steps for s in self._storages(step)}.values())
        return Program(self.steps, arena, self.externals, output, self.images, self.choices)

    def _output(self) -> Storage | int:
        """Let the result come into being where the caller wants it."""
        number = self.graph.output
        if self._by_torch(number):
            return number
        storage = self._plain(number)
        if storage.buffer != ARENA:  # the input itself
            copied = Storage(storage.floats, OUTPUT)
            self.steps.append(NativeStep(Kind.ADD, number, storage, copied, floats=storage.floats))
            return copied
        storage.buffer = OUTPUT
        return storage

    @staticmethod
    def _storages(step: NativeStep | TorchStep) -> list[Storage]:
        if isinstance(step, TorchStep):
            return [source[0] for source in step.sources if not isinstance(source, int)]
        return [storage for storage in (step.x, step.y, step.residual) if storage is not None]

    # Results and where they lie ---------------------------------------------------------------------------------

    def _by_torch(self, number: int) -> bool:
        node = self.graph.nodes[number]
        return node.op == TORCH or node.is_dense

    def _shape(self, number: int) -> tuple[int, ...]:
        shape = self.graph.nodes[number].shape
        assert shape is not None
        return shape

    def _size(self, number: int) -> int:
        return self.images * math.prod(self._shape(number))

    def _new(self, number: int, place: Place) -> Storage:
        """Return memory for a result."""
        floats = self._size(number) if place is None else place.floats(self.images, self._shape(number)[0])
        storage = self.places[number, place] = Storage(floats, ARENA)
        return storage

    def _plain(self, number: int) -> Storage:
        """Return where a result lies plain; put it there if need be."""
        if (number, None) not in self.places:
            if self._by_torch(number):
                self.externals[number] = OUTPUT + 1 + len(self.externals)
                self.places[number, None] = Storage(self._size(number), self.externals[number])
            else:
                form, source = self._blocked_place(number)
                self._repack(Kind.UNPACK, number, form, source, self._new(number, None))
        return self.places[number, None]

    def _blocked(self, number: int, form: Form) -> Storage:
        """Return where a result lies in a form; put it there if need be."""
        if (number, form) not in self.places:
            self._repack(Kind.PACK, number, form, self._plain(number), self._new(number, form))
        return self.places[number, form]

    def _blocked_place(self, number: int) -> tuple[Form, Storage]:
        """Return a form in which a result lies."""
        return next((form, s) for (n, form), s in self.places.items() if n == number and form is not None)

    def _repack(self, kind: Kind, number: int, form: Form, x: Storage, y: Storage) -> None:
        channels, height, width = self._shape(number)
        lanes = form.lanes(self.images, channels, (height, width))
        self.steps.append(NativeStep(kind, number, x, y, geometry=lanes))

    def _form(self, number: int) -> Form:
        """Return the form in which a result lies, or else the one in which it should."""
        for n, form in self.places:
            if n == number and form is not None:
                return form
        return layout.form_of(self.graph.nodes[number].size, self.images)

    def _clear(self, number: int, form: Form) -> None:
        """Make zero what the result holds beyond its images."""
        node = self.graph.nodes[number]
        if form.grid != layout.IMAGES and not form.fits(node.size):
            strips = form.strips(self.images, self._shape(number)[0], node.size)
            place = self.places[number, form]
            self.steps.append(NativeStep(Kind.CLEAR_OUTSIDE, number, place, place, geometry=strips))

    # Operations -------------------------------------------------------------------------------------------------

    def _prepare_convolutions(self) -> None:
        """Lay out all convolutions, in parallel because each may wait for a compiler."""
        numbers = [n for n, node in self.graph.nodes.items() if node.op == "conv" and not self._by_torch(n)]
        calls = [partial(self._prepared, number) for number in numbers]
        if self.tune:  # measurements must not disturb each other
            self._convolutions = dict(zip(numbers, (call() for call in calls), strict=True))
        else:
            self._convolutions = dict(zip(numbers, build.in_parallel(calls), strict=True))

    def _prepared(self, number: int) -> Prepared:
        node = self.graph.nodes[number]
        layer, forms = self._layer(node), self._windowed(node)
        on_forms, blocks = layout.layer_on(layer, forms), forms.target.blocks(self.images)
        pooled, transforms = self._is_halved(number), forms.target.grid == layout.IMAGES
        choose = partial(tune_pass, packed=True) if self.tune else choice_for
        choice = choose(on_forms, blocks, pooled, transforms=transforms)
        self.choices[fingerprint(on_forms, blocks, pooled, transforms)] = choice
        return layout.prepare_on(layer, forms, self.images, choice, packed=True)

    def _is_halved(self, number: int) -> bool:
        """Tell whether all that reads a result is a 2 x 2 maximum."""
        readers = (node for node in self.graph.nodes.values() if number in node.inputs)
        return self._uses[number] == 1 and any(reader.halves for reader in readers)

    def _layer(self, node: Node) -> Layer:
        stride, padding = (tuple(node.attributes[key]) for key in ("stride", "padding"))
        shape = (self.images, *self._shape(node.inputs[0]))
        return Layer.forward(plan(node.tensors["assignment"], node.pool, shape, stride, padding))

    def _windowed(self, node: Node) -> Windowed:
        stride = tuple(node.attributes["stride"])
        return layout.windowed(self.graph.nodes[node.inputs[0]].size, node.size, stride, self.images)

    def _conv(self, number: int, node: Node) -> None:
        if node.is_dense:
            weight = Assignment(node.tensors["assignment"], node.pool).scatter(node.tensors["values"])
            tensors = {
                "weight": weight.contiguous(memory_format=torch.channels_last), "bias": node.tensors["bias"],
            }  # fmt: skip
            self._torch(number, replace(node, tensors=tensors))
            return
        forms, prepared = self._windowed(node), self._convolutions[number]
        x = self._blocked(node.inputs[0], forms.source)
        residual = self._blocked(node.inputs[1], forms.target) if len(node.inputs) > 1 else None
        y = self._new(number, forms.target)
        step = NativeStep(Kind.CONVOLVE, number, x, y, residual, node.relu, prepared=prepared)
        step.geometry, step.bias = prepared.structure, node.tensors["bias"].contiguous()
        step.weights = gather(prepared, node.tensors["values"].contiguous())
        self.steps.append(step)
        self._clear(number, forms.target)

    def _pool(self, number: int, node: Node) -> None:
        forms, channels = self._windowed(node), self._shape(number)[0]
        (size_h, size_w), (stride_h, stride_w), (pad_h, pad_w) = (
            node.attributes[key] for key in ("size", "stride", "padding")
        )
        pooling = Pooling(
            x=forms.source.strips(self.images, channels, self.graph.nodes[node.inputs[0]].size),
            out_h=forms.target.size[0], out_w=forms.target.size[1], size_h=size_h, size_w=size_w,
            stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w, average=node.attributes["average"],
        )  # fmt: skip
        if self._pooled_by_convolution(number, node, forms):
            return
        x = self._blocked(node.inputs[0], forms.source)
        self.steps.append(NativeStep(Kind.POOL, number, x, self._new(number, forms.target), geometry=pooling))
        self._clear(number, forms.target)

    def _pooled_by_convolution(self, number: int, node: Node, forms: Windowed) -> bool:
        """Let the convolution before a 2 x 2 maximum write that only, if it can and nothing else reads its result."""
        source = node.inputs[0]
        found = [step for step in self.steps if step.number == source]
        if not self._is_halved(source):
            return False
        if (source, forms.source) not in self.places or not forms.source.fits(self.graph.nodes[source].size):
            return False
        match found:
            case [NativeStep(Kind.CONVOLVE, residual=None, prepared=Prepared() as made) as step] if can_pool(made):
                made.structure.max_pool = 1
                step.y = self._new(number, forms.target)
                return True
        return False

    def _mean(self, number: int, node: Node) -> None:
        source = node.inputs[0]
        form = self._form(source)
        strips = form.strips(self.images, self._shape(source)[0], self.graph.nodes[source].size)
        x = self._blocked(source, form)
        self.steps.append(NativeStep(Kind.MEAN, number, x, self._new(number, None), geometry=strips))

    def _adaptive_pool(self, number: int, node: Node) -> None:
        channels, height, width = self._shape(node.inputs[0])
        pooling = AdaptivePooling(self.images * channels, height, width, *node.size)
        x = self._plain(node.inputs[0])
        self.steps.append(NativeStep(Kind.ADAPTIVE_POOL, number, x, self._new(number, None), geometry=pooling))

    def _linear(self, number: int, node: Node) -> None:
        weight, bias = node.tensors["weight"], node.tensors["bias"]
        outputs, inputs = weight.shape
        tiles = -(-outputs // OUTPUT_TILE)
        padded = weight.new_zeros(tiles * OUTPUT_TILE, inputs)
        padded[:outputs] = weight
        padded_bias = bias.new_zeros(tiles * OUTPUT_TILE)
        padded_bias[:outputs] = bias
        x, y, geometry = self._plain(node.inputs[0]), self._new(number, None), Linear(self.images, inputs, outputs)
        step = NativeStep(Kind.LINEAR, number, x, y, relu=node.relu, geometry=geometry, bias=padded_bias)
        step.weights = padded.view(tiles, OUTPUT_TILE, inputs).transpose(1, 2).contiguous()
        self.steps.append(step)

    def _add(self, number: int, node: Node) -> None:
        self._elementwise(number, node, node.inputs[1])

    def _relu(self, number: int, node: Node) -> None:
        self._elementwise(number, node, None)

    def _elementwise(self, number: int, node: Node, other: int | None) -> None:
        """Add and rectify wherever the operand lies."""
        place: Place = self._form(node.inputs[0]) if len(self._shape(number)) == 3 else None
        at = self._plain if place is None else partial(self._blocked, form=place)
        x, residual = at(node.inputs[0]), None if other is None else at(other)
        relu = node.relu or node.op == "relu"
        y = self._new(number, place)
        self.steps.append(NativeStep(Kind.ADD, number, x, y, residual, relu, floats=y.floats))

    def _scale(self, number: int, node: Node) -> None:
        form = self._form(node.inputs[0])
        x = self._blocked(node.inputs[0], form)
        strips = form.strips(self.images, self._shape(number)[0], node.size)
        step = NativeStep(Kind.SCALE, number, x, self._new(number, form), relu=node.relu, geometry=strips)
        step.weights, step.bias = node.tensors["scale"], node.tensors["shift"]
        self.steps.append(step)
        self._clear(number, form)

    def _reshape(self, number: int, node: Node) -> None:
        self.places[number, None] = self._plain(node.inputs[0])

    def _torch(self, number: int, node: Node) -> None:
        sources: list[tuple[Storage, tuple[int, ...]] | int] = [
            source if self._by_torch(source) else (self._plain(source), (self.images, *self._shape(source)))
            for source in node.inputs
        ]
        self.steps.append(TorchStep(number, node, sources))
