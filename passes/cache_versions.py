"""Follow caches through a post-grad graph: every view, read and functional write of them."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torch_tkv.passes.views import (
    SPLITS,
    View,
    arguments,
    select,
    slices,
    split_steps,
    value,
    view_step,
)

aten = torch.ops.aten

# Note [Versions of a cache]
# AOTAutograd turns `cache[i] = x` into `new = index_put(cache, [i], x)`, later readers of the cache
# into readers of `new`, and ends the graph with `copy_(cache, new)`. So a cache, that is a graph
# input, has versions: 0 is the input, and each write makes version n + 1 of it from version n.
# Every node that shows a cache is a View(base, steps, version): `steps` of that version of `base`.
#   view op        View(b, s, n)                            ->  View(b, s + step, n)
#   write          View(b, s, n), n the newest              ->  View(b, s, n + 1)
#   scatter        View(b, s, m), View(b, s + step, n)      ->  View(b, s, n)
# The last one puts a written view back into its base: it changes nothing outside `s + step`, so it
# is the newest version if all writes from m + 1 to n went inside. Any other user is a reader.
# The program mutates the cache if copy_(base, View(base, (), newest)) ends the graph. Then writing
# in place means the same if every reader of a version runs after the writes up to that version and
# before the later ones, where they overlap.

WRITES = (
    aten.index_put.default,
    aten.copy.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.as_strided_scatter.default,
    aten.masked_scatter.default,
)
# Readers of sizes alone: no write changes those.
SIZES = (
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
)


@dataclass(frozen=True, eq=False)
class Write:
    """A functional write; `view` is what it writes, at the version that it makes."""

    node: Node
    view: View


@dataclass(frozen=True)
class Read:
    """A node that uses the contents of `view`."""

    node: Node
    view: View


class CacheVersions:
    """The views, writes and reads of all tensor inputs of a graph; see Note [Versions of a cache].

    Attributes:
        views: what each node shows; for a split, what each of its parts shows.
        writes: all writes, in the order of the graph.
        reads: all reads, by base.
        ends: the copy_ that makes the newest version permanent, by base.
        unclear: why the versions of a base could not be followed, by base.
    """

    def __init__(self, graph: Graph) -> None:
        self.views: dict[Node, View | list[View]] = {}
        self.writes: list[Write] = []
        self.reads: dict[Node, list[Read]] = defaultdict(list)
        self.ends: dict[Node, Node] = {}
        self.unclear: dict[Node, str] = {}
        self._newest: dict[Node, int] = {}
        for node in graph.nodes:
            self._visit(node)

    def view(self, arg: Any) -> View | None:
        """Return the view that a node shows, if it shows one."""
        view = self.views.get(arg) if isinstance(arg, Node) else None
        return view if isinstance(view, View) else None

    def mutated(self, base: Node) -> bool:
        return base in self.ends or base in self.unclear

    def _visit(self, node: Node) -> None:
        if node.op in ("placeholder", "get_attr") and isinstance(value(node), Tensor):
            self.views[node] = View(node)
            self._newest[node] = 0
        if not any(arg in self.views for arg in node.all_input_nodes) or node.target in SIZES:
            return
        source = self.view(node.args[0]) if node.args else None
        if node.target is operator.getitem and node.args[0] in self.views:
            self.views[node] = self.views[node.args[0]][node.args[1]]  # type: ignore[index]
        elif source is None:
            self._read(node)
        elif step := view_step(node, source.shape):
            self.views[node] = source.then(step)
        elif node.target in SPLITS and (steps := split_steps(node, source.shape)):
            self.views[node] = [source.then(step) for step in steps]
        elif back := self._scattered_back(node, source):
            self.views[node] = back
        elif node.target in WRITES:
            self._write(node, source)
        elif node.target is aten.copy_.default and node.args[0] is source.base:
            self._end(node, source.base)
        else:
            self._read(node)

    def _scattered_back(self, node: Node, source: View) -> View | None:
        if node.target is aten.select_scatter.default:
            args = arguments(node)
            step = select(args["dim"], args["index"], source.shape)
        elif node.target is aten.slice_scatter.default:
            step = slices(node, source.shape, value(node.args[1]).shape)
        else:
            return None
        part, region = self.view(node.args[1]), source.then(step)
        if part is None or part.base is not source.base or not part.same_elements(region):
            return None
        if part.version < source.version:
            return None
        between = range(source.version + 1, part.version + 1)
        writes = [w.view for w in self.writes if w.view.base is part.base]
        if not all(view.within(region) for view in writes if view.version in between):
            return None
        return View(source.base, source.steps, part.version)

    def _write(self, node: Node, source: View) -> None:
        base, newest = source.base, self._newest[source.base]
        if source.version != newest:
            self.unclear[base] = "two writes start from the same contents of the cache"
        self._newest[base] = newest + 1
        self.views[node] = View(base, source.steps, newest + 1)
        self.writes.append(Write(node, self.views[node]))  # type: ignore[arg-type]
        self._read(node, skip=1)

    def _read(self, node: Node, skip: int = 0) -> None:
        for arg in node.all_input_nodes[skip:]:
            shown = self.views.get(arg, [])
            views = [shown] if isinstance(shown, View) else shown
            for view in views:
                self.reads[view.base].append(Read(node, view))
        for view in filter(None, map(self.view, mutated_arguments(node))):
            self.unclear[view.base] = f"{node.target} already mutates it in place"

    def _end(self, node: Node, base: Node) -> None:
        self.ends[base] = node
        self.views[node] = View(base, (), self._newest[base])
        new = node.args[1]
        if self.view(new) == self.views[node]:
            return
        self.unclear[base] = f"its new contents come from {getattr(new, 'target', new)}"
        while isinstance(new, Node) and new not in self.views and new.args:
            if new.target in WRITES:
                self.writes.append(Write(new, View(base)))
            new = new.args[0]


def mutated_arguments(node: Node) -> list[Node]:
    """Return the nodes that a call mutates in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    args = arguments(node)
    nodes: list[Node] = []
    for arg in schema.arguments:
        if arg.alias_info is not None and arg.alias_info.is_write:
            map_arg(args[arg.name], nodes.append)
    return nodes
