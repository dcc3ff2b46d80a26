"""Rows of attention's result: the softmax is ended, the values scaled, rounded and stored."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from torch_tkv.kernels.attention_tiles import LOG2E, scale_of_head
from torch_tkv.kernels.cache_tiles import to_cache

LN2 = tl.constexpr(math.log(2))


class Result(NamedTuple):
    """Where a tile of queries goes, and what it takes to finish it."""

    out: Any  # [T, Hq, Dv]
    lse_out: Any  # None or [T, Hq]
    value_cache: Any
    sinks: Any  # None or [Hq]
    output_scale: Any  # None or []
    num_heads: Any  # Hq


@triton.jit
def finish(acc, highest, total, sink):
    """Return the weighted mean of the values, and the log2 of the sum of the weights.

    `sink` is None, or the score in units of log2 of one more key, without a value.
    """
    nothing = total == 0.0  # a query that sees no key gives zeros
    if sink is not None:
        top = tl.maximum(highest, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.exp2(sink - shift)
        acc = acc * rescale
        highest = top
    lse = tl.where(nothing, float("-inf"), highest + tl.log2(total))
    return acc * (1.0 / tl.where(nothing, 1.0, total)), lse


@triton.jit
def finish_rows(result, acc, highest, total, head, inside, kv_head, SATURATES: tl.constexpr):
    """Return rows of the result, and the log2 of their sums of weights."""
    sink = None
    if result.sinks is not None:
        sink = tl.load(result.sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
    mean, lse = finish(acc, highest, total, sink)
    mean *= scale_of_head(result.value_cache, kv_head)
    dtype: tl.constexpr = result.out.dtype.element_ty
    return to_cache(mean, result.output_scale, None, head, inside, dtype, SATURATES), lse


@triton.jit
def store_rows(result, x, lse, token, head, dim, inside, plan: tl.constexpr):
    """Store what `finish_rows` returned; all tiles are of one shape, or broadcast to it."""
    row = token.to(tl.int64) * result.num_heads + head
    inside = inside & (dim < plan.value_size)
    tl.store(result.out + row * plan.value_size + dim, x, mask=inside)
    if result.lse_out is not None:
        # Each row is stored by its first column.
        tl.store(result.lse_out + row + 0 * dim, lse * LN2, mask=inside & (dim == 0))


@triton.jit
def store_result(
    result,
    acc,
    highest,
    total,
    token,
    head,
    dim,
    inside,
    kv_head,
    SATURATES: tl.constexpr,
    plan: tl.constexpr,
):
    """Finish and store rows of the result; all tiles are of one shape, or broadcast to it."""
    x, lse = finish_rows(result, acc, highest, total, head, inside, kv_head, SATURATES)
    store_rows(result, x, lse, token, head, dim, inside, plan)
