"""What the passes did to the cache writes of every compiled graph, kept where Inductor keeps it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

# Note [Findings are counter keys]
# On a hit in Inductor's or AOTAutograd's cache no pass runs. What a graph added to
# counters["inductor"] while it was compiled is stored with it and added again on a hit, so a
# finding that is the key of a counter survives, in another process too.
PREFIX = "torch_tkv cache_write "

CACHE_WRITE = "cache write"
_PADDING = {
    "wrap": "slot -1 is the last slot, as in eager PyTorch",
    "skip": "a negative slot is not written",
}


@dataclass(frozen=True)
class Layer:
    """One write of K and V.

    Attributes:
        module: the path of the module that it was traced in.
        source: file:line of its statements.
        fused: what became one operator, as "RoPE + cache write", or the operator that is called
            by hand, such as "tkv::reshape_and_cache"; None if nothing did.
        reason: why nothing, or no more, was fused, and what to change; None if all was.
    """

    module: str
    source: str
    fused: str | None
    reason: str | None = None


@dataclass(frozen=True)
class ReportedGraph:
    """The layers of `count` compiled graphs that tell the same, as prefill and decode may.

    Attributes:
        padding: "wrap": a negative slot counts from the end of the cache, as in eager PyTorch;
            "skip": it is not written.
        attention: the calls of paged_attention whose output is quantised, which are no layers.
    """

    layers: tuple[Layer, ...]
    count: int
    padding: str = "wrap"
    attention: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Report:
    """What became of the cache writes; print it, or take `as_dict()`.

    Attributes:
        graphs: the compiled graphs that write to caches.
    """

    graphs: tuple[ReportedGraph, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, the number of layers, that of fused ones, and the latter by kind."""
        kinds = self._kinds()
        totals = {"layers": len(self._layers), "fused": kinds.total(), "kinds": dict(kinds)}
        return asdict(self) | totals

    @property
    def _layers(self) -> list[Layer]:
        return [layer for graph in self.graphs for layer in graph.layers]

    def _kinds(self) -> Counter[str]:
        return Counter(layer.fused for layer in self._layers if layer.fused is not None)

    def __str__(self) -> str:
        if not self.graphs:
            return "no compiled graph writes to a cache"
        lines = []
        for number, graph in enumerate(self.graphs):
            lines.append(f"graph {number}, compiled {graph.count}x")
            lines.append(f'  padding="{graph.padding}" ({_PADDING[graph.padding]})')
            lines += _table([*graph.layers, *graph.attention])
        total = len(self._layers)
        for kind, count in (self._kinds() or Counter({CACHE_WRITE: 0})).most_common():
            lines.append(f"{count} of {total} layers: {kind} {_verb(kind)}")
        return "\n".join(lines)


def _table(layers: Sequence[Layer]) -> list[str]:
    rows = [(x.module, x.source, outcome(x)) for x in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def outcome(layer: Layer) -> str:
    """Return what became of a layer, in words."""
    if layer.fused is None:
        return f"not fused: {layer.reason}"
    return f"{_verb(layer.fused)}: {layer.fused}" + (f" ({layer.reason})" if layer.reason else "")


def _verb(kind: str) -> str:
    return "called in place" if kind.startswith("tkv::") else "fused"


def record(layers: Iterable[Layer], attention: Iterable[Layer], padding: str) -> None:
    """Keep what was found in one graph; see Note [Findings are counter keys]."""
    from torch_tkv.passes.inductor import counters

    found = [[*map(astuple, rows)] for rows in (layers, attention)]
    key = json.dumps([padding, *found], separators=(",", ":"))
    counters["inductor"][PREFIX + key] += 1


def findings() -> Counter[str]:
    """Return how often each finding was recorded since the counters were last cleared."""
    from torch_tkv.passes.inductor import counters

    return Counter({k: n for k, n in counters["inductor"].items() if k.startswith(PREFIX)})


def report(*, since: Counter[str] | None = None) -> Report:
    """Report on all graphs compiled since `torch._dynamo.utils.counters` was last cleared.

    Args:
        since: earlier findings, to be left out.
    """
    graphs = []
    for key, count in (findings() - (since or Counter())).items():
        padding, *found = json.loads(key.removeprefix(PREFIX))
        layers, attention = (tuple(Layer(*row) for row in rows) for rows in found)
        graphs.append(ReportedGraph(layers, count, padding, attention))
    return Report(tuple(graphs))
