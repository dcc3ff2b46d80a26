"""Read an index_put as a write of tokens into the slots of a cache [N, P, Hkv, D]."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_eq
from torch.fx.node import map_arg

from torch_tkv.passes.cache_versions import CacheVersions, Write
from torch_tkv.passes.views import Step, View, arguments, call, permute, same, value

aten, prims = torch.ops.aten, torch.ops.prims

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
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


@dataclass(frozen=True, eq=False)
class SlotWrite:
    """`cache[index] = tokens`, where the cache is [N, P, Hkv, D] and tokens are [..., Hkv, D].

    Attributes:
        index: the node of the slots, or those of the blocks and of the offsets.
    """

    write: Write
    cache: View
    tokens: Node
    index: tuple[Node, ...]

    @property
    def writes(self) -> tuple[Write]:
        return (self.write,)

    def operands(self) -> list[Node]:
        return [self.tokens, *self.index, *self.cache.operands()]

    def fits(self, other: SlotWrite) -> bool:
        """Whether one operator can do both writes."""
        return (
            self.index == other.index
            and value(self.tokens).dtype == value(other.tokens).dtype
            and self.cache.disjoint(other.cache)
            and _equal(self.cache.shape[:3], other.cache.shape[:3])
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


def slot_write(write: Write, caches: CacheVersions, first: SameValues) -> SlotWrite | str:
    """Return what `write` writes where, or why the operator cannot do the same."""
    if write.node.target is aten.as_strided_scatter.default:
        return "two inputs are views that interleave in one storage: pass what they are views of"
    if write.node.target is not aten.index_put.default:
        return f"{write.node.target} is no write by index: use cache[slots] = x or index_copy_"
    args = arguments(write.node)
    indices, tokens = args["indices"], args["values"]
    index = [i for i in indices if i is not None]
    if args["accumulate"]:
        return "accumulate=True adds to the cache"
    if any(value(i).dtype not in INDEX_DTYPES for i in index):
        return "the index is a mask: use int32 or int64 slots (slot < 0 wraps as usual)"
    if any(caches.mutated(view.base) for view in map(caches.view, [tokens, *index]) if view):
        return "the written value or its index is itself a view of a mutated tensor"
    view = _slot_major(write.view, indices)
    if isinstance(view, str):
        return view
    shapes = [[*value(i).shape, *view.shape[-2:]] for i in index]
    # An assignment drops leading dimensions of 1 from the value.
    ones = [1] * (len(shapes[0]) - value(tokens).dim())
    if not all(_equal([*ones, *value(tokens).shape], shape) for shape in shapes):
        return "the value is broadcast: expand it to [tokens, Hkv, D]"
    if len(index) == 1:
        view, index = _paged(view), [first(index[0])]
    else:
        index = _as_slots(first(index[0]), first(index[1]), view.shape[1])
    reason = _storage(view, tokens, index)
    return reason or SlotWrite(write, view, tokens, tuple(index))


def is_cache_like(write: Write) -> bool:
    """Whether a write that is left alone is worth a line in the report."""
    return len(write.view.shape) > 2 or write.node.target is aten.as_strided_scatter.default


def _slot_major(view: View, indices: Sequence[Node | None]) -> View | str:
    """Return the view with its indexed dimensions in front: [slots, Hkv, D] or [N, P, Hkv, D]."""
    rank, indexed = len(view.shape), [dim for dim, i in enumerate(indices) if i is not None]
    if indexed[0] != 0:
        return "the first dimension is not indexed: the cache must be [slots or blocks, ...]"
    if len(indexed) > 2 or rank != len(indexed) + 2:
        return (
            f"{len(indexed)} index tensors into {rank} dimensions: expected cache[slots] of "
            "[slots, Hkv, D], or cache[blocks, offsets] of [N, P, Hkv, D] in any order"
        )
    order = [*indexed, *(dim for dim in range(rank) if dim not in indexed)]
    return view.then(permute(order, [view.shape[dim] for dim in order]))


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are equal, here and by a guard on later calls.

    index_put guards on nothing, so sizes that have to be equal often carry unrelated symbols.
    """
    return len(a) == len(b) and bool(guard_or_false(sym_eq(tuple(a), tuple(b))))


def _paged(view: View) -> View:
    """Undo the `.view(-1, Hkv, D)` of a [N, P, Hkv, D] cache; else take slots as blocks of one."""
    for whole in view.reshapes():
        if len(whole.shape) == 4 and same(whole.shape[2:], view.shape[1:]):
            return whole
    shape = [view.shape[0], 1, *view.shape[1:]]
    return view.then(Step("reshape", aten.unsqueeze.default, (1,), shape))


def _as_slots(blocks: Node, offsets: Node, block_size: Any) -> list[Node]:
    """Return [slots] where blocks and offsets are slots // P and slots % P, else both."""
    slots, divisor = _operands(blocks, QUOTIENTS)
    if slots is None or (slots, divisor) != _operands(offsets, REMAINDERS):
        return [blocks, offsets]
    return [slots] if same(divisor, block_size) else [blocks, offsets]


def _operands(node: Node, ops: dict[Any, Callable[[int], int]]) -> tuple[Any, Any]:
    """Return (x, n) where the node is x // n, or x % n, by one of `ops`."""
    if node.target not in ops or node.kwargs.get("rounding_mode", "floor") != "floor":
        return None, None
    x, n = node.args
    if not isinstance(value(n), int | torch.SymInt):
        return None, None
    return x, ops[node.target](n) if isinstance(n, int) else n


def _storage(view: View, tokens: Node, index: Sequence[Node]) -> str | None:
    """Say why the operator cannot write these tensors, if it cannot."""
    base = value(view.base)
    with base.fake_mode:
        cache = view.replay(base)
    if cache.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return "the cache is reshaped into a copy: index it in the order in which it lies"
    if not same(cache.stride(-1), 1):
        return "the last stride of the cache is not 1: keep the head size contiguous"
    if cache.dtype not in DTYPES or value(tokens).dtype != cache.dtype:
        return f"the operator does not write {value(tokens).dtype} into {cache.dtype}"
    if any(value(arg).device != cache.device for arg in (tokens, *index)):
        return "the value, the index and the cache lie on different devices"
    return None


def emit(graph: Graph, k: SlotWrite, v: SlotWrite, slots: dict[Hashable, Node]) -> Node:
    """Insert the operator that does both writes; `slots` holds slot_mappings to share."""
    shape = tuple(map(str, k.cache.shape[:2]))
    if (k.index, shape) not in slots:
        slots[k.index, shape] = _slot_mapping(graph, k)
    return graph.call_function(
        torch.ops.tkv.reshape_and_cache.default,
        (
            _rows(graph, k.tokens, 3),
            _rows(graph, v.tokens, 3),
            k.cache.build(graph),
            v.cache.build(graph),
            slots[k.index, shape],
        ),
        {"wrap": len(k.index) == 1},
    )


def _rows(graph: Graph, node: Node, rank: int) -> Node:
    """Flatten the leading dimensions to one, and have a last stride of 1."""
    if value(node).dim() != rank:
        sizes = [_size(graph, node, dim) for dim in range(1 - rank, 0)]
        node = call(graph, aten.reshape.default, node, [-1, *sizes])
    if rank > 1 and not same(value(node).stride(-1), 1):
        node = call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
    return node


def _slot_mapping(graph: Graph, write: SlotWrite) -> Node:
    """Insert the computation of the slots [T] of a write.

    Blocks and offsets wrap one by one, as in eager indexing. An offset out of range makes a slot
    that is out of range, and not one of another block.
    """
    index = [_rows(graph, node, 1) for node in write.index]
    if len(index) == 1:
        return index[0]
    cache = write.cache.build(graph)
    num_blocks, block_size = _size(graph, cache, 0), _size(graph, cache, 1)
    blocks, offsets = _wrap(graph, index[0], num_blocks), _wrap(graph, index[1], block_size)
    slots = call(graph, aten.mul.Tensor, blocks, block_size)
    slots = call(graph, aten.add.Tensor, slots, offsets)
    remainder = call(graph, aten.remainder.Scalar, offsets, block_size)
    inside = call(graph, aten.eq.Tensor, remainder, offsets)
    options = {"dtype": torch.int64, "device": value(slots).device, "pin_memory": False}
    outside = call(graph, aten.full.default, [], torch.iinfo(torch.int64).max, **options)
    return call(graph, aten.where.self, inside, slots, outside)


def _wrap(graph: Graph, index: Node, size: int | Node) -> Node:
    if value(index).dtype != torch.int64:
        index = call(graph, prims.convert_element_type.default, index, torch.int64)
    negative = call(graph, aten.lt.Scalar, index, 0)
    return call(graph, aten.where.self, negative, call(graph, aten.add.Tensor, index, size), index)


def _size(graph: Graph, node: Node, dim: int) -> int | Node:
    size = value(node).shape[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim)
