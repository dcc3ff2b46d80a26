"""rotary(q), rotary(k) + tkv::reshape_and_cache(rotary(k), v, ...)
=> tkv::rope_reshape_and_cache(q, k, v, cos, sin, ...)

Where q and k are norms of heads => tkv::qk_norm_rope_reshape_and_cache. A rotated key that is read
elsewhere is computed for those readers as before.

The operator computes in float32 and rounds once. Eager PyTorch rounds after each step, and Inductor
where it ends a kernel.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torch_tkv.ops.checks import FLOAT_DTYPES
from torch_tkv.passes.arrange import ArrangeError, Arranger
from torch_tkv.passes.cache_versions import CacheVersions
from torch_tkv.passes.elements import cone, first_of_equals
from torch_tkv.passes.findings import Findings
from torch_tkv.passes.head_norm import HeadNorm, eps_is_an_input, head_norm
from torch_tkv.passes.indices import Leaf, progression
from torch_tkv.passes.order import Order
from torch_tkv.passes.rotated_heads import Head, RotatedHeads, size_of, whole_heads
from torch_tkv.passes.rotation import Rotation, peeled
from torch_tkv.passes.views import View, arguments, call, same, value

aten, tkv = torch.ops.aten, torch.ops.tkv

ROPE = "RoPE + cache write"
NORM_AND_ROPE = "QK norm + RoPE + cache write"

EPS = "QK norm apart: dynamic=True makes its eps an input: leave dynamic at None, or mark_dynamic"
ROTATED_TWICE = "the key is rotated again for its other readers"
NORM_ALONE = "norm apart: operators norm only what they rotate too, and the key is not rotated"
UNREAD = "RoPE apart: the key is computed in another way than rotary embeddings are"
CHANGED = "RoPE apart: the key is changed after its rotation: do it before, if that means the same"
PART = "RoPE apart: the rotated part and the rest of a head are not the two ends of one tensor"
BY_HEAD = "RoPE apart: cos and sin differ by head"
NO_QUERY = "RoPE apart: no query of the same dtype is rotated by the same cos and sin"
NEEDED = "RoPE apart: the rotated query is read before the cache can be written"
SHAPES = "RoPE apart: no views bring query, key, cos and sin into [tokens, ...]"


@dataclass(frozen=True)
class Fusion:
    """One operator in the place of `write` and of the rotation of a query.

    Attributes:
        sources: query and key before the rotation, and before the norm if that is fused.
        norms: those of query and key; none where they are not fused.
        columns: which lanes of cos, and which of sin, are the operands.
    """

    write: Node
    query: Head
    key: Head
    sources: tuple[Leaf, ...]
    norms: tuple[HeadNorm, ...]
    columns: tuple[slice, slice]

    def inputs(self) -> list[Node]:
        """Return the nodes that the operator reads besides those of the write."""
        rotation = self.key.rotation
        leaves = [*self.sources, rotation.cos.leaf, rotation.sin.leaf]
        return [leaf.node for leaf in (*leaves, *(norm.weight for norm in self.norms))]


def fuse_rope(graph: Graph, findings: Findings) -> None:
    """Fuse RoPE, and norms before it, with the cache writes of `graph`, and tell the findings."""
    if not any(node.target is tkv.reshape_and_cache.default for node in graph.nodes):
        return
    plan = Plan(graph)
    dead = {node for node in graph.nodes if not node.users}
    ops: dict[Node, Node] = {}
    shared: dict[Hashable, tuple[Node, Node]] = {}
    for fusion in plan.fusions:
        try:
            op = emit(graph, fusion, shared)
        except ArrangeError:
            plan.reasons[fusion.write] = SHAPES
            continue
        ops[fusion.write] = op
        findings.fuse(fusion.write, op, NORM_AND_ROPE if fusion.norms else ROPE)
        graph.erase_node(fusion.write)
    for node in reversed(graph.nodes):
        if not node.users and node not in dead and not node.is_impure():
            graph.erase_node(node)
    left = set(graph.nodes)
    for fusion in plan.fusions:
        if fusion.write not in ops:
            continue
        if not fusion.norms and eps_is_an_input(fusion.sources[1]):
            plan.reasons[ops[fusion.write]] = EPS
        if fusion.key.rotated in left:
            plan.reasons[ops[fusion.write]] = ROTATED_TWICE
    for write, reason in plan.reasons.items():
        if write in findings.layers:
            findings.refuse(write, reason)
    if ops:
        plan.sort(ops)


class Plan:
    """What becomes of the cache writes of a graph.

    Attributes:
        fusions: what to fuse.
        reasons: why other writes are left alone.
    """

    def __init__(self, graph: Graph) -> None:
        self.fusions: list[Fusion] = []
        self.reasons: dict[Node, str] = {}
        self._graph = graph
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._caches = CacheVersions(graph)
        shown = self._caches.views.items()
        self._changing = {
            node for node, x in shown if isinstance(x, View) and self._caches.mutated(x.base)
        }
        self._first = first_of_equals(graph, self._changing)
        self._heads = RotatedHeads(graph, self._first)
        writes = [x for x in graph.nodes if x.target is tkv.reshape_and_cache.default]
        self._keys = {write: self._heads.keys(arguments(write)["key"]) for write in writes}
        self._edges = {write: self._around(write) for write in writes}
        self._order = Order(graph, placing=writes)
        for write, edges in self._edges.items():
            self._order.place(write, *edges)
        for write in writes:
            found = self._fusion(write)
            if isinstance(found, Fusion):
                self.fusions.append(found)
                self._order.place(write, found.inputs(), found.query.rotated.users)
            elif found is not None:
                self.reasons[write] = found

    def sort(self, ops: dict[Node, Node]) -> None:
        """Reorder the graph, where `ops` took the places of writes."""
        now = {node: node for node in self._graph.nodes} | ops
        order = Order(self._graph, placing=[now[write] for write in self._edges])
        for write, edges in self._edges.items():
            order.place(now[write], *([now[x] for x in nodes if x in now] for nodes in edges))
        order.sort()

    def _around(self, write: Node) -> tuple[list[Node], list[Node]]:
        """Return what uses the same elements of the caches before a write, and what after it."""
        before, after = list[Node](), [self._graph.output_node()]
        args = arguments(write)
        for cache in filter(None, map(self._caches.view, (args["key_cache"], args["value_cache"]))):
            for read in self._caches.reads[cache.base]:
                if read.node is not write and not cache.disjoint(read.view):
                    early = self._position[read.node] < self._position[write]
                    (before if early else after).append(read.node)
        return before, after

    def _fusion(self, write: Node) -> Fusion | str | None:
        """Return what to fuse with a write, or why nothing; None where nothing looks like RoPE."""
        args = arguments(write)
        if not self._keys[write]:
            return self._not_rotated(args["key"])
        caches = (args["key_cache"], args["value_cache"])
        if None in map(self._caches.view, caches):
            return "RoPE apart: the cache is no input of the graph"
        dtypes = [value(args[name]).dtype for name in ("key", "value")]
        if dtypes[0] not in FLOAT_DTYPES or dtypes[0] != dtypes[1]:
            return f"RoPE apart: keys are {dtypes[0]} and values {dtypes[1]}"
        reason = NO_QUERY
        for key in self._keys[write]:
            if any(key.groups(angles.leaf)[1] for angles in (key.rotation.cos, key.rotation.sin)):
                return BY_HEAD
            for query in self._queries(key, write):
                found = self._operands(write, query, key)
                if isinstance(found, Fusion) and self._allows(found):
                    return found
                reason = found if isinstance(found, str) else NEEDED
        return reason

    def _not_rotated(self, key: Node) -> str | None:
        """Return why a key is not seen as rotated; None where nothing looks like RoPE."""
        nodes = cone(key)
        if not any(x.target in (aten.mul.Tensor, aten.addcmul.default) for x in nodes):
            return None
        written = value(key)
        rotated = value(self._heads.rotated_inside(key))
        if rotated is None:
            normed = head_norm(whole_heads(key), written.dtype, self._first)
            return NORM_ALONE if normed else UNREAD
        if rotated.dtype != written.dtype:
            return (
                f"RoPE apart: the key is rotated in {rotated.dtype} and written in {written.dtype}"
            )
        return CHANGED if same(rotated.shape[-1], written.shape[-1]) else PART

    def _queries(self, key: Head, write: Node) -> list[Head]:
        """Return the queries that can be meant, the nearest first."""
        keys = {key.rotation.source.node for keys in self._keys.values() for key in keys}
        taken = {fusion.query.rotated for fusion in self.fusions}
        queries = [
            query
            for query in self._heads.queries(key)
            if query.rotated not in taken and query.rotation.source.node not in keys
        ]
        at = self._position[write]
        return sorted(queries, key=lambda query: abs(self._position[query.rotated] - at))

    def _operands(self, write: Node, query: Head, key: Head) -> Fusion | str:
        heads, dtype, rotation = (query, key), key.dtype, key.rotation
        cos, sin = value(rotation.cos.leaf.node).dtype, value(rotation.sin.leaf.node).dtype
        if cos != sin or cos not in (*FLOAT_DTYPES, torch.complex64):
            return f"RoPE apart: cos is {cos} and sin {sin}"
        columns = _columns(rotation)
        if columns is None:
            return "RoPE apart: the columns of cos and sin are not in the order of the elements"
        sources = [peeled(head.rotation.source, dtype) for head in heads]
        norms = [head_norm(head.rotation.source, dtype, self._first) for head in heads]
        if None in norms or len({(x.eps, x.weight_plus_one) for x in norms if x}) != 1:
            norms = []
        else:
            sources = [norm.source for norm in norms if norm]
        if None in sources:
            return f"RoPE apart: the result is {dtype}, what is rotated is not"
        kept = [source for source in sources if source]
        for head, source in zip(heads, kept, strict=True):
            parts = zip(head.groups(source), (head.tokens, head.heads), strict=True)
            if not all(same(size_of(part), size_of(whole)) for part, whole in parts):
                return "RoPE apart: what is rotated is broadcast"
        fusion = Fusion(write, query, key, tuple(kept), tuple(x for x in norms if x), columns)
        if not self._changing.isdisjoint(fusion.inputs()):
            return "RoPE apart: what is rotated, or cos and sin, lie in a tensor that is mutated"
        return fusion

    def _allows(self, fusion: Fusion) -> bool:
        """Whether the operator can run after its inputs and before readers of the query."""
        write, inputs, readers = fusion.write, fusion.inputs(), fusion.query.rotated.users
        return self._order.allows(inputs, [write]) and self._order.allows([write, *inputs], readers)


def _columns(rotation: Rotation) -> tuple[slice, slice] | None:
    """Return which lanes of cos and sin are the operands: one for each pair, or each element."""
    firsts = [first for first, _ in rotation.pairs()]
    halves: list[tuple[int, ...]] = []
    wholes = [rotation.cos.lanes, rotation.sin.lanes]
    for lanes in wholes:
        if all(lanes[first] == lanes[second] for first, second in rotation.pairs()):
            halves.append(tuple(lanes[first] for first in firsts))
    chosen = halves if len(halves) == 2 else wholes
    slices = [progression(lanes) for lanes in chosen]
    return None if None in slices else (slices[0], slices[1])  # type: ignore[return-value]


def emit(graph: Graph, fusion: Fusion, shared: dict[Hashable, tuple[Node, Node]]) -> Node:
    """Insert the operator, and have readers of the rotated query read views of its result.

    Args:
        shared: operands cos and sin of other layers.
    """
    write, query, key = fusion.write, fusion.query, fusion.key
    args = arguments(write)
    with graph.inserting_before(write):
        rows = [_rows(graph, *x) for x in zip((query, key), fusion.sources, strict=True)]
        angles = _angles(graph, fusion, shared)
        weights = [_weight(graph, norm) for norm in fusion.norms]
        size = key.rotation.source.width()
        rotary_dim = key.rotation.rotary_dim
        options = {
            "interleaved": key.rotation.interleaved,
            "rotary_dim": None if rotary_dim == size else rotary_dim,
            "wrap": args["wrap"],
        }
        operands = (*rows, args["value"], *angles, None, args["key_cache"], args["value_cache"])
        operands += (args["slot_mapping"], *weights)
        target = tkv.rope_reshape_and_cache.default
        if fusion.norms:
            target = tkv.qk_norm_rope_reshape_and_cache.default
            operands += (fusion.norms[0].eps,)
            options["weight_plus_one"] = fusion.norms[0].weight_plus_one
        op = graph.call_function(target, (*operands, args["k_scale"], args["v_scale"]), options)
        kept = ("nn_module_stack", "stack_trace")
        op.meta = {name: write.meta[name] for name in kept if name in write.meta}
        op.meta["val"] = value(rows[0]).new_empty(value(rows[0]).shape)
        result = Leaf(op, (query.tokens, query.heads, (size,)))
        axes = {axis.name: axis for axis in (*query.tokens, *query.heads)}
        dims = [[axes[dim]] if dim in axes else [] for dim in range(value(query.rotated).dim() - 1)]
        rotated = Arranger(graph, [fusion.sources[0], query.rotation.source])(result, dims)
    query.rotated.replace_all_uses_with(rotated)
    return op


def _rows(graph: Graph, head: Head, source: Leaf) -> Node:
    """Insert [T, H, D] of a query or key, with a last stride of 1."""
    return _dense(graph, Arranger(graph, [source])(source, head.groups(source)))


def _weight(graph: Graph, norm: HeadNorm) -> Node:
    """Insert [D] of a norm, with a last stride of 1."""
    return _dense(graph, _columns_of(graph, Arranger(graph, ())(norm.weight, ()), norm.columns))


def _dense(graph: Graph, node: Node) -> Node:
    """Insert a copy of a tensor of which the last stride is not 1."""
    if same(value(node).stride(-1), 1):
        return node
    return call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)


def _angles(
    graph: Graph, fusion: Fusion, shared: dict[Hashable, tuple[Node, Node]]
) -> tuple[Node, Node]:
    """Insert cos and sin with a row for each token, once for all layers."""
    key = fusion.key
    rotation, rows = key.rotation, key.rows()
    known = (rotation.cos, rotation.sin, rotation.inverse, str([(x.name, x.size) for x in rows]))
    if known not in shared:
        arranger = Arranger(graph, [fusion.sources[1], rotation.source])
        operands = [
            _columns_of(graph, arranger(angles.leaf, [rows]), columns)
            for angles, columns in zip((rotation.cos, rotation.sin), fusion.columns, strict=True)
        ]
        if rotation.inverse:
            operands[1] = call(graph, aten.neg.default, operands[1])
        shared[known] = (operands[0], operands[1])
    return shared[known]


def _columns_of(graph: Graph, node: Node, columns: slice) -> Node:
    """Insert columns of a tensor, unless these are all."""
    *rest, size = value(node).shape
    if columns == slice(0, size, 1):
        return node
    bounds = (columns.start, columns.stop, columns.step)
    return call(graph, aten.slice.Tensor, node, len(rest), *bounds)
