"""The private names of Inductor and Dynamo that the passes stand on, and nothing else does.

name                                      2.11    2.13 to 2.15
CustomGraphPass, get_hash_for_files       same    same
post_grad_custom_post_pass                one     one, a list or a tuple
CustomInferenceAwareGraphPass             none    called with is_inference=
counters replayed on a cache hit          same    same
torch._logging.trace_structured           same    same
torch._TorchCompileInductorWrapper        same    same, with an optional name
auto_functionalized_v2, try_use_slice     same    same
meta["inductor_realize_to_strides"]       same    same
AOTAutograd's names of training inputs    primals_<n>, tangents_<n>
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._higher_order_ops import auto_functionalize
from torch._higher_order_ops.auto_functionalize import (
    AsStridedViewInfo,
    SliceViewInfo,
    get_mutable_args,
    read_view_information_from_args,
)
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging._internal import trace_structured
from torch.fx import Graph, Node

import torch_tkv.ops
from torch_tkv.passes.views import same, value

__all__ = ["CustomGraphPass", "counters"]

GraphPass = Callable[..., None]
_try_use_slice: Any = auto_functionalize.try_use_slice
_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())


def validated(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a mode and options as one dict, or raise what Inductor raises."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def compile_graph(
    gm: torch.nn.Module, inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    compiler: Any = torch._TorchCompileInductorWrapper(None, options, None)
    with patch.object(auto_functionalize, "try_use_slice", _slice_of_base):
        compiled: Callable[..., Any] = compiler(gm, inputs)
    return compiled


def _slice_of_base(base: Tensor, tensor: Tensor) -> tuple[Any, Any, Any] | None:
    """Do not see a slice where the base has a storage offset: it would be counted as rows of it."""
    return _try_use_slice(base, tensor) if same(base.storage_offset(), 0) else None


def is_inference(graph: Graph) -> bool:
    names = ("primals_", "tangents_")
    return not any(n.op == "placeholder" and n.name.startswith(names) for n in graph.nodes)


def compute_at_once(node: Node) -> None:
    """Have Inductor compute a node where it stands, and not inside of those who use it.

    It inlines a pointwise node that reads a cache into users after an operator that mutates the
    cache: mutations by its own code realize such nodes, those by an operator do so too late.
    """
    node.meta["inductor_realize_to_strides"] = True


@dataclass(frozen=True)
class Region:
    """A mutated argument of a hand-written call: all of `base`, or what size and strides say."""

    base: Node
    strides: tuple[Sequence[Any], Sequence[Any], Any] | None


def is_call(node: Node) -> bool:
    """Whether a node is a hand-written call of ours, in the functional form of AOTAutograd."""
    functional = node.target is torch.ops.higher_order.auto_functionalized_v2
    return functional and getattr(node.args[0], "namespace", None) == "tkv"


def call_arguments(node: Node) -> tuple[dict[str, Any], dict[str, Region]]:
    """Return the arguments of a call by hand by name: those it reads, and those it mutates."""
    reads = dict(node.kwargs)
    bases: Any = reads.pop("_all_bases")
    operator: Any = node.args[0]
    infos = read_view_information_from_args(*get_mutable_args(operator), reads, bases)
    return reads, {name: _region(bases[info.base_index], info) for name, info in infos.items()}


def is_safe_call(node: Node) -> bool:
    """Whether Inductor itself compiles a hand-written call rightly, though it may copy caches.

    It does where every base is a storage of its own and nothing about the views is symbolic.
    """
    _, mutated = call_arguments(node)
    tensors = [value(base) for base in node.kwargs["_all_bases"]]  # type: ignore[union-attr]
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return len(storages) == len(tensors) and all(map(_is_static, mutated.values()))


def _is_static(region: Region) -> bool:
    if region.strides is None:
        return True
    size, stride, offset = region.strides
    numbers = (*size, *stride, offset, value(region.base).storage_offset())
    return all(isinstance(n, int) for n in numbers) and numbers[-1] == 0


def _region(base: Node, info: Any) -> Region:
    tensor = value(base)
    match info:
        case SliceViewInfo():
            # Inductor divides the offset in the storage, which is that in the base if it has none.
            size, stride, start = [*tensor.shape], tensor.stride(), value(info.start)
            size[info.dim] = value(info.end) - start
            return Region(base, (size, stride, start * stride[info.dim]))
        case AsStridedViewInfo():
            size, stride = [*map(value, info.size)], [*map(value, info.stride)]
            return Region(base, (size, stride, value(info.storage_offset)))
    return Region(base, None)


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


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add JSON to the trace that TORCH_TRACE=<folder> writes, for tlparse."""
    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


def cache_key(passes: tuple[GraphPass, ...], *options: Hashable) -> Hashable | None:
    """Return what code depends on: our sources and options, other passes; None if unknown."""
    keys = [p.uuid() if hasattr(p, "uuid") else None for p in passes]
    if None in keys:
        return None
    folders = (Path(__file__).parent, Path(torch_tkv.ops.__file__).parent)
    sources = sorted(str(path) for folder in folders for path in folder.glob("*.py"))
    return get_hash_for_files(tuple(sources)), torch.__version__, *options, *keys
