"""Find the keys and queries of a graph that are rotated by the same angles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.elements import cone, is_followed
from torch_tkv.passes.indices import (
    SAME_INDEX,
    VIEWS,
    Axis,
    Index,
    Lanes,
    Leaf,
    layout_of,
)
from torch_tkv.passes.rotation import Rotation, rotations
from torch_tkv.passes.views import RESHAPES, same, value

aten = torch.ops.aten

# What the computation of a rotary embedding ends in.
LAST = (aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default, aten.cat.default, *RESHAPES)


@dataclass(frozen=True)
class Head:
    """A query or key, before and after its rotation.

    Attributes:
        rotated: what the rotation makes, before views of it.
        dtype: that of the result.
        tokens: the axes of the result along which tokens are counted, in the order of the key.
        heads: its other axes.
    """

    rotated: Node
    dtype: torch.dtype
    rotation: Rotation
    tokens: tuple[Axis, ...]
    heads: tuple[Axis, ...]

    def groups(self, leaf: Leaf) -> tuple[list[Axis], list[Axis]]:
        """Return the axes of a leaf that belong to tokens, and those that belong to heads."""

        def parts(axes: Sequence[Axis]) -> list[Axis]:
            found = [axis for axis in leaf.axes() if axis.origin in axes]
            return sorted(found, key=lambda axis: (axes.index(axis.origin), axis.digit))

        return parts(self.tokens), parts(self.heads)

    def rows(self) -> list[Axis]:
        """Return the axes of tokens by which cos and sin are read, or else the heads."""
        for leaf in (self.rotation.cos.leaf, self.rotation.source):
            tokens, _ = self.groups(leaf)
            if same(size_of(tokens), size_of(self.tokens)):
                break
        return tokens


class RotatedHeads:
    """The keys and queries of a graph.

    Args:
        first: as for `Elements`.
    """

    def __init__(self, graph: Graph, first: dict[Node, Node]) -> None:
        self._graph, self._first = graph, first
        self._found: dict[Any, list[tuple[Node, Rotation]]] = {}

    def keys(self, node: Node) -> list[Head]:
        """Return every way to read [T, Hkv, D] as rotated."""
        tokens, heads, size = value(node).shape
        if not isinstance(size, int):
            return []
        tokens, heads = Axis("tokens", tokens), Axis("heads", heads)
        rotated = node
        while rotated.target in (*VIEWS, *SAME_INDEX):
            rotated = rotated.args[0]  # type: ignore[assignment]
        return [
            Head(rotated, value(node).dtype, rotation, (tokens,), (heads,))
            for rotation in rotations(node, _index((tokens, heads), size), size, self._first)
        ]

    def rotated_inside(self, key: Node) -> Node | None:
        """Return what is rotated and a key is computed from, the nearest, if anything is."""
        for node in cone(key):
            if node.target in LAST and value(node).dim() and isinstance(value(node).shape[-1], int):
                size = value(node).shape[-1]
                for _ in rotations(node, _index(_axes(node), size), size, self._first):
                    return node
        return None

    def queries(self, key: Head) -> list[Head]:
        """Return all that is rotated by the angles of a key, and has as many tokens."""
        queries = (_query(node, rotation, key) for node, rotation in self._rotated_as(key))
        return [query for query in queries if query is not None]

    def _rotated_as(self, key: Head) -> list[tuple[Node, Rotation]]:
        angles = (key.rotation.cos.leaf.node, key.rotation.sin.leaf.node)
        known = (*angles, key.rotation.source.width(), key.dtype)
        if known not in self._found:
            self._found[known] = self._search(*known)
        return self._found[known]

    def _search(
        self, cos: Node, sin: Node, size: int, dtype: torch.dtype
    ) -> list[tuple[Node, Rotation]]:
        found, seen = [], set()
        by_cos, by_sin = self._computed_from(cos), self._computed_from(sin)
        for node in self._graph.nodes:
            if node not in by_cos or node not in by_sin:
                continue
            if node.target in (*VIEWS, *SAME_INDEX) and node.args[0] in seen:
                seen.add(node)
                continue
            result = value(node)
            if not isinstance(result, torch.Tensor) or result.dtype != dtype:
                continue
            if not result.dim() or not same(result.shape[-1], size):
                continue
            for rotation in rotations(node, _index(_axes(node), size), size, self._first):
                if (rotation.cos.leaf.node, rotation.sin.leaf.node) == (cos, sin):
                    found.append((node, rotation))
                    seen.add(node)
        return found

    def _computed_from(self, source: Node) -> set[Node]:
        """Return what is computed by followed operators from a node or an equal one."""
        nodes: set[Node] = set()
        for node in self._graph.nodes:
            followed = is_followed(node) and not nodes.isdisjoint(node.all_input_nodes)
            if followed or self._first.get(node, node) is source:
                nodes.add(node)
        return nodes


def _query(node: Node, rotation: Rotation, key: Head) -> Head | None:
    """Return a rotated node as the query of a key, if it has as many tokens."""
    same_axes = key.rotation.axes_in(rotation)
    if same_axes is None:
        return None
    axes = [axis for axis in _axes(node) if not same(axis.size, 1)]
    counted = {axis.origin for axis in same_axes.values()}
    tokens: list[Axis] = []
    for row in key.rows():
        if row in same_axes:
            axis = same_axes[row].origin
        else:
            # cos and sin are the same along it: any other axis of its size will do.
            left = [x for x in axes if x not in counted and same(x.size, row.size)]
            if not left:
                return None
            axis = left[0]
            counted.add(axis)
        tokens += [axis] if axis not in tokens else []
    heads = tuple(axis for axis in axes if axis not in tokens)
    if not same(size_of(tokens), size_of(key.tokens)) or not isinstance(size_of(heads), int):
        return None
    return Head(node, key.dtype, rotation, tuple(tokens), heads)


def whole_heads(node: Node) -> Leaf:
    """Return a tensor [..., D] as a leaf with D lanes."""
    return Leaf(node, layout_of(_index(_axes(node), value(node).shape[-1])))


def size_of(axes: Sequence[Axis]) -> Any:
    """Return the product of the sizes of axes."""
    size: Any = 1
    for axis in axes:
        size = size * axis.size
    return size


def _axes(node: Node) -> list[Axis]:
    """Return an axis for each dimension but the last."""
    return [Axis(dim, size) for dim, size in enumerate(value(node).shape[:-1])]


def _index(axes: Sequence[Axis], lanes: int) -> Index:
    dims = (() if same(axis.size, 1) else (axis,) for axis in axes)
    return (*dims, (Lanes(tuple(range(lanes)), lanes),))
