"""What each element of a head is computed from, however a model spells it."""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from collections.abc import Collection, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torch_tkv.passes.indices import (
    CASTS,
    SAME_INDEX,
    VIEWS,
    Index,
    Lanes,
    Leaf,
    UnreadError,
    as_dim,
    broadcast,
    dims_and_part,
    is_exact_cast,
    lanes_of,
    layout_of,
    numbers,
    through,
)
from torch_tkv.passes.views import SPLITS, arguments, value

aten = torch.ops.aten

# Note [Elements of a head]
# To recognise a rotation or a norm by what it computes, and not by how it is spelled, the D
# elements of one head of one token are followed back through the graph. `Elements` writes each as a
# polynomial in elements of a few leaves: with rotate_half, chunk, stack, complex numbers or a
# partial rotation alike, element 0 is {x[0] cos[0]: 1, x[D / 2] sin[0]: -1}.

ARITHMETIC = (
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.addcmul.default,
)
FOLLOWED = {*SAME_INDEX, aten.expand.default, *VIEWS, *SPLITS, *ARITHMETIC, aten.cat.default}
# Coefficients of products of elements; an element is the number of a leaf and that of a lane of it.
Polynomial = dict[tuple[tuple[int, int], ...], float]


class Elements:
    """Follows elements back to `sources` and to what these are combined with.

    Args:
        sources: nodes that are leaves.
        lanes: how many elements are followed at once.
        dtypes: of what is computed from the sources: others round differently.
        first: the first node that computes the same, see `first_of_equals`.
    """

    def __init__(
        self,
        sources: Collection[Node],
        lanes: int,
        dtypes: Collection[torch.dtype],
        first: dict[Node, Node],
    ) -> None:
        self.leaves: list[Leaf] = []
        self._sources, self._lanes, self._dtypes, self._first = sources, lanes, dtypes, first
        self._numbers: dict[Leaf, int] = {}
        self._depends: dict[Node, bool] = dict.fromkeys(sources, True)

    def __call__(self, node: Any, index: Index) -> list[Polynomial]:
        """Return the elements of a node at an index, or those of a number.

        Raises:
            UnreadError: a source takes part in what is not followed.
        """
        if not isinstance(node, Node):
            return [{(): float(node)} for _ in range(self._lanes)]
        if node in self._sources:
            return self._leaf(node, index)
        depends = self._depend(node)
        if depends and isinstance(value(node), Tensor) and value(node).dtype not in self._dtypes:
            raise UnreadError
        if node.target not in CASTS or depends or is_exact_cast(node):
            if step := through(node, index, self._lanes):
                return self(*step)
            if node.target is aten.cat.default:
                return self._cat(node, index)
            if node.target is aten.neg.default or (depends and node.target in ARITHMETIC):
                return self._arithmetic(node, index)
        if depends:
            raise UnreadError
        return self._leaf(node, index)

    def _depend(self, node: Node) -> bool:
        """Whether a source takes part, by operators that are followed."""
        if node not in self._depends:
            followed = is_followed(node)
            inputs = node.all_input_nodes if followed else []
            self._depends[node] = any(self._depend(x) for x in inputs)
        return self._depends[node]

    def _leaf(self, node: Node, index: Index) -> list[Polynomial]:
        first = node if node in self._sources else self._first.get(node, node)
        leaf = Leaf(first, layout_of(index))
        number = self._numbers.setdefault(leaf, len(self.leaves))
        if number == len(self.leaves):
            self.leaves.append(leaf)
        return [{((number, lane),): 1.0} for lane in lanes_of(index, self._lanes)]

    def _cat(self, node: Node, index: Index) -> list[Polynomial]:
        args = arguments(node)
        dims, part = dims_and_part(node, index)
        dim = args["dim"] % len(dims)
        at = numbers(dims[dim], self._lanes)
        if at is None:
            raise UnreadError
        elements: list[Polynomial] = [{}] * self._lanes
        start = 0
        for tensor in args["tensors"]:
            size = value(tensor).shape[dim] if value(tensor).dim() == len(dims) else None
            if not isinstance(size, int):
                raise UnreadError
            inside = [start <= i < start + size for i in at]
            here = Lanes(
                tuple(i - start if x else 0 for i, x in zip(at, inside, strict=True)), size
            )
            found = self(tensor, (*dims[:dim], as_dim(here), *dims[dim + 1 :], *part))
            elements = [f if x else e for f, x, e in zip(found, inside, elements, strict=True)]
            start += size
        return elements

    def _arithmetic(self, node: Node, index: Index) -> list[Polynomial]:
        args: Sequence[Any] = node.args
        target: Any = node.target
        op = target.overloadpacket
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("value", 1) != 1:
            raise UnreadError
        if op is aten.pow:
            if args[1] != 2:
                raise UnreadError
            args, op = (args[0], args[0]), aten.mul
        if value(node).is_complex():
            if not all(isinstance(arg, Node) and value(arg).is_complex() for arg in args):
                raise UnreadError
            if op is aten.mul:
                return self._complex_product(node, args, index)
        first, *others = (self(arg, broadcast(arg, node, index)) for arg in args)
        if op is aten.neg:
            return [_scaled(x, -1.0) for x in first]
        other = others[0]
        if op is aten.mul:
            return [_product(x, y) for x, y in zip(first, other, strict=True)]
        if op is aten.sub:
            other = [_scaled(x, -1.0) for x in other]
        if op is aten.addcmul:
            other = [_product(x, y) for x, y in zip(*others, strict=True)]
        return [_sum(x, y) for x, y in zip(first, other, strict=True)]

    def _complex_product(self, node: Node, args: Sequence[Node], index: Index) -> list[Polynomial]:
        """Multiply (a + b i) (c + d i), of which a lane is the real part or the imaginary one."""
        parts = [Lanes((part,) * self._lanes, 2) for part in (0, 1)]
        (a, b), (c, d) = (
            [self(arg, broadcast(arg, node, (*index[:-1], (part,)))) for part in parts]
            for arg in args
        )
        imaginary = numbers(index[-1], self._lanes)
        assert imaginary is not None
        return [
            _sum(_product(a[i], d[i]), _product(b[i], c[i]))
            if imaginary[i]
            else _sum(_product(a[i], c[i]), _scaled(_product(b[i], d[i]), -1.0))
            for i in range(self._lanes)
        ]


def is_followed(node: Node) -> bool:
    """Whether `Elements` looks through a node."""
    if node.target is operator.getitem:
        split: Any = node.args[0]
        return split.target in SPLITS
    return node.target in FOLLOWED


def _scaled(x: Polynomial, factor: float) -> Polynomial:
    return {elements: coefficient * factor for elements, coefficient in x.items()}


def _sum(x: Polynomial, y: Polynomial) -> Polynomial:
    total = defaultdict(float, x)
    for elements, coefficient in y.items():
        total[elements] += coefficient
    return {elements: coefficient for elements, coefficient in total.items() if coefficient}


def _product(x: Polynomial, y: Polynomial) -> Polynomial:
    product: Polynomial = defaultdict(float)
    for a, m in x.items():
        for b, n in y.items():
            product[tuple(sorted(a + b))] += m * n
    return dict(product)


def cone(node: Node) -> list[Node]:
    """Return what a node is computed from by operators that are followed, nearest first."""
    nodes = {node: None}
    todo = deque(nodes)
    while todo:
        node = todo.popleft()
        new = [x for x in node.all_input_nodes if is_followed(node) and x not in nodes]
        nodes.update(dict.fromkeys(new))
        todo.extend(new)
    return list(nodes)


def first_of_equals(graph: Graph, unstable: Container[Node]) -> dict[Node, Node]:
    """Return for each node the first that computes the same: inference graphs know no CSE.

    Args:
        unstable: nodes whose contents change while the graph runs.
    """
    first: dict[Node, Node] = {}
    seen: dict[Any, Node] = {}
    for node in graph.nodes:
        pure = isinstance(node.target, torch._ops.OpOverload) and not (
            node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if pure and not any(x in unstable for x in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), lambda x: first.get(x, x))
            first[node] = seen.setdefault((node.target, str(args), str(kwargs)), node)
    return first
