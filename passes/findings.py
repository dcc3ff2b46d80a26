"""What the passes have found in one graph so far."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch.fx import Node

import torch_tkv.ops
from torch_tkv.passes.report import Layer

# The public functions of the operators: what calls them is of interest.
_OPS = Path(torch_tkv.ops.__file__).parent


class Findings:
    """The layers of a graph, by the node that does the write: an operator of ours where fused.

    Attributes:
        padding: what a negative slot means: "wrap" or "skip".
        layers: in the order of the graph.
        attention: what became of attention whose output is quantised.
    """

    def __init__(self, padding: str = "wrap") -> None:
        self.padding = padding
        self.layers: dict[Node, Layer] = {}
        self.attention: list[Layer] = []

    def fuse(self, old: Node, new: Node, fused: str) -> None:
        """Say that the operator `new` took the place of `old` and does more: `fused`."""
        self.layers = {
            new if node is old else node: replace(layer, fused=fused) if node is old else layer
            for node, layer in self.layers.items()
        }

    def refuse(self, node: Node, reason: str) -> None:
        """Say why no more was fused with the operator `node`, and what to change."""
        self.layers[node] = replace(self.layers[node], reason=reason)


def module(node: Node) -> str:
    """Return the path of the module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = str(list(stack.values())[-1][0])
    return re.sub(r"^[LG]\['\w+'\]\.?", "", path)


def source(nodes: Iterable[Node]) -> str:
    """Return file:line of each statement that nodes were traced from."""
    return ", ".join(dict.fromkeys(map(_line, nodes)))


def _line(node: Node) -> str:
    lines = re.findall(r'File "(.*)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [(Path(file), line) for file, line in lines if Path(file).parent != _OPS]
    return f"{lines[-1][0].name}:{lines[-1][1]}" if lines else "?"
