"""Compile a function with the passes and hold it against the uncompiled one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from paged import clone_storages, storage
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx, view_to_reshape
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from torch_tkv.passes.pipeline import Pipeline


class Recorder(Pipeline):
    """The passes, and the text of the graph that they leave."""

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        self.text = graph_text(graph)


def graph_text(graph: Graph) -> str:
    """Return the calls of a graph, with nodes numbered: the same text on every version."""
    names: dict[Node, str] = {}
    lines = []

    def show(arg: Any) -> str:
        if isinstance(arg, Sequence) and not isinstance(arg, str):
            return f"[{', '.join(map(show, arg))}]"
        return names.get(arg, str(arg))

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"input{len(names)}"
        elif node.op == "call_function":
            names[node] = f"%{len(lines)}"
            args = [*map(show, node.args), *(f"{k}={show(v)}" for k, v in node.kwargs.items())]
            name = str(node.target).removeprefix("aten.").rsplit(".", 1)[0]
            lines.append(f"{names[node]} = {name}({', '.join(args)})")
    return "\n".join(lines)


@dataclass
class Compiled:
    matched: int
    text: str
    code: str


def run_compiled(
    function: Callable[..., Any],
    caches: Sequence[Tensor],
    *args: Tensor,
    buffers: bool = False,
    generate: bool = True,
    rtol: float = 0.0,
    **options: Any,
) -> Compiled:
    """Run `function(*caches, *args)` compiled and not; require equal results and equal storages.

    Args:
        buffers: have the caches as buffers of a module, not as inputs.
        generate: have Inductor generate code; else run the graph after its post-grad passes.
        rtol: how far the storages may differ, relatively and absolutely.
        options: further arguments of torch.compile.
    """
    recorder = Recorder()
    copies = clone_storages(*caches)
    for cache, copy in zip(caches, copies, strict=True):
        for name in ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices"):
            if hasattr(cache, name):
                setattr(copy, name, getattr(cache, name))
    expected = function(*caches, *args)
    target, inputs = (Buffers(function, copies), args) if buffers else (function, (*copies, *args))
    with config.patch(post_grad_custom_post_pass=recorder):
        if generate:
            got, codes = run_and_get_code(torch.compile(target, fullgraph=True, **options), *inputs)
        else:
            codes = [""]
            got = torch.compile(target, fullgraph=True, backend=post_grad_only, **options)(*inputs)
    for cache, copy in zip(caches, copies, strict=True):
        if rtol:
            torch.testing.assert_close(storage(copy), storage(cache), rtol=rtol, atol=rtol)
        else:
            assert torch.equal(storage(cache), storage(copy))
    pytree.tree_map(lambda a, b: torch.testing.assert_close(a, b), expected, got)
    return Compiled(recorder.matched, recorder.text, codes[0])


class Buffers(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], caches: Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.count = function, len(caches)
        for i, cache in enumerate(caches):
            self.register_buffer(f"cache{i}", cache)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*(getattr(self, f"cache{i}") for i in range(self.count)), *args)


def post_grad_only(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that stops before Inductor's code generation, which takes seconds."""

    def run_graph(gm: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        with V.set_fake_mode(detect_fake_mode(inputs)):
            view_to_reshape(gm)
            _recursive_post_grad_passes(gm, is_inference=True)
        return make_boxed_func(gm.forward)

    return compile_fx(gm, example_inputs, inner_compile=run_graph)


def cache_sized(code: str, numel: int, symbol: int) -> list[str]:
    """Return the buffers and copies of at least `numel` elements in generated code.

    `symbol` stands in for every symbolic size.
    """
    body = code[code.index("def call(") :]
    found = re.findall(r"cpp_fused_\w*(?:index_put|(?<!_to_)copy_)\w*\(", body)
    for sizes in re.findall(r"empty_strided\w*\(\(([^)]*)\)", body):
        # A size may be an expression, such as 2*s7 + 1.
        numbers = re.sub(r"s\d+", str(symbol), sizes).rstrip(", ")
        if math.prod(eval(f"[{numbers}]")) >= numel:
            found.append(sizes)
    return found
