"""The private names of Inductor and Dynamo that the passes stand on, and nothing else does.

name                                      2.11    2.13 to 2.15
CustomGraphPass, get_hash_for_files       same    same
post_grad_custom_post_pass                one     one, a list or a tuple
CustomInferenceAwareGraphPass             none    called with is_inference=
counters replayed on a cache hit          same    same
torch._TorchCompileInductorWrapper        same    same, with an optional name
AOTAutograd's names of training inputs    primals_<n>, tangents_<n>
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

import torch_tkv.ops

__all__ = ["CustomGraphPass", "counters"]

GraphPass = Callable[..., None]
_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())


def validated(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a mode and options as one dict, or raise what Inductor raises."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def compile_graph(
    gm: torch.nn.Module, inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    compiler: Any = torch._TorchCompileInductorWrapper(None, options, None)
    compiled: Callable[..., Any] = compiler(gm, inputs)
    return compiled


def is_inference(graph: Graph) -> bool:
    names = ("primals_", "tangents_")
    return not any(n.op == "placeholder" and n.name.startswith(names) for n in graph.nodes)


def configured_passes(options: dict[str, Any]) -> tuple[GraphPass, ...]:
    """Return the post_grad_custom_post_pass of `options`, else of the global configuration."""
    passes = options.get("post_grad_custom_post_pass", config.post_grad_custom_post_pass)
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, list | tuple) else (passes,)


def run_pass(graph_pass: GraphPass, graph: Graph) -> None:
    """Run a pass the way Inductor does."""
    if isinstance(graph_pass, _InferenceAware):
        graph_pass(graph, is_inference=is_inference(graph))
    else:
        graph_pass(graph)


def cache_key(passes: tuple[GraphPass, ...]) -> Hashable | None:
    """Return what compiled code depends on: our sources, torch, other passes; None if unknown."""
    keys = [p.uuid() if hasattr(p, "uuid") else None for p in passes]
    if None in keys:
        return None
    folders = (Path(__file__).parent, Path(torch_tkv.ops.__file__).parent)
    sources = sorted(str(path) for folder in folders for path in folder.glob("*.py"))
    return get_hash_for_files(tuple(sources)), torch.__version__, *keys
