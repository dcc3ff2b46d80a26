"""The operators that take the place of writes: what they read and write, and where they go."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import Write
from torch_tkv.passes.quantised import FLOATS, scale_tensor
from torch_tkv.passes.slot_mapping import slot_mapping
from torch_tkv.passes.slots import SlotWrite
from torch_tkv.passes.views import calculate, call, same, size_node, value

aten, prims, tkv = torch.ops.aten, torch.ops.prims, torch.ops.tkv


class Operator(Protocol):
    """What is inserted for some writes."""

    @property
    def writes(self) -> tuple[Write, ...]: ...

    @property
    def fused(self) -> str:
        """What the report calls it."""

    @property
    def note(self) -> str | None:
        """What else the report says."""

    def operands(self) -> list[Node]: ...

    def results(self) -> list[Node]:
        """Return the nodes that it takes the place of, other than writes."""

    def emit(self, graph: Graph, padding: str, slots: dict[Hashable, Node]) -> Node:
        """Insert it; `slots` holds slot_mappings to share."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A write of K and one of V by the same index."""

    key: SlotWrite
    value: SlotWrite

    @property
    def writes(self) -> tuple[Write, ...]:
        return self.key.write, self.value.write

    @property
    def fused(self) -> str:
        return "cache write"

    @property
    def note(self) -> str | None:
        return _rounding(self.key, self.value)

    def operands(self) -> list[Node]:
        return self.key.operands() + self.value.operands()

    def results(self) -> list[Node]:
        return []

    def emit(self, graph: Graph, padding: str, slots: dict[Hashable, Node]) -> Node:
        key, value_ = rows(graph, self.key), rows(graph, self.value)
        if value(key).dtype != value(value_).dtype:
            key, value_ = (_cast(graph, node, torch.float32) for node in (key, value_))
        mapping, wrap = slot_mapping(graph, self.key, padding, slots)
        return _insert(
            graph,
            tkv.reshape_and_cache.default,
            (
                key,
                value_,
                self.key.cache.build(graph),
                self.value.cache.build(graph),
                mapping,
                *_scales(graph, self.key, self.value),
            ),
            {"wrap": wrap},
        )


@dataclass(frozen=True, eq=False)
class Alone:
    """A write of K or of V, or of both side by side in the head size.

    One operator writes both, so it is given the two parts of each head: packed as K | V are.
    """

    write: SlotWrite

    @property
    def writes(self) -> tuple[Write, ...]:
        return self.write.writes

    @property
    def fused(self) -> str:
        return "cache write of one tensor"

    @property
    def note(self) -> str | None:
        return _rounding(self.write)

    def operands(self) -> list[Node]:
        return self.write.operands()

    def results(self) -> list[Node]:
        return []

    def emit(self, graph: Graph, padding: str, slots: dict[Hashable, Node]) -> Node:
        tokens = rows(graph, self.write)
        half = calculate(graph, operator.floordiv, size_node(graph, tokens, 2), 2)
        parts = [
            call(graph, aten.slice.Tensor, tokens, 2, 0, half),
            call(graph, aten.slice.Tensor, tokens, 2, half, sys.maxsize),
        ]
        mapping, wrap = slot_mapping(graph, self.write, padding, slots)
        return _insert(
            graph,
            tkv.reshape_and_cache_packed.default,
            (
                *parts,
                self.write.cache.build(graph),
                mapping,
                *_scales(graph, self.write, self.write),
            ),
            {"kv_dim": -1, "wrap": wrap},
        )


@dataclass(frozen=True, eq=False)
class Call:
    """A hand-written call, which is made again on views of the graph's inputs.

    Attributes:
        reads: the arguments that it does not mutate.
    """

    node: Node
    reads: dict[str, Any]
    writes: tuple[Write, ...]
    note: str | None = None

    @property
    def fused(self) -> str:
        return str(self._operator._schema.name)

    @property
    def _operator(self) -> Any:
        return self.node.args[0]

    def operands(self) -> list[Node]:
        nodes = [arg for arg in self.reads.values() if isinstance(arg, Node)]
        return nodes + [node for write in self.writes for node in write.view.operands()]

    def results(self) -> list[Node]:
        return [self.node]

    def emit(self, graph: Graph, padding: str, slots: dict[Hashable, Node]) -> Node:
        given = self.reads | {str(w.argument): w.view.build(graph) for w in self.writes}
        schema = self._operator._schema
        args = [given.pop(arg.name) for arg in schema.arguments if not arg.kwarg_only]
        made = graph.call_function(self._operator, tuple(args), given)
        made.meta["val"] = value(self.node)[0]
        assert len(schema.returns) <= 1, "an operator of ours returns one tensor at most"
        for result in list(self.node.users):
            if result.args[1] == 0:  # it stays the same node, which others may be planned to read
                result.target, result.args = aten.alias.default, (made,)
        return made


def _insert(graph: Graph, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    node = graph.call_function(op, args, kwargs)
    node.meta["val"] = None
    return node


def _rounding(*writes: SlotWrite) -> str | None:
    if all(write.cast.exact for write in writes):
        return None
    return "rounded once, from float32, as Inductor does; eager rounds to 16 bits in between"


def rows(graph: Graph, write: SlotWrite) -> Node:
    """Insert the tokens as [T, Hkv, D] with a last stride of 1, in a dtype that operators read."""
    node = write.tokens.build(graph)
    if value(node).dim() != 3:
        sizes = [size_node(graph, node, dim) for dim in (-2, -1)]
        node = call(graph, aten.reshape.default, node, [-1, *sizes])
    if value(node).dtype not in FLOATS:  # float8_e4m3fn: every value is one of bfloat16
        node = _cast(graph, node, torch.bfloat16)
    # Inductor lays out what it computes in the order of these strides: 0 would come after the last.
    *outer, last = value(node).stride()
    if not same(last, 1) or any(same(stride, 0) for stride in outer):
        node = call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
    return node


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    if value(node).dtype == dtype:
        return node
    return call(graph, prims.convert_element_type.default, node, dtype)


def _scales(graph: Graph, *writes: SlotWrite) -> list[Node | None]:
    """Insert the scales of writes; none at all if all are None."""
    scales = [
        None
        if w.cast.scale is None
        else scale_tensor(graph, w.cast.scale, value(w.tokens.base).device)
        for w in writes
    ]
    return scales if any(scales) else []
