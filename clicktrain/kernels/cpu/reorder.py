"""The filter-kernel reorder: in which order a pass walks through its kernels.

Kernels go by channel block, group of patterns, filter, pattern, channel. Within a group the filters are ordered by
how many kernels of each pattern they have, so that the loops of neighbouring filters run equally long and the
processor predicts their ends: without that, a fifth of the time of a deep layer at 8x is lost to mispredicted
branches. Two patterns to a group suffice for nearly all of the gain. Filters stay inside the part of a layer that
one item computes. The order of filters does not touch the order in which any sum is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clicktrain.kernels.cpu.layer import Integers, Kernels, Layer, stable_order


@dataclass(frozen=True, eq=False)
class Reordered:
    """Kernels in the order of a pass.

    Attributes
    ----------
    kernels : Kernels
        Sorted.
    lists, places : int64 arrays
        List of each kernel (channel block * groups + group), and the place of its filter there.
    order : (lists, filters) int64
        The filter in each place.
    runs : (lists, filters, patterns of a group) int64
        Kernels of each pattern, by place.
    """

    kernels: Kernels
    lists: Integers
    places: Integers
    order: Integers
    runs: Integers


def reorder(layer: Layer, channel_block: int, group: int, part: int) -> Reordered:
    """Sort the kernels of a layer.

    Parameters
    ----------
    layer : Layer
        The pass.
    channel_block : int
        Channels in a block.
    group : int
        Patterns in a group.
    part : int
        Filters that are computed together; only they change places with each other.
    """
    kernels, groups = layer.kernels, -(-len(layer.patterns) // group)
    shape = (-(-layer.channels // channel_block) * groups, layer.filters, group)
    lists = kernels.channels // channel_block * groups + kernels.patterns // group
    pattern = kernels.patterns % group
    counts = np.bincount((lists * layer.filters + kernels.filters) * group + pattern, minlength=int(np.prod(shape)))
    runs = counts.reshape(shape)
    parts = np.broadcast_to(np.arange(layer.filters) // part, shape[:2])
    order = np.lexsort((*(runs[..., p] for p in reversed(range(group))), parts), axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(layer.filters), shape[:2]), axis=1)
    places = place[lists, kernels.filters]
    by_pass = stable_order((lists * layer.filters + places) * group + pattern, counts.size)
    return Reordered(
        kernels[by_pass], lists[by_pass], places[by_pass], order, np.take_along_axis(runs, order[..., None], axis=1)
    )
