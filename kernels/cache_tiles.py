"""Tiles of the cache-writing kernels: where a token goes, and how its rows are rounded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest finite value of a cache dtype that saturates; None for those that round to infinity.
SATURATES_AT = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def as_slots(*caches: Tensor) -> tuple[Tensor, ...]:
    """Return caches [N, P, ...] as [N * P, 1, ...], if blocks adjoin in all of them.

    A slot of a block of one needs no division to be found.
    """
    if all(cache.stride(0) == cache.shape[1] * cache.stride(1) for cache in caches):
        return tuple(cache.flatten(0, 1).unsqueeze(1) for cache in caches)
    return caches


def fixed(*values: int) -> tuple[tl.constexpr, ...]:
    """Return values that a kernel is compiled for, as it is for None, in a parameter that is plain.

    The strides of a cache are such: they are the same in every call. What changes from call to call
    has to be an argument, or every new value compiles the kernel again.
    """
    return tuple(map(tl.constexpr, values))


def row_strides(rows: Tensor) -> tuple[int | tl.constexpr, ...]:
    """Return the first two strides of `rows` [T, Hkv, D] or [T, R], fixed where calls share them.

    A dimension of one may have any stride: it is 0 here. Heads that are farther apart than tokens,
    as in [Hkv, T, D], are so by the number of tokens: their stride is an argument.
    """
    first, second = (rows.stride(dim) if rows.shape[dim] > 1 else 0 for dim in (0, 1))
    is_shared = rows.stride(1) <= rows.stride(0)
    return (*fixed(first), tl.constexpr(second) if is_shared else second)


@triton.jit
def find_slot(
    slot_mapping,  # [<= T]
    token,
    stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    WRAP: tl.constexpr,
):
    """Return the slot of `token`, or -1 where it is not to be written; an integer as num_slots."""
    mapped = token < num_mapped
    slot = tl.load(slot_mapping + token * stride, mask=mapped, other=-1).to(tl.int64)
    if WRAP:
        slot = tl.where(mapped & (slot < 0), slot + num_slots, slot)
    tl.device_assert(slot < num_slots, "slot_mapping: a slot lies outside the cache")
    # What is negative is beyond num_slots when taken as unsigned.
    inside = slot.to(tl.uint64) < num_slots.to(tl.uint64)
    return tl.where(inside, slot.to(num_slots.dtype), -1)


@triton.jit
def load_rows(
    rows,  # [T, Hkv, D]
    token,  # [tokens, 1, 1]
    head,  # [1, heads, 1]
    inside,  # [tokens, heads, 1]
    strides,  # of tokens and heads
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the tile [tokens, heads, BLOCK] of `rows`, zero outside of it."""
    dim = tl.arange(0, BLOCK)[None, None, :]
    place = rows + token.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + dim
    return tl.load(place, mask=inside & (dim < SIZE), other=0.0)


@triton.jit
def find_rows(
    slot,  # [tokens, 1, 1], -1 for none
    head,  # [1, heads, 1]
    strides,  # of blocks, slots and heads
    P: tl.constexpr,
):
    """Return where in a cache the rows [tokens, heads, 1] start."""
    row = (slot // P).to(tl.int64) * strides[0] + (slot % P).to(tl.int64) * strides[1]
    return row + head.to(tl.int64) * strides[2]


@triton.jit
def store_rows(
    x,  # [tokens, heads, dims]
    cache,  # [N, P, Hkv, D]
    slot,  # [tokens, 1, 1], -1 where nothing is to be written
    head,  # [1, heads, 1]
    inside,  # [tokens, heads, 1], or [1, heads, 1]
    strides,  # of blocks, slots and heads
    P: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store a tile that has the dtype of `cache` into its slots."""
    dim = tl.arange(0, x.shape[2])[None, None, :]
    place = cache + find_rows(slot, head, strides, P) + dim
    tl.store(place, x, mask=inside & (slot >= 0) & (dim < SIZE))


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
    factor = load_scale(scale, scale_stride, head, inside)
    return divide_to_cache(x, factor, DTYPE, SATURATES_AT)


@triton.jit
def load_scale(
    scale,  # None, or a pointer to float32 [] or [Hkv]
    stride,  # None or 0 where all heads share a scale
    head,  # [..., heads, 1]
    inside,  # [..., heads, 1]
):
    """Return the scale [..., heads, 1] of heads, or the scalar that they share, or None."""
    factor = None
    if scale is not None:
        if stride is None:
            factor = tl.load(scale)
        else:
            factor = tl.load(scale + head * stride, mask=inside, other=1.0)
    return factor


@triton.jit
def divide_to_cache(
    x,  # [..., heads, dims] float
    factor,  # as of load_scale
    DTYPE: tl.constexpr,
    SATURATES_AT: tl.constexpr,
):
    """Return `x / factor`, saturated, rounded once to the dtype of a cache."""
    if factor is not None:
        x = tl.div_rn(x.to(tl.float32), factor)
    if SATURATES_AT is not None:
        limit: tl.constexpr = SATURATES_AT
        x = tl.clamp(x.to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)
