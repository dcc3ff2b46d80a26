"""Read eager writes: index_put, scatter along one dimension, and copy to a slice or a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from torch_tkv.ops.checks import INDEX_DTYPES
from torch_tkv.passes.cache_versions import Write
from torch_tkv.passes.quantised import Cast, scale_dims, uncast
from torch_tkv.passes.views import View, arguments, same, same_by_guard, value

aten = torch.ops.aten


class NotSlotsError(Exception):
    """Why a write is none of tokens into slots, and what to change."""


@dataclass(frozen=True)
class Target:
    """`view[index] = tokens`.

    Attributes:
        tokens: [*grid, *dimensions of the view that are not indexed], of the value before its cast.
        index: by dimension of the view, what broadcasts to the grid; None for all rows, of which
            the grid has a dimension then.
        cast: how the tokens become what is written.
        scaled: the dimension of the view along which the scale varies.
        heads: the dimension of the view that holds heads, where the write tells.
    """

    view: View
    tokens: View
    index: dict[int, View | None]
    cast: Cast
    scaled: int | None = None
    heads: int | None = None

    @property
    def grid_rank(self) -> int:
        return len(self.tokens.shape) - len(self.view.shape) + len(self.index)


def halves(target: Target) -> list[Target]:
    """Split a stack of K and V, which has one dimension more than a cache."""
    view, tokens = target.view, target.tokens
    free = [dim for dim in range(len(view.shape) - 1) if dim not in target.index]
    stacks = [dim for dim in free if same(view.shape[dim], 2)]
    if len(view.shape) != 5 or not stacks or not target.index:
        return [target]
    dim = stacks[0]
    at = target.grid_rank + free.index(dim)
    cast = target.cast if target.scaled is None else Cast(target.cast.quotient)
    return [
        Target(
            view.select(dim, i),
            _unstacked(replace(tokens, base=cast.source), at, i),
            {d - (d > dim): index for d, index in target.index.items()},
            cast,
        )
        for i in range(2)
    ]


def _unstacked(tokens: View, dim: int, i: int) -> View:
    """Return row `i` of a dimension, of torch.stack without making the stack."""
    node, order = tokens.base, list(range(len(tokens.shape)))
    if tokens.steps and tokens.steps[0].kind == "permute":
        order = tokens.steps[0].args[0]
    # stack(parts, at) is reshape(cat(parts, at)).
    cat: Any = node.args[0] if node.target is aten.reshape.default else None
    if len(tokens.steps) > 1 or cat is None or cat.target is not aten.cat.default:
        return tokens.select(dim, i)
    args, at = arguments(cat), order[dim]
    shape = [size for d, size in enumerate(value(node).shape) if d != at]
    if args["dim"] % len(shape) != at or len(args["tensors"]) != 2:
        return tokens.select(dim, i)
    if not all(same(value(part).shape, shape) for part in args["tensors"]):
        return tokens.select(dim, i)
    return View(args["tensors"][i]).permute([d - (d > at) for d in order if d != at])


def _target(
    view: View, node: Node, shape: Sequence[Any], order: Sequence[int], **fields: Any
) -> Target:
    """Return the target of a value of `shape`, of which `order` says where Target has what.

    Where the bits of another dtype are written as they are, that dtype is what is written.
    """
    dtype = view.dtype or value(view.base).dtype
    if node.target is aten.view.dtype and value(node).dtype == dtype:
        source: Any = node.args[0]
        if value(source).dtype.itemsize == dtype.itemsize:
            node, dtype = source, value(source).dtype
            view = view.view_as(dtype)
    cast = uncast(node, dtype)
    if cast is None and value(node).dtype != dtype:
        raise NotSlotsError(f"a cast from {value(node).dtype} to {dtype}: clamp to its range first")
    cast = cast or Cast(node)
    tokens = View(cast.source)
    lead = len(shape) - len(tokens.shape)
    for _ in range(lead):  # an assignment drops leading dimensions of 1 from the value
        tokens = tokens.unsqueeze(0)
    if not same_by_guard(tokens.shape, shape):
        raise NotSlotsError("the value is broadcast: expand it to [tokens, Hkv, D]")
    target = Target(view, tokens.permute(order), cast=cast, **fields)
    varying = scale_dims(cast.scale, len(shape))
    if not varying:
        return target
    free = [dim for dim in range(len(view.shape)) if dim not in target.index]
    along = [order.index(dim) - target.grid_rank for dim in varying]
    if len(along) == 1 and along[0] >= 0:
        return replace(target, scaled=free[along[0]])
    unscaled = Cast(cast.quotient)
    return replace(target, tokens=replace(target.tokens, base=cast.quotient), cast=unscaled)


def _index_put(write: Write, first: Callable[[Node], Node]) -> Target:
    args = arguments(write.node)
    view, rank = write.view, len(write.view.shape)
    index = {dim: View(first(i)) for dim, i in enumerate(args["indices"]) if i is not None}
    if args["accumulate"]:
        raise NotSlotsError("accumulate=True adds to the cache")
    if any(value(i.base).dtype not in INDEX_DTYPES for i in index.values()):
        why = "the index is a mask: use int32 or int64 slots (slot < 0 wraps as usual)"
        raise NotSlotsError(why)
    grid = _broadcast([i.shape for i in index.values()])
    free = [dim for dim in range(rank) if dim not in index]
    # The grid stands where the indexed dimensions do, or in front if these are apart.
    dims = list(index)
    at = dims[0] if dims == [*range(dims[0], dims[-1] + 1)] else 0
    shape = [*(view.shape[d] for d in free[:at]), *grid, *(view.shape[d] for d in free[at:])]
    end = at + len(grid)
    order = [*range(at, end), *range(at), *range(end, len(shape))]
    return _target(view, args["values"], shape, order, index=index)


def _scatter(write: Write, first: Callable[[Node], Node]) -> Target:
    args = arguments(write.node)
    view, rank, dim, index = write.view, len(write.view.shape), args["dim"], args["index"]
    if value(index).dtype != torch.int64 or rank not in (3, 4):
        raise NotSlotsError(f"scatter_ into {rank} dimensions: expected 3 or 4")
    dim %= rank
    shape = list(value(index).shape)
    others = [d for d in range(rank - 1) if d != dim]
    source = View(index.args[0]) if index.target is aten.expand.default else View(index)
    for _ in range(rank - len(source.shape)):
        source = source.unsqueeze(0)
    heads = [d for d in others if same(source.shape[d], 1)]
    if dim == rank - 1 or not heads or not same(source.shape[-1], 1):
        raise NotSlotsError("scatter_ with an index for each element: expand one for each token")
    if not same(source.shape[dim], shape[dim]):
        raise NotSlotsError("scatter_ of several tokens into one slot")
    if not all(same_by_guard([shape[d]], [view.shape[d]]) for d in (*others, rank - 1)):
        raise NotSlotsError("scatter_ into a part of the cache: slice the cache first")
    slots = sorted({*others, dim} - {heads[-1]})
    order = [*slots, heads[-1], rank - 1]
    rows = source.select(rank - 1, 0).select(heads[-1], 0)
    indices = {d: View(first(rows.base), rows.steps) if d == dim else None for d in slots}
    return _target(view, args["src"], shape, order, index=indices, heads=heads[-1])


def _copy(write: Write, first: Callable[[Node], Node]) -> Target:
    view, node = write.view, arguments(write.node)["src"]
    if not any(step.kind in ("select", "slice") for step in view.steps):
        raise NotSlotsError("the whole tensor is written: write the slots of new tokens only")
    ranks = [len(value(view.base).shape), *(len(step.shape) for step in view.steps)]
    rank = len(view.shape)
    if max(ranks) < 3 or not 2 <= rank <= 4:
        raise NotSlotsError(f"a copy to a part of {rank} dimensions: expected [..., Hkv, D]")
    shape = list(view.shape)
    sliced = set()
    for step in reversed(view.steps):
        if step.kind != "slice":
            break
        sliced.add(step.args[0])
    if rank == 2:  # one token
        view, shape = view.unsqueeze(0), [1, *shape]
    # Of [B, S, Hkv, D] and [B, Hkv, S, D], the slice tells: positions are sliced, heads are not.
    heads = len(shape) - 2
    if heads in sliced and heads - 1 not in sliced:
        heads -= 1
    return _target(view, node, shape, range(len(shape)), index={}, heads=heads)


def _broadcast(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the shape that index tensors broadcast to."""
    rank = max(map(len, shapes))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((n for n in sizes if not same(n, 1)), 1) for sizes in zip(*padded, strict=True)]


READERS: dict[Any, Callable[[Write, Callable[[Node], Node]], Target]] = {
    aten.index_put.default: _index_put,
    aten.scatter.src: _scatter,
    aten.copy.default: _copy,
    # Inductor drops a copy that changes nothing on its way into one of these.
    aten.select_scatter.default: _copy,
    aten.slice_scatter.default: _copy,
}
