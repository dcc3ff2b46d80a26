"""Where operators with side effects may be placed in a graph."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

from torch.fx import Graph, Node

from torch_tkv.passes.cache_versions import mutated_arguments


class Order:
    """What must run before what in a graph, with operators still to be placed in it.

    Such an operator is any hashable object, or its node where it is in the graph already. Other
    nodes that mutate in place stay where they are: nothing is moved across them.
    """

    def __init__(self, graph: Graph, placing: Collection[Node] = ()) -> None:
        self._graph = graph
        self._before: dict[Any, list[Any]] = {}
        # None ranks below what it must follow, unless something was placed below what follows it.
        self._rank: dict[Any, int] = {}
        self._is_ranked = True
        last: list[Node] = []
        since: list[Node] = []
        for node in graph.nodes:
            self._rank[node] = len(self._rank)
            self._before[node] = [*node.all_input_nodes, *last]
            since.append(node)
            if node not in placing and mutated_arguments(node):
                self._before[node] += since[:-1]
                last, since = [node], []

    def allows(self, after: Iterable[Any], before: Iterable[Any]) -> bool:
        """Whether an operator can run after some items and before others."""
        todo, goals = [*after], set(before)
        lowest = min(map(self._rank_of, goals), default=0) if self._is_ranked else 0
        seen = set(todo)
        while todo:
            item = todo.pop()
            if item in goals:
                return False
            for x in self._before.get(item, ()):
                if x not in seen and self._rank_of(x) >= lowest:
                    seen.add(x)
                    todo.append(x)
        return True

    def _rank_of(self, item: Any) -> int:
        return self._rank.get(item, 0)

    def place(self, op: object, after: Iterable[Any], before: Iterable[Any]) -> None:
        """Have `op` run after some items and before others."""
        after, before = [*after], [*before]
        rank = max(map(self._rank_of, [op, *after]))
        moved = rank > self._rank.setdefault(op, rank)
        if moved or any(self._rank_of(item) < rank for item in before):
            self._is_ranked = False
        self._before.setdefault(op, []).extend(after)
        for item in before:
            self._before.setdefault(item, []).append(op)

    def sort(self) -> None:
        """Reorder the graph: a node moves up where something above it has to follow it."""
        done: dict[Any, None] = {}
        edges = sum(map(len, self._before.values()))
        for node in self._graph.nodes:
            todo = [node]
            while todo:
                missing = [x for x in self._before[todo[-1]] if x not in done]
                if not missing:
                    done[todo.pop()] = None
                todo += reversed(missing)
                assert len(todo) <= edges + 1, "an operator was placed in a circle"
        nodes = list(done)
        for node, following in itertools.pairwise(nodes):
            if node.next is not following:
                node.append(following)
