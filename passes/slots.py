"""Read an eager write as one of tokens into the slots of a cache [N, P, Hkv, D]."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from torch_tkv.ops.checks import CACHE_DTYPES, has_e4m3fn
from torch_tkv.passes.cache_versions import CacheVersions, Write
from torch_tkv.passes.quantised import FLOATS, Cast
from torch_tkv.passes.targets import READERS, NotSlotsError, Target, halves
from torch_tkv.passes.views import RESHAPES, View, same, same_by_guard, value

aten = torch.ops.aten

# float8_e4m3fn tokens are cast to bfloat16 and back, which changes none of their values.
TOKEN_DTYPES = (*FLOATS, torch.float8_e4m3fn)
# What computes x // n and x % n, rounded down, and n from the second operand of each.
QUOTIENTS: dict[Any, Callable[[int], int]] = {
    aten.div.Tensor_mode: lambda n: n,
    aten.floor_divide.default: lambda n: n,
    aten.__rshift__.Scalar: lambda shift: 1 << shift,
    aten.bitwise_right_shift.Tensor_Scalar: lambda shift: 1 << shift,
}
REMAINDERS: dict[Any, Callable[[int], int]] = {
    aten.remainder.Scalar: lambda n: n,
    aten.bitwise_and.Scalar: lambda mask: mask + 1 if mask & (mask + 1) == 0 else 0,
}

# Note [Grids of slots]
# A write goes to a grid of slots: its tokens are [*grid, Hkv, D] once dimensions are in order.
# The cache has one or two dimensions of slots, in front when in order too, and each has an index: a
# view that broadcasts to the grid, or None for all rows, along a grid dimension of their own.
#   cache[slots] = k                 [S, Hkv, D]       grid [T]      (slots,)
#   cache[blocks, offsets] = k       [N, P, Hkv, D]    grid [T]      (blocks, offsets)
#   cache.index_copy_(2, pos, k)     [B, Hkv, S, D]    grid [B, T]   (None, pos)
#   cache[blocks] = pages            [N, P, Hkv, D]    grid [T, P]   (blocks[:, None], None)
#   cache[:, 3:5] = k                [B, 2, Hkv, D]    grid [B, 2]   (None, None)


@dataclass(frozen=True, eq=False)
class SlotWrite:
    """`cache[index] = tokens / scale`; see Note [Grids of slots].

    Attributes:
        cache: [N, P, Hkv, D].
        tokens: [*grid, Hkv, D].
        index: the slots, or the blocks and the offsets.
        cast: how the tokens become what is written; its scale is one number or one for each head.
    """

    write: Write
    cache: View
    tokens: View
    index: tuple[View | None, ...]
    cast: Cast

    @property
    def writes(self) -> tuple[Write, ...]:
        return (self.write,)

    def results(self) -> list[Node]:
        return []

    def operands(self) -> list[Node]:
        views = [self.tokens, *filter(None, self.index)]
        nodes = [view.base for view in views] + [x for view in views for x in view.operands()]
        nodes += [self.cast.scale] if isinstance(self.cast.scale, Node) else []
        return nodes + self.cache.operands()

    def fits(self, other: SlotWrite) -> bool:
        """Whether one operator can do both writes."""
        return (
            self.index == other.index
            and self.cache.disjoint(other.cache)
            and same_by_guard(self.cache.shape[:3], other.cache.shape[:3])
            and same_by_guard(self.tokens.shape[:-2], other.tokens.shape[:-2])
        )


class SameValues:
    """Maps each node to the first seen that computes the same: inference graphs know no CSE."""

    def __init__(self) -> None:
        self._first: dict[Hashable, Node] = {}

    def __call__(self, node: Node) -> Node:
        pure = isinstance(node.target, torch._ops.OpOverload) and not (
            node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if not pure:
            return node
        args, kwargs = map_arg((node.args, node.kwargs), self)
        return self._first.setdefault((node.target, value(node).dtype, args, str(kwargs)), node)


def slot_writes(write: Write, caches: CacheVersions, first: SameValues) -> list[SlotWrite]:
    """Return what `write` writes where: one write, or the two of a stack of K and V.

    Raises:
        NotSlotsError: no operator can do the same.
    """
    read = READERS.get(write.node.target)
    if write.node.target is aten.as_strided_scatter.default:
        why = "two inputs are views that interleave in one storage: pass what they are views of"
        raise NotSlotsError(why)
    if not is_cache_like(write):
        raise NotSlotsError("the tensor has no dimension of heads")
    if read is None:
        text = f"{write.node.target} is no write by index: use cache[slots] = x or index_copy_"
        raise NotSlotsError(text)
    target = read(write, first)
    nodes = [target.tokens.base, *(view.base for view in target.index.values() if view)]
    if any(caches.mutated(view.base) for node in nodes for view in caches.shown(node)):
        raise NotSlotsError("the written value or its index is itself a view of a mutated tensor")
    return [_slot_write(write, half) for half in halves(target)]


def is_cache_like(write: Write) -> bool:
    """Whether a write goes to what was a tensor of slots, heads and head size at some time."""
    view, target = write.view, write.node.target
    ranks = [len(value(view.base).shape), *(len(step.shape) for step in view.steps)]
    return max(ranks) > 2 or target is aten.as_strided_scatter.default


def _slot_write(write: Write, target: Target) -> SlotWrite:
    view, tokens, index = target.view, target.tokens, dict(target.index)
    rank, last = target.grid_rank, len(view.shape) - 1
    free = [dim for dim in range(last) if dim not in index]
    if last in index or not 1 <= last - min(len(free), 1) <= 2:
        raise NotSlotsError(_EXPECTED.format(len(index), last + 1))
    if not free:  # no heads: one of the whole row
        view, tokens = view.unsqueeze(last), tokens.unsqueeze(rank)
        free, heads, last = [last], last, last + 1
    heads = free[-1] if target.heads is None else target.heads
    slots = [dim for dim in range(last) if dim != heads]
    place = {dim: rank + i for i, dim in enumerate([*free, last])}
    grid: list[int] = []
    for dim in slots:
        grid += [place[dim]] if dim in place else [i for i in range(rank) if i not in grid]
    cast = target.cast
    if target.scaled not in (None, heads):
        cast, tokens = Cast(cast.quotient), replace(tokens, base=cast.quotient)
    tokens = tokens.permute([*grid, place[heads], place[last]])
    view = view.permute([*slots, heads, last])
    indices = [index.get(dim) for dim in slots]
    if len(slots) == 2 and slots[1] in place and indices[0] is not None:
        indices[0] = indices[0].unsqueeze(len(indices[0].shape))
    if len(slots) == 1:
        view = _paged(view)
    elif indices[0] is not None and indices[1] is not None:
        indices = _as_slots(indices[0], indices[1], view.shape[1])
    elif same(view.shape[0], 1) and indices[0] is None and indices[1] is not None:
        indices = indices[1:]  # one row of slots
    indices = [None if i is None else _canonical(i) for i in indices]
    _require_written(view, cast.source, indices)
    return SlotWrite(write, view, tokens, tuple(indices), cast)


_EXPECTED = (
    "{} indices into {} dimensions: expected cache[slots] of [slots, Hkv, D], "
    "cache[blocks, offsets] "
    "of [N, P, Hkv, D], or cache[:, positions] of [B, S, Hkv, D], in any order"
)


def _canonical(index: View) -> View:
    """Return an index seen from what it was before dimensions of size 1 came and went."""
    sizes = [n for n in index.shape if not same(n, 1)]
    if len(sizes) != 1:
        return index
    root = index.base
    while root.target in RESHAPES:
        before: Any = root.args[0]
        if not same([n for n in value(before).shape if not same(n, 1)], sizes):
            break
        root = before
    if value(root).dim() != 1:
        return index
    view = View(root)
    for _ in range(next(i for i, n in enumerate(reversed(index.shape)) if not same(n, 1))):
        view = view.unsqueeze(len(view.shape))
    return view


def _paged(view: View) -> View:
    """Undo the `.view(-1, Hkv, D)` of a [N, P, Hkv, D] cache; else take slots as blocks of one."""
    for whole in view.reshapes():
        if len(whole.shape) == 4 and same(whole.shape[2:], view.shape[1:]):
            return whole
    return view.unsqueeze(1)


def _as_slots(blocks: View, offsets: View, block_size: Any) -> list[View | None]:
    """Return [slots] where blocks and offsets are slots // P and slots % P, else both."""
    slots, divisor = _operands(blocks.base, QUOTIENTS)
    if slots is None or (slots, divisor) != _operands(offsets.base, REMAINDERS):
        return [blocks, offsets]
    if blocks.steps != offsets.steps or not same(divisor, block_size):
        return [blocks, offsets]
    return [replace(blocks, base=slots)]


def _operands(node: Node, ops: dict[Any, Callable[[int], int]]) -> tuple[Any, Any]:
    """Return (x, n) where the node is x // n, or x % n, by one of `ops`."""
    if node.target not in ops or node.kwargs.get("rounding_mode", "floor") != "floor":
        return None, None
    x, n = node.args
    if not isinstance(value(n), int | torch.SymInt):
        return None, None
    return x, ops[node.target](n) if isinstance(n, int) else n


def _require_written(view: View, source: Node, index: Sequence[View | None]) -> None:
    """Raise where the operator cannot write these tensors."""
    base = value(view.base)
    with base.fake_mode:
        cache = view.replay(base)
    if cache.untyped_storage()._cdata != base.untyped_storage()._cdata:
        why = "the cache is reshaped into a copy: index it in the order in which it lies"
    elif not same(cache.stride(-1), 1):
        why = "the last stride of the cache is not 1: keep the head size contiguous"
    elif value(source).dtype == torch.float8_e5m2:
        why = "a cast to float8_e5m2 overflows to infinity: clamp to its range first"
    elif cache.dtype not in CACHE_DTYPES or value(source).dtype not in TOKEN_DTYPES:
        why = f"the operator does not write {value(source).dtype} into {cache.dtype}"
    elif cache.dtype == torch.float8_e4m3fn and not has_e4m3fn(cache.device):
        why = "this GPU has no float8_e4m3fn: use float8_e5m2"
    elif any(value(x).device != cache.device for x in (source, *(i.base for i in index if i))):
        why = "the value, the index and the cache lie on different devices"
    else:
        return
    raise NotSlotsError(why)
