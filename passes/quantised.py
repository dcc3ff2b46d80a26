"""convert(clamp(x / scale), float8) => x and scale, which an operator divides, saturates and rounds

Read back what a value was cast from, where an operator of ours does the same cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.torch_version import TorchVersion

from torch_tkv.passes.views import arguments, call, same, value

aten, prims = torch.ops.aten, torch.ops.prims

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What is too large for float8_e4m3fn is cast to its largest value from torch 2.13 on, else to NaN.
SATURATING = (torch.float8_e4m3fn,) if TorchVersion(torch.__version__) >= "2.13" else ()
CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)
FP8S = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Cast:
    """`source / scale`, saturated and rounded once to another dtype.

    Attributes:
        scale: a node, a number, or None for 1.
        divided: the node of `source / scale`, where there is a scale.
        exact: whether eager PyTorch rounds no more than that. Where it rounds the quotient to 16
            bits first, Inductor does so too on CPU, but not on GPUs: it computes in float32 there
            and rounds once, as the operators do.
    """

    source: Node
    scale: Node | float | None = None
    divided: Node | None = None
    exact: bool = True

    @property
    def quotient(self) -> Node:
        return self.divided or self.source


def uncast(node: Node, dtype: torch.dtype) -> Cast | None:
    """Return what a value was before it was cast to `dtype`, explicitly or by being written there.

    None means that the operators would round it differently, or that there was no such cast.
    """
    explicit = is_cast(node) and value(node).dtype == dtype
    before = node.args[0] if explicit else node
    if not isinstance(before, Node) or value(before).dtype not in FLOATS:
        return None
    if dtype in FP8S:
        return _unscaled(before, dtype)
    # A cast to fewer bits is better done by whatever computes the value.
    wider = value(before).dtype.itemsize > dtype.itemsize
    return None if wider and explicit else Cast(before)


def scale_tensor(graph: Graph, scale: Node | float, device: torch.device) -> Node:
    """Insert a scale as a float32 tensor of no or one dimension."""
    if not isinstance(scale, Node):
        options = {"dtype": torch.float32, "device": device, "pin_memory": False}
        return call(graph, aten.full.default, [], float(scale), **options)
    if value(scale).dtype != torch.float32:
        scale = call(graph, prims.convert_element_type.default, scale, torch.float32)
    shape = [] if same(value(scale).numel(), 1) else [-1]
    if value(scale).dim() != len(shape):
        scale = call(graph, aten.reshape.default, scale, shape)
    return scale


def scale_dims(scale: Node | float | None, rank: int) -> list[int]:
    """Return the dimensions of a value of `rank` dimensions along which its scale varies."""
    shape: Sequence[Any] = value(scale).shape if isinstance(scale, Node) else ()
    return [rank - len(shape) + dim for dim, size in enumerate(shape) if not same(size, 1)]


def _unscaled(node: Node, dtype: torch.dtype) -> Cast | None:
    limit = torch.finfo(dtype).max
    inner, low, high, exact = _unclamped(node)
    as_eager = value(node).device.type == "cpu"
    if not (-limit <= low and high <= limit) and dtype not in SATURATING:
        return None
    if low > -limit or high < limit or (as_eager and not exact):
        return Cast(node)
    if inner.target is aten.div.Tensor:
        source, scale = inner.args
        if _is_scaled(inner, source, scale):
            wide = value(inner).dtype == torch.float32
            if wide or not as_eager:
                return Cast(_widened(source), scale, inner, exact and wide)  # type: ignore[arg-type]
    return Cast(_widened(inner), exact=exact)


def _unclamped(node: Node) -> tuple[Node, float, float, bool]:
    """Return what a value was before clamps and casts, the bounds, and whether no cast rounded."""
    low, high, dtypes = float("-inf"), float("inf"), {torch.float32}
    while node.target in CLAMPS or is_cast(node):
        source: Any = node.args[0]
        bounds = {} if is_cast(node) else arguments(node)
        least, most = bounds.get("min"), bounds.get("max")
        if value(source).dtype not in FLOATS or isinstance(least, Node) or isinstance(most, Node):
            break
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
        dtypes.add(value(node).dtype)
        node = source
    return node, low, high, dtypes <= {torch.float32, value(node).dtype}


def _widened(node: Node) -> Node:
    """Return what a float32 value was before it was cast from fewer bits, which loses nothing."""
    before = node.args[0] if is_cast(node) and value(node).dtype == torch.float32 else None
    return before if isinstance(before, Node) and value(before).dtype in FLOATS else node


def is_cast(node: Node) -> bool:
    """Whether a node casts to another dtype."""
    return node.target is prims.convert_element_type.default


def _is_scaled(quotient: Node, source: Any, scale: Any) -> bool:
    """Whether `source / scale` is a tensor by a number, or by a tensor that broadcasts to it."""
    if not isinstance(source, Node) or value(source).dtype not in FLOATS:
        return False
    if isinstance(scale, Node):
        fits = same(value(source).shape, value(quotient).shape)
        return fits and value(scale).dtype in FLOATS
    return isinstance(scale, float | int)
