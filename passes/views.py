"""View operators as steps that can be composed, compared, inverted and replayed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true, sym_eq
from torch.fx.node import map_arg

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


def value(arg: Any) -> Any:
    """Return what a node stands for at compile time; anything else stands for itself."""
    return arg.meta.get("val") if isinstance(arg, Node) else arg


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, indices or lists of them are provably equal; adds no guard."""
    a, b = value(a), value(b)
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return len(a) == len(b) and all(map(same, a, b))
    if a is None or b is None:
        return a is b
    return statically_known_true(sym_eq(a, b))


def same_by_guard(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are equal, here and by a guard on later calls.

    index_put guards on nothing, so sizes that have to be equal often carry unrelated symbols.
    """
    return len(a) == len(b) and bool(guard_or_false(sym_eq(tuple(a), tuple(b))))


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an operator call by their names in its schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {arg.name: got for arg, got in zip(schema, node.args, strict=False)}
    defaults = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return defaults | given | node.kwargs


def call(graph: Graph, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Insert `op(*args, **kwargs)` with its fake value."""
    node = graph.call_function(op, args, kwargs)
    fake_mode = next(x.fake_mode for x in map(value, graph.nodes) if hasattr(x, "fake_mode"))
    with fake_mode:
        fake_args, fake_kwargs = map_arg((args, kwargs), value)
        node.meta["val"] = op(*fake_args, **fake_kwargs)
    return node


def size_node(graph: Graph, node: Node, dim: int) -> int | Node:
    """Return a size of a node: a number, or a node that is inserted for it."""
    size = value(node).shape[dim]
    if isinstance(size, int):
        return size
    inserted = call(graph, aten.sym_size.int, node, dim)
    size = value(inserted)
    if isinstance(size, int):  # a guard has made it one
        graph.erase_node(inserted)
        return size
    return inserted


def calculate(graph: Graph, op: Callable[[Any, Any], Any], a: int | Node, b: int | Node) -> Any:
    """Return `op(a, b)` of two sizes: a number, or a node that is inserted for it."""
    return call(graph, op, a, b) if isinstance(a, Node) or isinstance(b, Node) else op(a, b)


@dataclass(frozen=True, eq=False)
class Step:
    """One view: `op(previous, *args)` of the given shape, where `kind` says how it composes."""

    kind: str  # "reshape", "permute", "select" or "slice"
    op: Callable[..., Tensor]
    args: tuple[Any, ...]
    shape: Sequence[Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Step) or self.kind != other.kind:
            return False
        return same(self.shape, other.shape) and (
            self.kind == "reshape" or same(self.args, other.args)
        )

    def __hash__(self) -> int:
        return hash(self.kind)

    def extent(self) -> tuple[int, int, int] | None:
        """Return (dim, start, stop) of the rows that a select or slice keeps, if they are known."""
        match self.kind, self.args:
            case "select", (int(dim), int(index)) if index >= 0:
                return dim, index, index + 1
            case "slice", (int(dim), int(start), int(stop), *_) if 0 <= start <= stop:
                return dim, start, stop
        return None


@dataclass(frozen=True)
class View:
    """`steps` applied to version `version` of the tensor `base`.

    Attributes:
        dtype: what its bits are read as, of the same size as the dtype of the base; None is that.
    """

    base: Node
    steps: tuple[Step, ...] = ()
    version: int = 0
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> Sequence[Any]:
        shape: Sequence[Any] = self.steps[-1].shape if self.steps else value(self.base).shape
        return shape

    def then(self, step: Step) -> View:
        """Return this view seen through one more step, dropping what the step undoes."""
        last = self.steps[-1] if self.steps else None
        if step.kind == "slice" and same(step.shape, self.shape):
            return self
        if step.kind == "reshape":
            for view in self.reshapes():
                if same(view.shape, step.shape):
                    return view
        if step.kind == "permute":
            order, rest = step.args[0], self
            if last is not None and last.kind == "permute":
                order = [last.args[0][dim] for dim in order]
                rest = replace(self, steps=self.steps[:-1])
            if order == sorted(order):
                return rest
            return replace(rest, steps=(*rest.steps, permute(order, step.shape)))
        return replace(self, steps=(*self.steps, step))

    def select(self, dim: int, index: Any) -> View:
        return self.then(select(dim, index, self.shape))

    def permute(self, order: Sequence[int]) -> View:
        return self.then(permute(order, [self.shape[dim] for dim in order]))

    def unsqueeze(self, dim: int) -> View:
        shape = [*self.shape[:dim], 1, *self.shape[dim:]]
        return self.then(Step("reshape", aten.unsqueeze.default, (dim,), shape))

    def view_as(self, dtype: torch.dtype) -> View:
        """Return this view with its bits read as another dtype of the same size."""
        return replace(self, dtype=None if dtype == value(self.base).dtype else dtype)

    def reshapes(self) -> list[View]:
        """Return this view and those before it that hold its elements in the same order."""
        views = [self]
        while views[-1].steps and views[-1].steps[-1].kind == "reshape":
            views.append(replace(self, steps=views[-1].steps[:-1]))
        return views

    def within(self, other: View) -> bool:
        """Whether all of this view lies inside `other`, by the steps that they share."""
        mine, others = _merged(self.steps), _merged(other.steps)
        return mine[: len(others)] == others

    def same_elements(self, other: View) -> bool:
        return self.within(other) and other.within(self)

    def disjoint(self, other: View) -> bool:
        """Whether the views provably share no element."""
        if self.base is not other.base:
            return True
        for mine, others in zip(self.steps, other.steps, strict=False):
            if mine != others:
                a, b = mine.extent(), others.extent()
                return (
                    a is not None
                    and b is not None
                    and a[0] == b[0]
                    and not (a[1] < b[2] and b[1] < a[2])
                )
        return False

    def replay(self, base: Tensor) -> Tensor:
        """Apply the steps to a tensor."""
        for step in self.steps:
            base = step.op(base, *map_arg(step.args, value))
        return base if self.dtype is None else base.view(self.dtype)

    def build(self, graph: Graph) -> Node:
        """Insert the steps, starting from the base itself."""
        node = self.base
        for step in self.steps:
            node = call(graph, step.op, node, *step.args)
        return node if self.dtype is None else call(graph, aten.view.dtype, node, self.dtype)

    def operands(self) -> list[Node]:
        """Return the nodes that hold symbolic sizes and indices of the steps."""
        nodes: list[Node] = []
        map_arg([step.args for step in self.steps], nodes.append)
        return nodes


def _merged(steps: tuple[Step, ...]) -> list[Step]:
    """Only the last of consecutive reshapes tells which elements come where."""
    return [
        step
        for step, following in zip(steps, (*steps[1:], None), strict=True)
        if not (step.kind == "reshape" and following is not None and following.kind == "reshape")
    ]


def permute(order: Sequence[int], shape: Sequence[Any]) -> Step:
    return Step("permute", aten.permute.default, (list(order),), shape)


def select(dim: int, index: Any, shape: Sequence[Any]) -> Step:
    """Return the step that keeps one row of a dimension of a tensor of `shape`."""
    dim %= len(shape)
    if isinstance(index, int) and isinstance(shape[dim], int):
        index %= shape[dim]
    return Step("select", aten.select.int, (dim, index), [*shape[:dim], *shape[dim + 1 :]])


def slices(node: Node, shape: Sequence[Any], sliced: Sequence[Any]) -> Step:
    """Return the step of a slice or slice_scatter node of a tensor of `shape`."""
    args = arguments(node)
    dim, size = args["dim"] % len(shape), shape[args["dim"]]

    def clip(bound: Any, missing: int) -> Any:
        bound = missing if bound is None else bound
        if isinstance(bound, int) and isinstance(size, int):
            return min(max(bound + size if bound < 0 else bound, 0), size)
        return bound

    bounds = (clip(args["start"], 0), clip(args["end"], sys.maxsize), args["step"])
    return Step("slice", aten.slice.Tensor, (dim, *bounds), sliced)


def view_step(node: Node, shape: Sequence[Any]) -> Step | None:
    """Return the step from a tensor of `shape` to the view `node` of it, if it is one."""
    if node.target in RESHAPES:
        return Step("reshape", node.target, node.args[1:], value(node).shape)
    if node.target not in (aten.permute.default, aten.select.int, aten.slice.Tensor):
        return None
    args = arguments(node)
    if node.target is aten.permute.default:
        return permute([dim % len(shape) for dim in args["dims"]], value(node).shape)
    if node.target is aten.select.int:
        return select(args["dim"], args["index"], shape)
    return slices(node, shape, value(node).shape)


def split_steps(node: Node, shape: Sequence[Any]) -> list[Step]:
    """Return the step from a tensor of `shape` to each part of its split, none if it is unknown."""
    dim = arguments(node)["dim"] % len(shape)
    if node.target is aten.unbind.int:
        return [select(dim, index, shape) for index in range(len(value(node)))]
    stops = list(itertools.accumulate(part.shape[dim] for part in value(node)))
    if not all(isinstance(stop, int) for stop in stops):
        return []
    starts = [0, *stops[:-1]]
    return [
        Step("slice", aten.slice.Tensor, (dim, start, stop, 1), part.shape)
        for start, stop, part in zip(starts, stops, value(node), strict=True)
    ]
