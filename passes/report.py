"""What the passes did to the cache writes of every compiled graph, kept where Inductor keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# Note [Findings are counter keys]
# On a hit in Inductor's or AOTAutograd's cache no pass runs. What a graph added to
# counters["inductor"] while it was compiled is stored with it and added again on a hit, so a
# finding that is the key of a counter survives, in another process too.
PREFIX = "torch_tkv cache_write "


@dataclass(frozen=True)
class Layer:
    """One write of K and V; `reason` says why it is not fused, None that it is."""

    module: str
    source: str
    reason: str | None


@dataclass(frozen=True)
class ReportedGraph:
    """The layers of `count` compiled graphs that tell the same, as prefill and decode may."""

    layers: tuple[Layer, ...]
    count: int


@dataclass(frozen=True)
class Report:
    """What became of the cache writes; print it, or take `as_dict()`.

    Attributes:
        graphs: the compiled graphs that write to caches.
        padding: "wrap": a negative slot counts from the end of the cache, as in eager PyTorch.
    """

    graphs: tuple[ReportedGraph, ...]
    padding: str = "wrap"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, with the numbers of layers and of fused ones."""
        return asdict(self) | {"layers": len(self._layers), "fused": self._fused}

    @property
    def _layers(self) -> list[Layer]:
        return [layer for graph in self.graphs for layer in graph.layers]

    @property
    def _fused(self) -> int:
        return sum(layer.reason is None for layer in self._layers)

    def __str__(self) -> str:
        lines = [f'torch_tkv: padding="{self.padding}" (slot -1 is the last slot)']
        for number, graph in enumerate(self.graphs):
            lines += [f"graph {number}, compiled {graph.count}x", *_table(graph.layers)]
        lines.append(f"{self._fused} of {len(self._layers)} layers: cache write fused")
        return "\n".join(lines)


def _table(layers: tuple[Layer, ...]) -> list[str]:
    rows = [(x.module, x.source, f"not fused: {x.reason}" if x.reason else "fused") for x in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def record(layers: list[Layer]) -> None:
    """Keep what became of the layers of one graph; see Note [Findings are counter keys]."""
    from torch_tkv.passes.inductor import counters

    key = json.dumps([list(asdict(layer).values()) for layer in layers], separators=(",", ":"))
    counters["inductor"][PREFIX + key] += 1


def report() -> Report:
    """Report on all graphs compiled since `torch._dynamo.utils.counters` was last cleared."""
    from torch_tkv.passes.inductor import counters

    found = [(key, count) for key, count in counters["inductor"].items() if key.startswith(PREFIX)]
    return Report(
        tuple(
            ReportedGraph(tuple(Layer(*x) for x in json.loads(key.removeprefix(PREFIX))), count)
            for key, count in found
        )
    )
