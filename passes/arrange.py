"""Insert views that bring the axes of a tensor into another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.indices import Axis, Leaf
from torch_tkv.passes.views import call, same, size_node, value

aten = torch.ops.aten


class ArrangeError(Exception):
    """An axis is in no group, or its symbolic size is in no tensor."""


class Arranger:
    """Inserts views of leaves into a graph.

    Args:
        like: leaves whose nodes stay in the graph, to take symbolic sizes of axes from.
    """

    def __init__(self, graph: Graph, like: Sequence[Leaf]) -> None:
        self.graph, self._like = graph, like

    def __call__(self, leaf: Leaf, groups: Sequence[Sequence[Axis]]) -> Node:
        """Return the leaf as [*groups, lanes]; an axis that it does not have is expanded.

        Raises:
            ArrangeError: an axis is in no group, or two sizes are symbolic and unknown.
        """
        node, have = leaf.node, [digit for dim in leaf.layout for digit in dim]
        if value(node).is_complex():
            node = call(self.graph, aten.view_as_real.default, node)
        wanted = [axis for group in groups for axis in group]
        if any(axis not in wanted for axis in leaf.axes()):
            raise ArrangeError
        lanes = [i for i, digit in enumerate(have) if isinstance(digit, int)]
        order = [have.index(axis) for axis in wanted if axis in have] + lanes
        if order != sorted(order) or len(order) < len(wanted) + len(lanes):
            node = self._reshape(node, [[digit] for digit in have])
            if order != sorted(order):
                node = call(self.graph, aten.permute.default, node, order)
            node = self._expand(node, [axis if axis in have else None for axis in wanted], wanted)
        return self._reshape(node, [*groups, [have[i] for i in lanes]])

    def _expand(self, node: Node, have: Sequence[Axis | None], wanted: Sequence[Axis]) -> Node:
        if None not in have:
            return node
        for dim, axis in enumerate(have):
            if axis is None:
                node = call(self.graph, aten.unsqueeze.default, node, dim)
        shape = [
            self._size([axis]) if x is None else -1 for x, axis in zip(have, wanted, strict=True)
        ]
        if None in shape:
            raise ArrangeError
        shape += [-1] * (value(node).dim() - len(shape))
        return call(self.graph, aten.expand.default, node, shape)

    def _reshape(self, node: Node, dims: Sequence[Sequence[Axis | int]]) -> Node:
        sizes = [_product(dim) for dim in dims]
        if same(value(node).shape, sizes):
            return node
        shape: list[int | Node | None]
        shape = [size if isinstance(size, int) else None for size in sizes]
        if shape.count(None) > 1:
            shape = [
                self._size(dim) if x is None else x for x, dim in zip(shape, dims, strict=True)
            ]
        if shape.count(None) > 1:
            raise ArrangeError
        shape = [-1 if size is None else size for size in shape]
        return call(self.graph, aten.reshape.default, node, shape)

    def _size(self, dim: Sequence[Axis | int]) -> int | Node | None:
        """Return a number or a node for the size of a dimension, if there is one."""
        size = _product(dim)
        if isinstance(size, int):
            return size
        for leaf in self._like:
            for i, digits in enumerate(leaf.layout):
                if digits == tuple(dim):
                    return size_node(self.graph, leaf.node, i)
        return None


def _product(dim: Sequence[Axis | int]) -> Any:
    product: Any = 1
    for digit in dim:
        product = product * (digit.size if isinstance(digit, Axis) else digit)
    return product
