"""Recognise a rotary embedding by what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_tkv.passes.elements import Elements, Polynomial, cone
from torch_tkv.passes.indices import (
    Axis,
    Index,
    Leaf,
    UnreadError,
    is_exact_cast,
    lanes_of,
    layout_of,
    through,
)
from torch_tkv.passes.views import RESHAPES, SPLITS, same, value

aten = torch.ops.aten

PEELED = (*RESHAPES, aten.permute.default)


@dataclass(frozen=True)
class Angles:
    """cos or sin: for each rotated element of a head, the lane of the leaf that it is in."""

    leaf: Leaf
    lanes: tuple[int, ...]


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding of `source`, of which the lanes are the elements of a head.

    Attributes:
        interleaved: pairs are elements (2 j, 2 j + 1) instead of (j, j + R / 2).
        inverse: by the negative angle.
    """

    source: Leaf
    cos: Angles
    sin: Angles
    interleaved: bool
    inverse: bool

    @property
    def rotary_dim(self) -> int:
        return len(self.cos.lanes)

    def pairs(self) -> list[tuple[int, int]]:
        half = self.rotary_dim // 2
        if self.interleaved:
            return [(2 * j, 2 * j + 1) for j in range(half)]
        return [(j, j + half) for j in range(half)]

    def axes_in(self, other: Rotation) -> dict[Axis, Axis] | None:
        """Return the axes of cos and sin here and there; None if the rotations differ."""
        if (self.interleaved, self.inverse) != (other.interleaved, other.inverse):
            return None
        axes: dict[Axis, Axis] = {}
        for mine, others in ((self.cos, other.cos), (self.sin, other.sin)):
            if mine.leaf.node is not others.leaf.node or mine.lanes != others.lanes:
                return None
            if [*map(len, mine.leaf.layout)] != [*map(len, others.leaf.layout)]:
                return None
            for a, b in zip(sum(mine.leaf.layout, ()), sum(others.leaf.layout, ()), strict=True):
                if not isinstance(a, Axis) or not isinstance(b, Axis):
                    if a != b:
                        return None
                elif axes.setdefault(a, b) != b or not same(a.size, b.size):
                    return None
        return axes


def rotations(
    node: Node, index: Index, head_size: int, first: dict[Node, Node]
) -> Iterator[Rotation]:
    """Yield every way to read the head at `index` of a node as one that was rotated."""
    nodes = cone(node)
    dtype = value(node).dtype
    dtypes, inside = {dtype, torch.float32, torch.complex64}, set(nodes)
    for source in nodes:
        readers = [user for user in source.users if user in inside]
        if len(readers) == 1 and readers[0].target not in (aten.view_as_complex.default, *SPLITS):
            continue
        if not readers or not isinstance(value(source), torch.Tensor):
            continue
        if value(source).dtype not in (dtype, torch.float32):
            continue
        elements = Elements({source}, head_size, dtypes, first)
        try:
            found = elements(node, index)
        except UnreadError:
            continue
        for number, leaf in enumerate(elements.leaves):
            if leaf.node is source and leaf.width() == head_size:
                rotation = _rotation(found, number, elements.leaves)
                if rotation is not None:
                    yield rotation


def _rotation(elements: list[Polynomial], source: int, leaves: list[Leaf]) -> Rotation | None:
    """Read elements that were rotated, and after them others that were not."""
    terms = []
    for lane, element in enumerate(elements):
        if element == {((source, lane),): 1.0}:
            break
        terms.append(_turned(element, source, lane))
    size = len(terms)
    copied = [{((source, lane),): 1.0} for lane in range(size, len(elements))]
    turned = [term for term in terms if term is not None]
    if len(turned) < size or not size or size % 2 or elements[size:] != copied:
        return None
    partners, signs, *angles = zip(*turned, strict=True)
    if any(len({number for number, _ in reads}) != 1 for reads in angles):
        return None
    cos, sin = (Angles(leaves[reads[0][0]], tuple(lane for _, lane in reads)) for reads in angles)
    for interleaved in (False, True):
        rotation = Rotation(leaves[source], cos, sin, interleaved, inverse=signs[0] > 0)
        expected: dict[int, Any] = {}
        for a, b in rotation.pairs():
            expected |= {a: (b, signs[0]), b: (a, -signs[0])}
        if all(expected[i] == x for i, x in enumerate(zip(partners, signs, strict=True))):
            return rotation
    return None


def _turned(element: Polynomial, source: int, lane: int) -> tuple[Any, ...] | None:
    """Read x[lane] cos + sign x[partner] sin as (partner, sign, element of cos, element of sin)."""
    own, other = None, None
    for reads, factor in element.items():
        if len(reads) != 2 or sum(number == source for number, _ in reads) != 1:
            return None
        (_, at), angle = sorted(reads, key=lambda read: read[0] != source)
        if at == lane and factor == 1 and own is None:
            own = angle
        elif at != lane and abs(factor) == 1 and other is None:
            other = (at, factor, angle)
        else:
            return None
    if own is None or other is None:
        return None
    partner, sign, angle = other
    return partner, sign, own, angle


def peeled(leaf: Leaf, dtype: torch.dtype) -> Leaf | None:
    """Return the furthest tensor of a dtype that a leaf is a view or an exact cast of, if any."""
    found = None
    width = leaf.width()
    whole = tuple(range(width))
    while leaf.width() == width:
        if value(leaf.node).dtype == dtype:
            found = leaf
        if leaf.node.target not in PEELED and not is_exact_cast(leaf.node):
            break
        step = through(leaf.node, leaf.index(whole), width)
        if step is None or lanes_of(step[1], width) != whole:
            break
        leaf = Leaf(step[0], layout_of(step[1]))
    return found
