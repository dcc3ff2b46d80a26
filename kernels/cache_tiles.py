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
    mapped = token < num_mapped
    slot = tl.load(slot_mapping + token * stride, mask=mapped, other=-1).to(tl.int64)
    if WRAP:
        slot = tl.where(mapped & (slot < 0), slot + num_slots, slot)
    tl.device_assert(slot < num_slots, "slot_mapping: a slot lies outside the cache")
    return tl.where((slot >= 0) & (slot < num_slots), slot, -1)


@triton.jit
def load_rows(
    rows,  # [T, Hkv, D]
    token,  # [tokens, 1, 1]
    head,  # [1, heads, 1]
    inside,  # [tokens, heads, 1]
    stride_t,
    stride_h,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the tile [tokens, heads, BLOCK] of `rows`, zero outside of it."""
    dim = tl.arange(0, BLOCK)[None, None, :]
    place = rows + token.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h + dim
    return tl.load(place, mask=inside & (dim < SIZE), other=0.0)


@triton.jit
def store_rows(
    x,  # [tokens, heads, dims]
    cache,  # [N, P, Hkv, D / X, X]
    slot,  # [tokens, 1, 1], -1 where nothing is to be written
    head,  # [1, heads, 1]
    inside,  # [tokens, heads, 1]
    strides,  # of blocks, slots, heads and chunks of X elements
    P: tl.constexpr,
    SIZE: tl.constexpr,
    X: tl.constexpr,  # None where a head is one chunk
):
    """Store a tile that has the dtype of `cache` into its slots."""
    dim = tl.arange(0, x.shape[2])[None, None, :]
    row = (slot // P) * strides[0] + (slot % P) * strides[1] + head.to(tl.int64) * strides[2]
    element = dim
    if X is not None:
        element = (dim // X).to(tl.int64) * strides[3] + dim % X
    tl.store(cache + row + element, x, mask=inside & (slot >= 0) & (dim < SIZE))


@triton.jit
def to_cache(
    x,  # [..., heads, dims] float
    scale,  # None, or a pointer to float32 [] or [Hkv]
    scale_stride,  # None or 0 where all heads share a scale
    head,  # [..., heads, 1]
    inside,  # [..., heads, 1]
    DTYPE: tl.constexpr,
    SATURATES_AT: tl.constexpr,
):
    """Return `x / scale`, saturated, rounded once to the dtype of a cache."""
    if scale is not None:
        if scale_stride is None:
            factor = tl.load(scale)
        else:
            factor = tl.load(scale + head * scale_stride, mask=inside, other=1.0)
        x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(factor, x.shape))
    if SATURATES_AT is not None:
        limit: tl.constexpr = SATURATES_AT
        x = tl.clamp(x.to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)
