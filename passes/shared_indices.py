"""Compute once the indices that many layers share.

Every layer of a model takes its slots, lengths and block table from the same tensors, by the same
operators. An operator wants its arguments in memory; what is not there, Inductor computes for each
operator anew: two kernels a layer, of a microsecond each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import mutated_arguments
from torch_tkv.passes.findings import Findings
from torch_tkv.passes.inductor import compute_at_once
from torch_tkv.passes.views import value

INDICES = (torch.int32, torch.int64)


def share_indices(graph: Graph, findings: Findings) -> None:
    """Merge equal computations of the indices of our operators, and have shared ones in memory."""
    wanted = _ancestors(node for user in _operators(graph) for node in user.all_input_nodes)
    seen: dict[Hashable, Node] = {}
    inputs: dict[Node, set[Node]] = {}  # what an index is computed from
    for node in list(graph.nodes):
        for changed in mutated_arguments(node):  # what is computed of it next may differ
            seen = {key: x for key, x in seen.items() if _root(changed) not in inputs[x]}
        if node in wanted:
            key = node.target, _key(node.args), _key(sorted(node.kwargs.items()))
            first = seen.setdefault(key, node)
            inputs[node] = {_root(node)}.union(*(inputs.get(x, {x}) for x in node.all_input_nodes))
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
    users = Counter(_root(x) for user in _operators(graph) for x in user.all_input_nodes)
    for node, count in users.items():
        if count > 1 and node in wanted:
            compute_at_once(node)


def _operators(graph: Graph) -> list[Node]:
    return [x for x in graph.nodes if getattr(x.target, "namespace", None) == "tkv"]


def _is_index(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor) and value(node).dtype in INDICES


def _is_pure(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _ancestors(nodes: Any) -> set[Node]:
    """Return the indices among `nodes`, and what they are computed from."""
    found: set[Node] = set()
    todo = [node for node in nodes if _is_index(node)]
    while todo:
        node = todo.pop()
        if node not in found and _is_pure(node):
            found.add(node)
            todo += node.all_input_nodes
    return found


def _root(node: Node) -> Node:
    """Return what a node is a view of, itself if it is none."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: Node) -> bool:
    return _is_pure(node) and node.target._schema.returns[0].alias_info is not None  # type: ignore[union-attr]


def _key(arg: Any) -> Hashable:
    """Return what only equal computations have in common, once their inputs are merged."""
    if isinstance(arg, (list, tuple)):
        return tuple(map(_key, arg))
    # 1, 1.0 and True are equal, but compute something else.
    return arg if isinstance(arg, Node) else (type(arg), arg)
