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
        path = [] if cast is None or cast.scale is None else _path(cast.source)
        if cast is None or not path:
            continue
        reason = _reason(node, cast, path)
        lines = source([path[-1], node])
        fused = None if reason else FUSED
        findings.attention.append(Layer(module(node), lines, fused, reason))
        if reason is None:
            _fuse(graph, node, cast, path)


def _path(node: Node) -> list[Node]:
    """Return a view and what it is of, down to a call of paged_attention; nothing if it is none."""
    path = [node]
    while path[-1].target in RESHAPES:
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    return path if path[-1].target is tkv.paged_attention.default else []


def _reason(node: Node, cast: Cast, path: list[Node]) -> str | None:
    """Say why the quantisation is left alone, if it is."""
    attention = path[-1]
    if arguments(attention)["output_scale"] is not None:
        return "the output is quantised twice"
    if scale_dims(cast.scale, value(node).dim()):
        return "the scale varies: the operator takes one for the whole output"
    if cast.exact and value(attention).dtype != torch.float32:
        return f"divided in float32, which keeps a rounding: divide in {value(attention).dtype}"
    step = node
    while step is not attention:
        step = step.args[0]  # type: ignore[assignment]
        if len(step.users) != 1:
            return "the output is also used as it is"
    between = attention
    while between is not node:
        between = between.next
        if mutated_arguments(between):
            return "a cache is written between attention and the quantisation"
    return None


def _fuse(graph: Graph, node: Node, cast: Cast, path: list[Node]) -> None:
    *views, attention = path
    assert cast.scale is not None
    with graph.inserting_before(node):
        scale = scale_tensor(graph, cast.scale, value(attention).device)
        given = arguments(attention) | {"output_scale": scale}
        schema = attention.target._schema.arguments  # type: ignore[union-attr]
        args = [given.pop(arg.name) for arg in schema if not arg.kwarg_only]
        new = call(graph, tkv.paged_attention.default, *args, **given)
        for view in reversed(views):
            new = call(graph, view.target, new, *view.args[1:])  # type: ignore[arg-type]
    node.replace_all_uses_with(new)
    while node is not attention:  # the cast, the clamps, the division and the views
        node, done = node.args[0], node  # type: ignore[assignment]
        graph.erase_node(done)
    graph.erase_node(attention)
