"""Eager writes of K and V, and hand-written calls, become operators that write in place

index_put(key_cache, i, k) + index_put(value_cache, i, v) + copy_ + copy_
=> tkv::reshape_and_cache(k, v, key_cache, value_cache, slots(i))
index_put(cache, i, k) + copy_ => tkv::reshape_and_cache_packed(k[..., :h], k[..., h:], cache, ...)
auto_functionalized_v2(tkv::op, ...) + getitem + copy_ => tkv::op(...)

The operators take `select`, `slice`, `permute` and `reshape` views of the inputs of the graph.
Handed over through auto_functionalized_v2 instead, the views would be made again by as_strided,
which copies whole caches and, with symbolic offsets, writes to the wrong place (up to torch 2.15).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import CacheVersions, Write
from torch_tkv.passes.findings import Findings, module, source
from torch_tkv.passes.inductor import (
    call_arguments,
    compute_at_once,
    is_call,
    is_inference,
    is_safe_call,
)
from torch_tkv.passes.operators import Alone, Call, Operator, Pair
from torch_tkv.passes.order import Order
from torch_tkv.passes.report import Layer
from torch_tkv.passes.slots import SameValues, SlotWrite, is_cache_like, slot_writes
from torch_tkv.passes.targets import NotSlotsError
from torch_tkv.passes.views import View, same

TRAINING = "compiled for training: call it under torch.no_grad()"


def fuse_cache_writes(graph: Graph, findings: Findings) -> None:
    """Replace the writes in `graph`, and tell the findings what became of each.

    Raises:
        RuntimeError: Inductor would compile a hand-written call wrongly, and so would this.
    """
    plan = Plan(graph)
    plan.refuse_calls()
    ops = rewrite(graph, plan, findings.padding) if plan.ops else {}
    findings.layers.update(plan.layers(ops))


class Plan:
    """What becomes of the writes of a graph.

    Attributes:
        ops: the operators to insert.
        reasons: why each other write is left alone.
    """

    def __init__(self, graph: Graph) -> None:
        self.caches = CacheVersions(graph)
        self.ops: list[Operator] = []
        self.reasons: dict[Write, str] = {}
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._output = graph.output_node()
        self._order = Order(graph)
        self._calls: dict[Node, Call] = {}
        left = list(self._planned(is_inference(graph)))
        while left:
            self._place(left.pop(0), left)
        self._drop_halves()

    def edges(self, op: Operator | SlotWrite) -> tuple[list[Any], list[Any]]:
        """Return what must run before the operator for `op`, and what after."""
        before: list[Any] = op.operands()
        after: list[Any] = [self._output, *op.results()]
        others = [other for other in self.ops if other is not op]
        for write in op.writes:
            items: list[tuple[View, Any]]
            reads = self.caches.reads[write.view.base]
            items = [(read.view, self._calls.get(read.node, read.node)) for read in reads]
            items += [(other.view, x) for x in others for other in x.writes]
            for view, item in items:
                if item is not op and not write.view.disjoint(view):
                    (before if view.version < write.view.version else after).append(item)
        return before, after

    def _planned(self, inference: bool) -> Iterator[Operator | SlotWrite]:
        """Yield what could be inserted for each write, in the order of the graph."""
        first = SameValues()
        for write in self.caches.writes:
            base = write.view.base
            if not inference:
                # Here the mutation can be an output, which the caller copies back.
                if self.caches.mutated(base) or self._output in write.node.users:
                    self.reasons[write] = TRAINING
            elif write.view.version == 0:  # see CacheVersions._end
                self.reasons[write] = self.caches.unclear[base]
            elif write.argument is not None:
                if write.node not in self._calls:
                    writes = tuple(w for w in self.caches.writes if w.node is write.node)
                    reads, _ = call_arguments(write.node)
                    self._calls[write.node] = Call(write.node, reads, writes)
                    yield self._calls[write.node]
            elif self.caches.mutated(base):
                try:
                    found = slot_writes(write, self.caches, first)
                except NotSlotsError as error:
                    self.reasons[write] = str(error)
                else:
                    yield found[0] if len(found) == 1 else Pair(*found)

    def _place(self, op: Operator | SlotWrite, others: list[Operator | SlotWrite]) -> None:
        """Insert an operator for `op` alone or with one of `others`, or say why none is fit."""
        candidates: list[tuple[Operator, Any]] = []
        if isinstance(op, SlotWrite):
            fitting = [x for x in others if isinstance(x, SlotWrite) and op.fits(x)]
            fitting.sort(key=lambda x: module(x.write.node) != module(op.write.node))
            halves = [sorted((op, x), key=lambda w: self._input_order(w.write)) for x in fitting]
            candidates = [(Pair(*half), x) for half, x in zip(halves, fitting, strict=True)]
            if not same(op.cache.shape[-1], 1):
                candidates.append((Alone(op), None))
        else:
            candidates = [(op, None)]
        for candidate, other in candidates:
            before, after = self.edges(candidate)
            if self._order.allows(before, after):
                self._order.place(candidate, before, after)
                self.ops.append(candidate)
                if other is not None:
                    others.remove(other)
                return
        for write in op.writes:
            reason = "the old contents of the cache are read after the write: read them before it"
            self.reasons[write] = self.caches.unclear.get(write.view.base, reason)

    def _input_order(self, write: Write) -> tuple[int, int]:
        """Return a key that sorts K before V: programs use its cache first."""
        return self.position[write.view.base], write.view.version

    def _drop_halves(self) -> None:
        """Drop operators where another write of their tensors is left: their copy_ has to stay."""
        while True:
            text = "another write of the same tensor is left alone ({})"
            why = {write.view.base: text.format(why) for write, why in self.reasons.items()}
            why |= self.caches.unclear
            halves = [op for op in self.ops if any(w.view.base in why for w in op.writes)]
            if not halves:
                return
            for op in halves:
                reason = next(why[w.view.base] for w in op.writes if w.view.base in why)
                self.reasons.update(dict.fromkeys(op.writes, reason))
            self.ops = [op for op in self.ops if op not in halves]

    def refuse_calls(self) -> None:
        """Raise for a hand-written call that is left to Inductor, if that compiles it wrongly."""
        made = {op.node for op in self.ops if isinstance(op, Call)}
        reasons = {w.node: why for w, why in self.reasons.items() if w.argument} | self.caches.lost
        for node in self.position:
            if not is_call(node) or node in made:
                continue
            if node in self.caches.ambiguous or not is_safe_call(node):
                raise RuntimeError(
                    f"torch_tkv: torch.compile would write to the wrong rows in "
                    f"{node.args[0]._schema.name} ({source([node])}), which was not made in place: "
                    f"{reasons.get(node, TRAINING)}. Pass it whole tensors with storages of their "
                    "own, use tkv::reshape_and_cache_packed, or write cache[block, offset] = k"
                )

    def layers(self, ops: dict[Any, Node]) -> dict[Node, Layer]:
        """Return a line of the report for each operator, and each pair of the other writes."""
        alike: dict[tuple[str, str], list[Write]] = {}
        for write, reason in self.reasons.items():
            if is_cache_like(write):
                alike.setdefault((module(write.node), reason), []).append(write)
        lines: list[tuple[Sequence[Write], Operator | None, str | None]]
        lines = [(op.writes, op, op.note) for op in self.ops]
        for (_, why), left in alike.items():
            left.sort(key=self._input_order)
            lines += [(left[i : i + 2], None, why) for i in range(0, len(left), 2)]
        lines.sort(key=lambda line: min(self.position[write.node] for write in line[0]))
        layers = {}
        for writes, op, note in lines:
            nodes = [write.node for write in writes]
            fused = None if op is None else op.fused
            layers[ops.get(op, nodes[0])] = Layer(module(nodes[0]), source(nodes), fused, note)
        return layers


def rewrite(graph: Graph, plan: Plan, padding: str) -> dict[Any, Node]:
    """Insert the operators, have readers read the inputs themselves, and drop the writes."""
    dead = {node for node in graph.nodes if not node.users}
    ops: dict[Any, Node] = {}
    slots: dict[Hashable, Node] = {}
    for op in plan.ops:
        last = max(op.writes, key=lambda write: plan.position[write.node]).node
        with graph.inserting_before(last.next):
            ops[op] = op.emit(graph, padding, slots)
        kept = ("nn_module_stack", "stack_trace")
        ops[op].meta |= {name: last.meta.get(name) for name in kept}
    for made in ops.values():
        for result in list(made.users):  # see Call.emit
            result.replace_all_uses_with(made)
    for base in dict.fromkeys(write.view.base for op in plan.ops for write in op.writes):
        _read_in_place(graph, base, plan.caches)
    for node in reversed(graph.nodes):
        if not node.users and node not in dead and not node.is_impure():
            graph.erase_node(node)
    order = Order(graph, placing=ops.values())
    now = ops | {node: node for node in graph.nodes}
    for op, node in ops.items():
        before, after = ([now[x] for x in edges if x in now] for edges in plan.edges(op))
        order.place(node, before, after)
        for reader in plan.caches.readers.intersection(before):
            compute_at_once(reader)
    order.sort()
    return ops


def _read_in_place(graph: Graph, base: Node, caches: CacheVersions) -> None:
    """Have all users of the later versions of `base` use views of the base."""
    for node, view in reversed(list(caches.views.items())):
        if isinstance(view, View) and view.base is base and view.version and node.users:
            with graph.inserting_before(node):
                node.replace_all_uses_with(view.build(graph))
    graph.erase_node(caches.ends[base])
