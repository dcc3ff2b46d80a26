"""Insert the computation of the slots of a write."""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.slots import SlotWrite
from torch_tkv.passes.views import calculate, call, size_node, value

aten, prims = torch.ops.aten, torch.ops.prims

SKIPPED, OUTSIDE = -1, torch.iinfo(torch.int64).max


def slot_mapping(
    graph: Graph, write: SlotWrite, padding: str, shared: dict[Hashable, Node]
) -> tuple[Node, bool]:
    """Return the node of the slots [T] of a write, and the operator's `wrap` for them.

    Args:
        padding: "wrap": negative indices count from the end; "skip": they are not written.
        shared: what was inserted before, to use again.
    """
    key = write.index, tuple(map(str, write.cache.shape[:2]))
    if key not in shared:
        slots = _slots(graph, write, padding)
        if value(slots).dim() != 1:
            slots = call(graph, aten.reshape.default, slots, [-1])
        shared[key] = slots
    return shared[key], padding == "wrap" and len(write.index) == 1 and None not in write.index


def _slots(graph: Graph, write: SlotWrite, padding: str) -> Node:
    """Insert the slots, of the shape of the grid or flat."""
    if len(write.index) == 1 and write.index[0] is not None:
        return write.index[0].build(graph)
    cache = write.cache.build(graph)
    device, sizes = value(cache).device, [size_node(graph, cache, dim) for dim in range(2)]
    if all(view is None for view in write.index):
        return _arange(graph, calculate(graph, operator.mul, *sizes), device)
    outside: list[Node] = []
    skipped: list[Node] = []
    indices: list[Node] = []
    for dim, (view, size) in enumerate(zip(write.index, sizes, strict=True)):
        if view is None:
            index = _arange(graph, size, device)
            for _ in range(len(write.tokens.shape) - 3 if dim == 0 else 0):
                index = call(graph, aten.unsqueeze.default, index, -1)
        else:
            index = view.build(graph)
            if value(index).dtype != torch.int64:
                index = call(graph, prims.convert_element_type.default, index, torch.int64)
            if padding == "wrap":
                index = _wrapped(graph, index, size)
            negative = call(graph, aten.lt.Scalar, index, 0)
            (outside if padding == "wrap" else skipped).append(negative)
            if dim == 1:
                outside.append(call(graph, aten.ge.Scalar, index, size))
        indices.append(index)
    slots = call(graph, aten.mul.Tensor, indices[0], sizes[1])
    slots = call(graph, aten.add.Tensor, slots, indices[1])
    # A block or an offset out of range is a slot out of range, not one of another block.
    slots = _where(graph, outside, OUTSIDE, slots)
    return _where(graph, skipped, SKIPPED, slots)


def _arange(graph: Graph, length: int | Node, device: torch.device) -> Node:
    options = {"dtype": torch.int64, "device": device, "requires_grad": False}
    return call(graph, prims.iota.default, length, start=0, step=1, **options)


def _wrapped(graph: Graph, index: Node, size: int | Node) -> Node:
    negative = call(graph, aten.lt.Scalar, index, 0)
    return call(graph, aten.where.self, negative, call(graph, aten.add.Tensor, index, size), index)


def _where(graph: Graph, masks: list[Node], number: int, slots: Node) -> Node:
    """Insert `number` where any of the masks is set, else the slots."""
    if not masks:
        return slots
    mask = functools.reduce(lambda a, b: call(graph, aten.bitwise_or.Tensor, a, b), masks)
    options = {"dtype": torch.int64, "device": value(slots).device, "pin_memory": False}
    constant = call(graph, aten.full.default, [], number, **options)
    return call(graph, aten.where.self, mask, constant, slots)
