"""index_put(key_cache, i, k) + index_put(value_cache, i, v) + copy_ + copy_
=> tkv::reshape_and_cache(k, v, key_cache, value_cache, slots(i))

Eager writes of K and V by one index become one operator that writes in place. `i` is a tensor of
slots, or one of blocks and one of offsets; a cache is a graph input or a view of it.

The operator takes `select`, `slice`, `permute` and `reshape` views of the input itself. Handed over
through auto_functionalized_v2 instead, the views would be made again by as_strided, which copies
whole caches and, with symbolic offsets, writes to the wrong place (torch 2.11 to 2.15).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import CacheVersions, Write
from torch_tkv.passes.inductor import CustomGraphPass, cache_key, is_inference, run_pass
from torch_tkv.passes.order import Order
from torch_tkv.passes.report import Layer, record
from torch_tkv.passes.slots import SameValues, SlotWrite, emit, is_cache_like, slot_write
from torch_tkv.passes.views import View


@dataclass(frozen=True, eq=False)
class Pair:
    """A write of K and one of V by the same index."""

    key: SlotWrite
    value: SlotWrite

    @property
    def writes(self) -> tuple[Write, Write]:
        return self.key.write, self.value.write

    def operands(self) -> list[Node]:
        return self.key.operands() + self.value.operands()


class CacheWrite(CustomGraphPass):
    """The pass; `matched` counts the pairs of writes that it replaced.

    Args:
        chained: passes of the user, which run first: they may expect a functional graph.
    """

    def __init__(self, chained: Iterable[Callable[..., None]] = ()) -> None:
        self.chained = tuple(chained)
        self.matched = 0

    def uuid(self) -> Hashable | None:
        return cache_key(self.chained)

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.chained:
            run_pass(graph_pass, graph)
        plan = Plan(graph)
        if plan.pairs:
            rewrite(graph, plan)
        self.matched += len(plan.pairs)
        layers = plan.layers()
        if layers:
            record(layers)
        if layers and not plan.pairs:
            warnings.warn(
                "torch_tkv: a compiled graph writes to KV caches and no write was fused; "
                "print(torch_tkv.report()) says why",
                stacklevel=2,
            )


class Plan:
    """What becomes of the writes of a graph.

    Attributes:
        pairs: the writes to fuse.
        reasons: why each other write is left alone.
    """

    def __init__(self, graph: Graph) -> None:
        self.caches = CacheVersions(graph)
        self.pairs: list[Pair] = []
        self.reasons: dict[Write, str] = {}
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._output = graph.output_node()
        self._order = Order(graph)
        left = list(self._slot_writes(is_inference(graph)))
        while left:
            self._pair(left.pop(0), left)
        self._drop_halves()

    def edges(self, op: Pair | SlotWrite) -> tuple[list[Any], list[Any]]:
        """Return what must run before the operator for `op`, and what after."""
        before: list[Any] = op.operands()
        after: list[Any] = [self._output]
        others = [pair for pair in self.pairs if pair is not op]
        for write in op.writes:
            items: list[tuple[View, Any]]
            items = [(read.view, read.node) for read in self.caches.reads[write.view.base]]
            items += [(other.view, pair) for pair in others for other in pair.writes]
            for view, item in items:
                if not write.view.disjoint(view):
                    (before if view.version < write.view.version else after).append(item)
        return before, after

    def _slot_writes(self, inference: bool) -> Iterator[SlotWrite]:
        same_values = SameValues()
        for write in self.caches.writes:
            base = write.view.base
            if not inference:
                # Here the mutation can be an output, which the caller copies back.
                if self.caches.mutated(base) or self._output in write.node.users:
                    self.reasons[write] = "compiled for training: call it under torch.no_grad()"
            elif write.view.version == 0:  # see CacheVersions._end
                self.reasons[write] = self.caches.unclear[base]
            elif self.caches.mutated(base):
                found = slot_write(write, self.caches, same_values)
                if isinstance(found, SlotWrite):
                    yield found
                else:
                    self.reasons[write] = found

    def _pair(self, write: SlotWrite, others: list[SlotWrite]) -> None:
        """Fuse `write` with one of `others`, or say why none is fit."""
        fitting = [other for other in others if write.fits(other)]
        fitting.sort(key=lambda other: module(other.write.node) != module(write.write.node))
        for other in fitting:
            pair = Pair(*sorted((write, other), key=lambda half: self._input_order(half.write)))
            before, after = self.edges(pair)
            if self._order.allows(before, after):
                self._order.place(pair, before, after)
                others.remove(other)
                self.pairs.append(pair)
                return
        left = [write, *fitting[:1]]
        if not fitting:
            reason = "no other write has the same index: K and V are fused in pairs"
        elif not all(self._order.allows(*self.edges(half)) for half in left):
            reason = "the old contents of the cache are read after the write: read them before it"
        else:
            reason = "K or V is read before the other is written: write both, then read"
        for half in left:
            self.reasons[half.write] = self.caches.unclear.get(half.write.view.base, reason)
        others[:] = [other for other in others if other not in left]

    def _input_order(self, write: Write) -> tuple[int, int]:
        """Return a key that sorts K before V: programs use its cache first."""
        return self.position[write.view.base], write.view.version

    def _drop_halves(self) -> None:
        """Leave a pair alone where another write of its tensors is: their copy_ has to stay."""
        while True:
            text = "another write of the same tensor is left alone ({})"
            why = {write.view.base: text.format(why) for write, why in self.reasons.items()}
            why |= self.caches.unclear
            halves = [pair for pair in self.pairs if any(w.view.base in why for w in pair.writes)]
            if not halves:
                return
            for pair in halves:
                reason = next(why[w.view.base] for w in pair.writes if w.view.base in why)
                self.reasons.update(dict.fromkeys(pair.writes, reason))
            self.pairs = [pair for pair in self.pairs if pair not in halves]

    def layers(self) -> list[Layer]:
        """Return a line of the report for each pair, fused or not, and each other write."""
        alike: dict[tuple[str, str], list[Write]] = {}
        for write, reason in self.reasons.items():
            if is_cache_like(write):
                alike.setdefault((module(write.node), reason), []).append(write)
        lines: list[tuple[Sequence[Write], str | None]] = [(x.writes, None) for x in self.pairs]
        for (_, reason), writes in alike.items():
            writes.sort(key=self._input_order)
            lines += [(writes[i : i + 2], reason) for i in range(0, len(writes), 2)]
        lines.sort(key=lambda line: min(self.position[write.node] for write in line[0]))
        return [
            Layer(module(writes[0].node), ", ".join(dict.fromkeys(map(source, writes))), reason)
            for writes, reason in lines
        ]


def rewrite(graph: Graph, plan: Plan) -> None:
    """Emit one operator for each pair, have readers read the input itself, and drop the writes."""
    dead = {node for node in graph.nodes if not node.users}
    ops: dict[Any, Node] = {}
    slots: dict[Hashable, Node] = {}
    for pair in plan.pairs:
        last = max(pair.writes, key=lambda write: plan.position[write.node]).node
        with graph.inserting_before(last.next):
            ops[pair] = emit(graph, pair.key, pair.value, slots)
        kept = ("nn_module_stack", "stack_trace")
        ops[pair].meta = {"val": None} | {name: last.meta.get(name) for name in kept}
    for base in {write.view.base for pair in plan.pairs for write in pair.writes}:
        _read_in_place(graph, base, plan.caches)
    for node in reversed(graph.nodes):
        if not node.users and node not in dead and not node.is_impure():
            graph.erase_node(node)
    order = Order(graph, placing=ops.values())
    now = ops | {node: node for node in graph.nodes}
    for pair, op in ops.items():
        before, after = ([now[x] for x in edges if x in now] for edges in plan.edges(pair))
        order.place(op, before, after)
    order.sort()


def _read_in_place(graph: Graph, base: Node, caches: CacheVersions) -> None:
    """Have all users of the later versions of `base` use views of the base."""
    for node, view in reversed(list(caches.views.items())):
        if isinstance(view, View) and view.base is base and view.version and node.users:
            with graph.inserting_before(node):
                node.replace_all_uses_with(view.build(graph))
    graph.erase_node(caches.ends[base])


def module(node: Node) -> str:
    """Return the path of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = str(list(stack.values())[-1][0])
    return re.sub(r"^[LG]\['\w+'\]\.?", "", path)


def source(write: Write) -> str:
    """Return file:line of the statement that a write was traced from."""
    lines = re.findall(r'File "(.*)", line (\d+)', write.node.meta.get("stack_trace") or "")
    return f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else "?"
