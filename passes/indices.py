"""Where an element of a tensor lies in the tensor that this is a view of."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from torch_tkv.passes.views import RESHAPES, SPLITS, Step, same, split_steps, value, view_step

aten, prims = torch.ops.aten, torch.ops.prims

# Note [Where an element lies]
# An Index says for every dimension of a tensor where an element lies, in digits of mixed radix, the
# most significant first. A digit is an Axis, any token or head, or Lanes, a number for each of the
# elements that are followed at once. So reshape regroups digits, permute reorders dimensions, and
# slice and select compute with the numbers; sizes of tokens and heads may be symbolic. Digits of
# size 1 are dropped. A complex tensor has one more dimension here, of size 2.

CASTS = (prims.convert_element_type.default,)
SAME_INDEX = (
    *CASTS,
    aten.clone.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
)
VIEWS = (*RESHAPES, aten.permute.default, aten.select.int, aten.slice.Tensor)


class UnreadError(Exception):
    """An element is computed in a way that is not followed."""


@dataclass(frozen=True)
class Axis:
    """Any index of a dimension of `size`, or its quotient or remainder by a number."""

    name: Any
    size: Any = field(compare=False)

    @property
    def origin(self) -> Axis:
        """Return the axis that this one is part of."""
        return self._parts()[0]

    @property
    def digit(self) -> tuple[bool, ...]:
        """Return a key that sorts the parts of one axis, the most significant first."""
        return self._parts()[1]

    def _parts(self) -> tuple[Axis, tuple[bool, ...]]:
        match self.name:
            case (Axis() as whole, part, _):
                origin, digit = whole._parts()
                return origin, (*digit, part == "%")
        return self, ()

    def split(self, low: Any) -> tuple[Axis, Axis]:
        """Return the quotient and the remainder by `low`."""
        key = str(low)
        return Axis((self, "//", key), self.size // low), Axis((self, "%", key), low)


@dataclass(frozen=True)
class Lanes:
    """An index into a dimension of `size` for each element of a head."""

    at: tuple[int, ...]
    size: int

    def split(self, low: int) -> tuple[Lanes, Lanes]:
        """Return the quotient and the remainder by `low`."""
        return (
            Lanes(tuple(i // low for i in self.at), self.size // low),
            Lanes(tuple(i % low for i in self.at), low),
        )


Digit = Axis | Lanes
Index = tuple[tuple[Digit, ...], ...]
# An index without the numbers: the sizes of lanes stand for them.
Layout = tuple[tuple[Axis | int, ...], ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor of which elements are read, and where the axes and lanes are in it."""

    node: Node
    layout: Layout

    def axes(self) -> list[Axis]:
        return [digit for dim in self.layout for digit in dim if isinstance(digit, Axis)]

    def width(self) -> int:
        """Return how many lanes it has."""
        width = 1
        for dim in self.layout:
            for digit in dim:
                width *= digit if isinstance(digit, int) else 1
        return width

    def index(self, lanes: Sequence[int]) -> Index:
        """Return the index of lanes of the leaf."""
        digits: list[tuple[Digit, ...]] = []
        rest = Lanes(tuple(lanes), self.width())
        for dim in reversed(self.layout):
            group: list[Digit] = []
            for digit in reversed(dim):
                if isinstance(digit, int):
                    rest, low = rest.split(digit)
                    group.insert(0, low)
                else:
                    group.insert(0, digit)
            digits.insert(0, tuple(group))
        return tuple(digits)


def layout_of(index: Index) -> Layout:
    layout: list[tuple[Axis | int, ...]] = []
    for dim in index:
        digits: list[Axis | int] = []
        for digit in dim:
            last = digits[-1] if digits else None
            if isinstance(digit, Lanes) and isinstance(last, int):
                digits[-1] = last * digit.size
            else:
                digits.append(digit.size if isinstance(digit, Lanes) else digit)
        layout.append(tuple(digits))
    return tuple(layout)


def lanes_of(index: Index, lanes: int) -> tuple[int, ...]:
    """Return which lanes of a leaf an index reads."""
    found = [digit for dim in index for digit in dim if isinstance(digit, Lanes)]
    return numbers(found, lanes) or ()


def is_exact_cast(node: Node) -> bool:
    """Whether a node makes all numbers of one floating type those of another."""
    if node.target not in CASTS:
        return False
    old, new = value(node.args[0]).dtype, value(node).dtype
    return bool(old.is_floating_point and torch.promote_types(old, new) == new)


def through(node: Node, index: Index, lanes: int) -> tuple[Node, Index] | None:
    """Return what a view or a cast is of, and where in that `index` lies; None if it is neither."""
    source: Any = node.args[0] if node.args else None
    target: Any = node.target
    if target is operator.getitem and source.target in SPLITS:
        split, source = source, source.args[0]
        steps = split_steps(split, value(source).shape)
        step = steps[node.args[1]] if steps else None  # type: ignore[index]
    elif target in SAME_INDEX:
        casts_complex = target in CASTS and value(source).is_complex() != value(node).is_complex()
        return None if casts_complex else (source, index)
    elif target is aten.expand.default:
        return source, broadcast(source, node, index)
    else:
        step = view_step(node, value(source).shape) if target in VIEWS else None
    if step is None:
        return None
    dims, part = dims_and_part(node, index)
    found = _before(step, dims, value(source).shape, lanes)
    return None if found is None else (source, (*found, *part))


def _before(step: Step, dims: Index, shape: Sequence[Any], lanes: int) -> Index | None:
    """Return where an index of a view lies in the tensor of `shape` that it is of."""
    if step.kind == "reshape":
        return _regrouped([digit for dim in dims for digit in dim], shape)
    if step.kind == "permute":
        (order,) = step.args
        return tuple(dims[order.index(dim)] for dim in range(len(order)))
    dim, start, *rest = step.args
    if step.kind == "select":
        if not isinstance(start, int) or not isinstance(shape[dim], int):
            return None
        return (*dims[:dim], as_dim(Lanes((start,) * lanes, shape[dim])), *dims[dim:])
    if same(step.shape[dim], shape[dim]):
        return dims
    stride = rest[1]
    if not all(isinstance(x, int) for x in (start, stride, shape[dim])):
        return None
    at = numbers(dims[dim], lanes)
    if at is None:
        return None
    moved = Lanes(tuple(start + stride * i for i in at), shape[dim])
    return (*dims[:dim], as_dim(moved), *dims[dim + 1 :])


def dims_and_part(node: Node, index: Index) -> tuple[Index, Index]:
    """Separate the dimensions of a tensor from the one that a complex tensor has more."""
    rank = value(node).dim()
    return index[:rank], index[rank:]


def broadcast(arg: Any, node: Node, index: Index) -> Index:
    """Return where an index of a broadcast result lies in the operand `arg`."""
    if not isinstance(arg, Node):
        return ()
    (dims, part), shape = dims_and_part(node, index), value(arg).shape
    if part and not value(arg).is_complex():
        raise UnreadError
    dims = dims[len(dims) - len(shape) :]
    result = value(node).shape[len(value(node).shape) - len(shape) :]
    kept: list[tuple[Digit, ...]] = []
    for digits, size, whole in zip(dims, shape, result, strict=True):
        if not same(size, 1) and not same(size, whole):
            raise UnreadError
        kept.append(() if same(size, 1) else digits)
    return (*kept, *part)


def _regrouped(digits: Sequence[Digit], shape: Sequence[Any]) -> Index | None:
    """Group digits to dimensions of the given sizes, of which the product is theirs."""
    left, index = list(digits), list[tuple[Digit, ...]]()
    for size in reversed(shape[1:]):
        group: list[Digit] = []
        while not same(size, 1):
            if not left:
                return None
            digit = left.pop()
            if _divides(digit.size, size):
                group.insert(0, digit)
                size = size // digit.size
            elif _divides(size, digit.size):
                high, low = digit.split(size)
                left.append(high)
                group.insert(0, low)
                size = 1
            else:
                return None
        index.insert(0, _merged(group))
    if not shape:
        return () if not left else None
    first = _merged(left)
    if len(first) == 1 and isinstance(first[0], Axis):
        first = _merged([Axis(first[0].name, shape[0])])  # simpler than a quotient of symbols
    return (first, *index)


def _divides(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return b % a == 0
    return same(a, b) or same(b // a * a, b)


def _merged(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """Put quotients and remainders of an axis together again, and drop digits of size 1."""
    merged: list[Digit] = []
    for digit in digits:
        while merged and (whole := _whole(merged[-1], digit)):
            merged.pop()
            digit = whole
        if not same(digit.size, 1):
            merged.append(digit)
    return tuple(merged)


def _whole(high: Digit, low: Digit) -> Axis | None:
    """Return the axis that two digits are halves of."""
    match high, low:
        case Axis(name=(Axis() as axis, "//", by)), Axis(name=(other, "%", same_by)):
            return axis if (axis, by) == (other, same_by) else None
    return None


def as_dim(lanes: Lanes) -> tuple[Digit, ...]:
    return () if lanes.size == 1 else (lanes,)


def numbers(digits: Sequence[Digit], lanes: int) -> tuple[int, ...] | None:
    """Return the numbers that digits stand for; None where one is an axis."""
    found = [digit for digit in digits if isinstance(digit, Lanes)]
    if len(found) < len(digits):
        return None
    at = (0,) * lanes
    for digit in found:
        at = tuple(high * digit.size + low for high, low in zip(at, digit.at, strict=True))
    return at


def progression(lanes: Sequence[int]) -> slice | None:
    """Return the slice that takes these lanes, in this order, if there is one."""
    step = lanes[1] - lanes[0] if len(lanes) > 1 else 1
    if step < 1 or list(lanes) != list(range(lanes[0], lanes[-1] + 1, step)):
        return None
    return slice(lanes[0], lanes[-1] + 1, step)
