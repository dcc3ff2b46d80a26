"""Follow caches through a post-grad graph: every view, read and functional write of them."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torch_tkv.passes.inductor import Region, call_arguments, is_call
from torch_tkv.passes.strided import replayed, strided_view
from torch_tkv.passes.views import (
    RESHAPES,
    SPLITS,
    View,
    arguments,
    same,
    select,
    slices,
    split_steps,
    value,
    view_step,
)

aten, prims = torch.ops.aten, torch.ops.prims

# Note [Versions of a cache]
# AOTAutograd turns `cache[i] = x` into `new = index_put(cache, [i], x)`, later readers of the cache
# into readers of `new`, and ends the graph with `copy_(cache, new)`. So a cache, that is a graph
# input, has versions: 0 is the input, and each write makes version n + 1 of it from version n.
# Every node that shows a cache is a View(base, steps, version): `steps` of that version of `base`.
#   view op        View(b, s, n)                            ->  View(b, s + step, n)
#   write          View(b, s, n), n the newest              ->  View(b, s, n + 1)
#   scatter        View(b, s, m), View(b, s + step, n)      ->  View(b, s, n)
# The last one puts a written view back into its base: it changes nothing outside `s + step`, so it
# is the newest version if all writes from m + 1 to n went inside. A hand-written call of one
# of ours is a write of each view that it mutates. Any other user is a reader.
# The program mutates the cache if copy_(base, View(base, (), newest)) ends the graph. Then writing
# in place means the same if every reader of a version runs after the writes up to that version and
# before the later ones, where they overlap.

SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
WRITES = (
    aten.index_put.default,
    aten.copy.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    *SCATTERS,
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
    """A functional write; `view` is what it writes, at the version that it makes.

    Attributes:
        argument: the argument of a hand-written call that is written.
    """

    node: Node
    view: View
    argument: str | None = None


@dataclass(frozen=True)
class Read:
    """A node that uses the contents of `view`, or shares them."""

    node: Node
    view: View


class _LostError(Exception):
    """Why what a hand-written call mutates could not be followed."""


class CacheVersions:
    """The views, writes and reads of all tensor inputs of a graph; see Note [Versions of a cache].

    Attributes:
        views: what each node shows; for a split or a call, what each of its results shows.
        aliases: what other nodes share elements with that show no View, such as expand.
        writes: all writes, in the order of the graph.
        reads: all reads, by base.
        ends: the copy_ that makes the newest version permanent, by base.
        unclear: why the versions of a base could not be followed, by base.
        lost: why what a hand-written call mutates could not be followed, by call.
        ambiguous: the calls whose strides Inductor may take for those of another layout.
    """

    def __init__(self, graph: Graph) -> None:
        self.views: dict[Node, View | Sequence[View | None]] = {}
        self.aliases: dict[Node, list[View]] = {}
        self.writes: list[Write] = []
        self.reads: dict[Node, list[Read]] = defaultdict(list)
        self.ends: dict[Node, Node] = {}
        self.unclear: dict[Node, str] = {}
        self.lost: dict[Node, str] = {}
        self.ambiguous: set[Node] = set()
        self._newest: dict[Node, int] = {}
        self._copies = _copies_written_back(graph)
        for node in graph.nodes:
            self._visit(node)

    def view(self, arg: Any) -> View | None:
        """Return the view that a node shows, if it shows one."""
        view = self.views.get(arg) if isinstance(arg, Node) else None
        return view if isinstance(view, View) else None

    @property
    def readers(self) -> set[Node]:
        """The nodes whose values are computed from a cache."""
        nodes = {read.node for reads in self.reads.values() for read in reads}
        return nodes - self.aliases.keys()

    def shown(self, arg: Any) -> list[View]:
        """Return the views whose elements are those of a node."""
        shown = self.views.get(arg, [])
        views = [shown] if isinstance(shown, View) else [view for view in shown if view]
        return views + self.aliases.get(arg, [])

    def mutated(self, base: Node) -> bool:
        return base in self.ends or base in self.unclear

    def _visit(self, node: Node) -> None:
        if node.op in ("placeholder", "get_attr") and isinstance(value(node), Tensor):
            self.views[node] = View(node)
            self._newest[node] = 0
        if is_call(node):
            self._call(node)
        elif node.target not in SIZES and any(map(self.shown, node.all_input_nodes)):
            self._use(node)

    def _use(self, node: Node) -> None:
        source = self.view(node.args[0]) if node.args else None
        if node.target is operator.getitem and node.args[0] in self.views:
            result = self.views[node.args[0]][node.args[1]]  # type: ignore[index]
            if result is not None:
                self.views[node] = result
        elif source is None:
            self._read(node)
        elif node.target is aten.view.dtype and _same_size(node, node.args[0]):
            self.views[node] = source.view_as(value(node).dtype)
        elif node in self._copies:
            self.views[node] = source
        elif step := view_step(node, source.shape):
            self.views[node] = source.then(step)
        elif node.target in SPLITS and (steps := split_steps(node, source.shape)):
            self.views[node] = [source.then(step) for step in steps]
        elif back := self._scattered_back(node, source):
            self.views[node] = back
        elif node.target in WRITES:
            self._read(node, node.all_input_nodes[1:])
            written = self._write(node, _scattered_into(node, source) or source)
            self.views[node] = replace(source, version=written.version)
        elif node.target is aten.copy_.default and node.args[0] is source.base:
            self._end(node, source.base)
        else:
            self._read(node)

    def _scattered_back(self, node: Node, source: View) -> View | None:
        region = _scattered_into(node, source)
        part = None if region is None else self.view(node.args[1])
        if part is None or region is None:
            return None
        if part.base is not source.base or not part.same_elements(region):
            return None
        if part.version < source.version:
            return None
        between = range(source.version + 1, part.version + 1)
        writes = [w.view for w in self.writes if w.view.base is part.base]
        if not all(view.within(region) for view in writes if view.version in between):
            return None
        return replace(source, version=part.version)

    def _write(self, node: Node, source: View, argument: str | None = None) -> View:
        base, newest = source.base, self._newest[source.base]
        if source.version != newest:
            self.unclear[base] = "two writes start from the same contents of the cache"
        self._newest[base] = newest + 1
        written = replace(source, version=newest + 1)
        self.writes.append(Write(node, written, argument))
        return written

    def _call(self, node: Node) -> None:
        reads, mutated = call_arguments(node)
        self._read(node, [arg for arg in reads.values() if isinstance(arg, Node)])
        called, bases = node.args[0], node.kwargs["_all_bases"]
        strided = [region.base for region in mutated.values() if region.strides]
        if any(map(self._is_laid_out_anew, strided)):
            self.ambiguous.add(node)
        shown = [view for base in bases if (view := self.view(base))]  # type: ignore[union-attr]
        try:
            views = {name: self._region(region) for name, region in mutated.items()}
            if len({view.base for view in shown}) < len(bases):  # type: ignore[arg-type]
                raise _LostError("two of its tensors show one storage as different dtypes")
        except _LostError as why:
            self.lost[node] = str(why)
            self._read(node, bases)  # type: ignore[arg-type]
            return
        for name, view in views.items():
            before = [w.view for w in self.writes if w.node is node and w.view.base is view.base]
            self._write(node, replace(view, version=[view, *before][-1].version), name)
        results = len(called._schema.returns) or 1  # type: ignore[union-attr]
        new = [replace(view, version=self._newest[view.base]) for view in shown]
        self.views[node] = [*[None] * results, *new]

    def _is_laid_out_anew(self, node: Node) -> bool:
        """Whether a write has given a cache other strides than the input has: see _region."""
        view = self.view(node)
        if view is None or node is view.base:
            return False
        return not same(value(node).stride(), replayed(view).stride())

    def _region(self, region: Region) -> View:
        base = self.view(region.base)
        if base is None:
            raise _LostError("it mutates a tensor that is made in the compiled graph")
        if not region.strides:
            return base
        # Functional writes may lay out their results anew. The strides are then those of the eager
        # program or of the functional one: what reads one way only is that.
        found = [strided_view(base, *region.strides)]
        if self._is_laid_out_anew(region.base):
            part = strided_view(View(region.base), *region.strides)
            found.append(part and functools.reduce(View.then, part.steps, base))
        views = [view for view in found if view is not None]
        if not views:
            raise _LostError("it mutates a view that no select, slice, permute and reshape lead to")
        if views[0] != views[-1]:
            raise _LostError("it mutates a view of what a write before it laid out anew")
        return views[0]

    def _read(self, node: Node, args: Iterable[Node] | None = None) -> None:
        for arg in node.all_input_nodes if args is None else args:
            for view in self.shown(arg):
                self.reads[view.base].append(Read(node, view))
                if _is_alias(node):
                    self.aliases.setdefault(node, []).append(view)
        for view in filter(None, map(self.view, mutated_arguments(node))):
            self.unclear[view.base] = f"{node.target} already mutates it in place"

    def _end(self, node: Node, base: Node) -> None:
        self.ends[base] = node
        self.views[node] = View(base, (), self._newest[base])
        new = node.args[1]
        if self.view(new) == self.views[node]:
            return
        origin: Any = new
        while getattr(origin, "target", None) in WRITES and not self.shown(origin.args[0]):
            origin = origin.args[0]
        origin = getattr(origin, "target", origin)
        why = f"its new contents come from {origin}: write into the cache, do not compute it anew"
        self.unclear.setdefault(base, why)
        while isinstance(new, Node) and new not in self.views and new.args:
            if new.target in WRITES:
                self.writes.append(Write(new, View(base)))
            new = new.args[0]


def _scattered_into(node: Node, source: View) -> View | None:
    """Return the part of `source` that a scatter of one row or slice replaces."""
    if node.target is aten.select_scatter.default:
        args = arguments(node)
        return source.then(select(args["dim"], args["index"], source.shape))
    if node.target is aten.slice_scatter.default:
        return source.then(slices(node, source.shape, value(node.args[1]).shape))
    return None


def _copies_written_back(graph: Graph) -> set[Node]:
    """Return the clones on the way to a copy_ at the end: index_copy_ ends in one."""
    todo = [end.args[1] for end in graph.find_nodes(op="call_function", target=aten.copy_.default)]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and node.op == "call_function" and node not in seen:
            seen.add(node)
            todo += node.args[: 2 if node.target in SCATTERS else 1]
    return {node for node in seen if node.target is aten.clone.default}


def _is_alias(node: Node) -> bool:
    """Whether the result of a node may share elements with its arguments."""
    if node.target is prims.convert_element_type.default:
        return bool(value(node).dtype == value(node.args[0]).dtype)
    if node.target is operator.getitem or node.target in RESHAPES:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info for result in schema.returns)


def _same_size(node: Node, other: Any) -> bool:
    return bool(value(node).dtype.itemsize == value(other).dtype.itemsize)


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
