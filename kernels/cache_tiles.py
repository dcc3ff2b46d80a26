"""Tiles of the cache-writing kernels: where a token goes, and how its rows are rounded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The largest finite value of a cache dtype that saturates; None for those that round to infinity.
SATURATES_AT = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@triton.jit
def find_slot(
    slot_mapping,  # [<= T]
    token,
    stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    WRAP: tl.constexpr,
):
    """Return the slot of `token`, or -1 where it is not to be written."""
    slot = tl.load(slot_mapping + token * stride, mask=token < num_mapped, other=-1).to(tl.int64)
    if WRAP:
        slot = tl.where(slot < 0, slot + num_slots, slot)
    tl.device_assert(slot < num_slots, "slot_mapping: a slot lies outside the cache")
    return tl.where(slot < num_slots, slot, -1)


@triton.jit
def to_cache(
    x,  # [heads, dims] float
    scale,  # None, or a pointer to float32 [] or [Hkv]
    scale_stride,  # 0 where all heads share a scale
    head,  # [heads, 1]
    inside,  # [heads, 1]
    DTYPE: tl.constexpr,
    SATURATES_AT: tl.constexpr,
):
    """Return `x / scale`, saturated, rounded once to the dtype of a cache."""
    if scale is not None:
        factor = tl.load(scale + head * scale_stride, mask=inside, other=1.0)
        x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(factor, x.shape))
    if SATURATES_AT is not None:
        limit: tl.constexpr = SATURATES_AT
        x = tl.clamp(x.to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)
