"""Recognise the RMSNorm of heads by what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_tkv.ops.checks import FLOAT_DTYPES
from torch_tkv.passes.elements import Elements, cone
from torch_tkv.passes.indices import (
    Index,
    Lanes,
    Leaf,
    UnreadError,
    is_exact_cast,
    progression,
)
from torch_tkv.passes.rotation import PEELED, peeled
from torch_tkv.passes.views import arguments, value

aten = torch.ops.aten


@dataclass(frozen=True)
class HeadNorm:
    """`source / sqrt(mean(source ** 2) + eps) * weight`, over the lanes of the source.

    Attributes:
        columns: which lanes of the weight are those of a head.
        weight_plus_one: times 1 + weight.
    """

    source: Leaf
    weight: Leaf
    columns: slice
    eps: float
    weight_plus_one: bool


def head_norm(leaf: Leaf, dtype: torch.dtype, first: dict[Node, Node]) -> HeadNorm | None:
    """Return the norm of a source of `dtype` that the leaf is, if it is one."""
    for node in cone(leaf.node):
        if _under_root(node) is not None and (found := _norm_by(node, leaf, dtype, first)):
            return found
    return None


def eps_is_an_input(leaf: Leaf) -> bool:
    """Whether a leaf is a norm whose eps is no constant: dynamic=True makes floats inputs."""
    for node in cone(leaf.node):
        shifted = _under_root(node)
        if getattr(shifted, "target", None) is aten.add.Tensor:
            mean, eps = shifted.args
            return mean.target is aten.mean.dim and isinstance(eps, Node)
    return False


def _norm_by(
    rsqrt: Node, leaf: Leaf, dtype: torch.dtype, first: dict[Node, Node]
) -> HeadNorm | None:
    """Read the norm whose denominator `rsqrt` inverts."""
    mean, eps = _sum_with_number(_under_root(rsqrt))
    if eps is None or mean.target is not aten.mean.dim:
        return None
    squares = mean.args[0]
    x = squares.args[0]
    while x.target in PEELED or is_exact_cast(x):
        x = x.args[0]
    size = leaf.width()
    elements = Elements({x, rsqrt}, size, {dtype, torch.float32}, first)
    try:
        normed = elements(leaf.node, leaf.index(range(size)))
        number = {found.node: i for i, found in enumerate(elements.leaves)}
        if len(elements.leaves) != 3 or not {x, rsqrt} < set(number):
            return None
        scale = elements.leaves[number[rsqrt]]
        squared = elements(squares, _before_mean(mean, scale, size))
    except UnreadError:
        return None
    w = 3 - number[x] - number[rsqrt]
    lanes: list[int] = []
    for lane in range(size):
        read = (number[x], lane)
        lanes += [at for reads in normed[lane] for leaf_number, at in reads if leaf_number == w]
        if len(lanes) != lane + 1:
            return None
        reads = sorted((read, (number[rsqrt], 0), (w, lanes[lane])))
        if normed[lane] != {tuple(reads): 1.0} or squared[lane] != {(read, read): 1.0}:
            return None
    source = peeled(elements.leaves[number[x]], dtype)
    weight, plus_one = _weight(elements.leaves[w])
    columns = progression(lanes)
    if source is None or weight.axes() or columns is None:
        return None
    if value(weight.node).dtype not in FLOAT_DTYPES:
        return None
    return HeadNorm(source, weight, columns, eps, plus_one)


def _before_mean(mean: Node, scale: Leaf, size: int) -> Index:
    """Return where the elements lie that a mean of `size` elements is of."""
    args = arguments(mean)
    rank = value(mean.args[0]).dim()
    if args["dim"] is None or len(args["dim"]) != 1:
        raise UnreadError
    dim = args["dim"][0] % rank
    index = list(scale.index((0,) * size))
    index[dim : dim + args["keepdim"]] = [(Lanes(tuple(range(size)), size),)]
    if value(mean.args[0]).shape[dim] != size:
        raise UnreadError
    return tuple(index)


def _weight(leaf: Leaf) -> tuple[Leaf, bool]:
    """Return the weight, and whether the leaf is 1 + weight."""
    weight, one = _sum_with_number(leaf.node)
    if one != 1:
        return leaf, False
    while is_exact_cast(weight):
        weight = weight.args[0]
    return Leaf(weight, leaf.layout), True


def _under_root(node: Node) -> Any:
    """Return x where a node is 1 / sqrt(x), else None."""
    if node.target is aten.rsqrt.default or (
        node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5
    ):
        return node.args[0]
    return None


def _sum_with_number(node: Any) -> tuple[Any, float | None]:
    """Return x and c of a node x + c or c + x; the node and None where it is neither."""
    sums = (aten.add.Tensor, aten.add.Scalar)
    if isinstance(node, Node) and node.target in sums and not node.kwargs:
        for x, number in (node.args, node.args[::-1]):
            if isinstance(x, Node) and isinstance(number, int | float):
                return x, number
    return node, None
