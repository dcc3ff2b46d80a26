"""convert(clamp(tkv::paged_attention(...) / scale), float8_e4m3fn)
=> tkv::paged_attention(..., output_scale=scale)

The operator rounds once, from float32. Eager PyTorch rounds the output to the dtype of the query,
then the quotient, then to float8; Inductor skips the second on GPUs. So where the quotient has 16
bits, both differ from eager alike. Where only the operator would differ, it is left alone.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import mutated_arguments
from torch_tkv.passes.findings import Findings, module, source
from torch_tkv.passes.quantised import Cast, is_cast, scale_dims, scale_tensor, uncast
from torch_tkv.passes.report import Layer
from torch_tkv.passes.views import RESHAPES, arguments, call, value

tkv = torch.ops.tkv

FUSED = "paged_attention + float8 output"


def fuse_output_scale(graph: Graph, findings: Findings) -> None:
    """Have attention quantise its output where `graph` does so next, and tell the findings."""
    for node in list(graph.nodes):
        if not is_cast(node) or value(node).dtype != torch.float8_e4m3fn:
            continue
        cast = uncast(node, torch.float8_e4m3fn)
        attention = None if cast is None else _attention(cast.source)
        if cast is None or cast.scale is None or attention is None:
            continue
        reason = _reason(node, cast, attention)
        layer = Layer(module(node), source([attention, node]), None if reason else FUSED, reason)
        findings.attention.append(layer)
        if reason is None:
            _fuse(graph, node, cast, attention)


def _attention(node: Node) -> Node | None:
    """Return the call of paged_attention whose output a node shows."""
    while node.target in RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is tkv.paged_attention.default else None


def _reason(node: Node, cast: Cast, attention: Node) -> str | None:
    """Say why the quantisation is left alone, if it is."""
    if arguments(attention)["output_scale"] is not None:
        return "the output is quantised twice"
    if scale_dims(cast.scale, value(node).dim()):
        return "the scale varies: the operator takes one for the whole output"
    if cast.exact and value(attention).dtype != torch.float32:
        return f"divided in float32, which keeps a rounding: divide in {value(attention).dtype}"
    between = attention
    while between is not node:
        if len(between.users) != 1 and between in _path(node, attention):
            return "the output is also used as it is"
        if mutated_arguments(between):
            return "a cache is written between attention and the quantisation"
        between = between.next
    return None


def _path(node: Node, attention: Node) -> list[Node]:
    """Return the nodes from the call to its quantised output."""
    path = [node]
    while path[-1] is not attention:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    return path[1:]


def _fuse(graph: Graph, node: Node, cast: Cast, attention: Node) -> None:
    views = []
    view = cast.source
    while view is not attention:
        views.append(view)
        view = view.args[0]  # type: ignore[assignment]
    with graph.inserting_before(node):
        assert cast.scale is not None
        scale = scale_tensor(graph, cast.scale, value(attention).device)
        given = arguments(attention) | {"output_scale": scale}
        schema = attention.target._schema.arguments  # type: ignore[union-attr]
        args = [given.pop(arg.name) for arg in schema if not arg.kwarg_only]
        new = call(graph, tkv.paged_attention.default, *args, **given)
        for view in reversed(views):
            new = call(graph, view.target, new, *view.args[1:])  # type: ignore[arg-type]
    path = _path(node, attention)
    node.replace_all_uses_with(new)
    for old in (node, *path):
        graph.erase_node(old)
