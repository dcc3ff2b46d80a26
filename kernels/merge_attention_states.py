"""Merge attention over two sets of keys: the mean of both, weighted by exp(lse) of each.

T query tokens, Hq heads, head size Dv. One program merges a few rows (token, head).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.launcher import Launch


@triton.jit
def _share(
    outs,  # [T, Hq, Dv]
    place,  # [BLOCK_R, BLOCK_D]
    inside,
    lse,  # [BLOCK_R]
    other,  # [BLOCK_R]
):
    """Return what one state adds to the merged one: nothing where it saw no key."""
    used = lse != float("-inf")
    x = tl.load(outs + place, mask=inside & used[:, None], other=0.0).to(tl.float32)
    # Not from the merged lse, which loses the digits of the sum where both are large.
    one = tl.full(lse.shape, 1.0, tl.float32)
    weight = tl.where(used, tl.div_rn(one, 1.0 + tl.exp(other - lse)), 0.0)
    return x * weight[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _merge_attention_states(
    out,  # [T, Hq, Dv], contiguous
    lse,  # float32 [T, Hq], contiguous
    out_a,  # [T, Hq, Dv]
    lse_a,  # [T, Hq]
    out_b,  # [T, Hq, Dv]
    lse_b,  # [T, Hq]
    out_a_stride_t,
    out_a_stride_h,
    lse_a_stride_t,
    lse_a_stride_h,
    out_b_stride_t,
    out_b_stride_h,
    lse_b_stride_t,
    lse_b_stride_h,
    num_rows,  # T * Hq
    HQ: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = row // HQ, row % HQ
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_row = row < num_rows
    inside = is_row[:, None] & (dim < DV)
    place_a = token * lse_a_stride_t + head * lse_a_stride_h
    place_b = token * lse_b_stride_t + head * lse_b_stride_h
    a = tl.load(lse_a + place_a, mask=is_row, other=float("-inf"))
    b = tl.load(lse_b + place_b, mask=is_row, other=float("-inf"))
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(a, b)
    # Two of -inf: their difference is NaN, their sum -inf.
    both = tl.where(low == float("-inf"), top, top + tl.log(1.0 + tl.exp(low - top)))
    rows_a = (token * out_a_stride_t + head * out_a_stride_h)[:, None]
    rows_b = (token * out_b_stride_t + head * out_b_stride_h)[:, None]
    merged = _share(out_a, rows_a + dim, inside, a, b)
    merged += _share(out_b, rows_b + dim, inside, b, a)
    tl.store(out + row[:, None] * DV + dim, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, both, mask=is_row)


class Plan(NamedTuple):
    """How to launch: the grid and the tile of a few rows."""

    grid: tuple[int]
    BLOCK_R: int
    BLOCK_D: int
    num_warps: int


def plan(rows: int, value_size: int) -> Plan:
    """Plan the merge of `rows` = T * Hq rows of `value_size`."""
    block_d = triton.next_power_of_2(value_size)
    block_r = max(2048 // block_d, 1)
    return Plan((triton.cdiv(rows, block_r),), block_r, block_d, 4)


def prepare(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Launch:
    """Describe the launch of a merge; arguments as in `torch_tkv.merge_attention_states`."""
    tokens, heads, value_size = out_a.shape
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    grid, *blocks, num_warps = plan(tokens * heads, value_size)
    return Launch(
        _merge_attention_states,
        grid,
        (out, lse, out_a, lse_a, out_b, lse_b),
        (
            *out_a.stride()[:2],
            *lse_a.stride(),
            *out_b.stride()[:2],
            *lse_b.stride(),
            tokens * heads,
        ),
        (heads, value_size, *blocks),
        {"num_warps": num_warps},
        out=(out, lse),
    )
