"""The one pass that Inductor runs: passes of the user, then ours, then what was found is told."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict

from torch.fx import Graph

from torch_tkv.passes.cache_write import fuse_cache_writes
from torch_tkv.passes.findings import Findings
from torch_tkv.passes.inductor import CustomGraphPass, cache_key, run_pass, trace_artifact
from torch_tkv.passes.quantised_attention import fuse_output_scale
from torch_tkv.passes.report import Layer, outcome, record
from torch_tkv.passes.rope_cache_write import fuse_rope
from torch_tkv.passes.shared_indices import share_indices

# TORCH_LOGS="torch_tkv.passes" shows a line for each layer, "+torch_tkv.passes" the graph as well.
log = logging.getLogger("torch_tkv.passes")


class Pipeline(CustomGraphPass):
    """All passes as one; `matched` counts the layers of which something was fused.

    Args:
        chained: passes of the user, which run first: they may expect a functional graph.
        padding: what a negative slot means in the writes that are fused: "wrap" or "skip".
        rope: whether rotary embeddings and QK norms are fused with the writes.
    """

    def __init__(
        self,
        chained: Iterable[Callable[..., None]] = (),
        *,
        padding: str = "wrap",
        rope: bool = True,
    ) -> None:
        self.chained = tuple(chained)
        self.padding = padding
        # In this order; each rewrites the graph and says in the findings what it did.
        self.passes = (
            fuse_cache_writes,
            *((fuse_rope,) if rope else ()),
            fuse_output_scale,
            share_indices,
        )
        self.matched = 0

    def uuid(self) -> Hashable | None:
        return cache_key(self.chained, self.padding, *(x.__name__ for x in self.passes))

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.chained:
            run_pass(graph_pass, graph)
        findings = Findings(self.padding)
        for rewrite in self.passes:
            rewrite(graph, findings)
        writes = list(findings.layers.values())
        self.matched += sum(layer.fused is not None for layer in writes)
        if writes or findings.attention:
            record(writes, findings.attention, self.padding)
            tell(graph, writes, findings.attention)


def tell(graph: Graph, writes: Sequence[Layer], attention: Sequence[Layer]) -> None:
    """Log what became of the cache writes of a graph, and warn if nothing did."""
    layers = [*writes, *attention]
    for layer in layers:
        log.info("%s %s %s", layer.module, layer.source, outcome(layer))
    log.debug("the graph after the passes: %s", graph)
    trace_artifact("torch_tkv_cache_writes", lambda: json.dumps([*map(asdict, layers)]))
    if writes and all(layer.fused is None for layer in writes):
        warnings.warn(
            "torch_tkv: a compiled graph writes to KV caches and no write was fused; "
            "print(torch_tkv.report()) says why",
            stacklevel=2,
        )
