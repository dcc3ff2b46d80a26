"""Write keys and values as 8-bit codes with a scale per token and head: code = row / scale.

scale = max |row| / limit, where limit is the largest code. T tokens, Hkv KV heads, head sizes D
(key) and Dv (value), N blocks of P slots. One program moves a few heads of a few tokens, of keys or
of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.cache_tiles import (
    SATURATES_AT,
    as_slots,
    find_slot,
    fixed,
    load_rows,
    row_strides,
    store_rows,
)
from torch_tkv.kernels.launcher import DEBUG, Launch
from torch_tkv.kernels.reshape_and_cache import plan

_LIMITS = {torch.int8: 127.0, **SATURATES_AT}


@triton.jit
def _quantize(
    x,  # [tokens, heads, dims], zero outside of the rows
    DTYPE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Return the codes of a tile, and the scales [tokens, heads, 1] of its rows."""
    x = x.to(tl.float32)
    # tl.max loses NaN: it counts as infinite.
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 2, keep_dims=True)
    is_finite = amax < float("inf")
    scale = tl.div_rn(amax, tl.full(amax.shape, LIMIT, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    codes = tl.where(is_finite, tl.div_rn(x, tl.broadcast_to(scale, x.shape)), 0.0)
    codes = tl.clamp(codes, -LIMIT, LIMIT)
    if DTYPE.is_int():
        # float32 has no fractions from 2 ** 23 on, so the sum is rounded to an even half.
        codes = (codes + 12582912.0) - 12582912.0
    return codes.to(DTYPE), tl.where(is_finite, scale, float("nan"))


@triton.jit
def _write(
    rows,  # [T, Hkv, D]
    cache,  # [N, P, Hkv, D]
    scale_cache,  # [N, P, Hkv]
    token,  # [tokens, 1, 1]
    slot,  # [tokens, 1, 1]
    head,  # [1, heads, 1]
    inside,  # [tokens, heads, 1]
    strides,  # of tokens and heads
    cache_strides,  # of blocks, slots and heads
    scale_strides,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    x = load_rows(rows, token, head, inside, strides, SIZE, BLOCK)
    codes, scale = _quantize(x, cache.dtype.element_ty, LIMIT)
    store_rows(codes, cache, slot, head, inside, cache_strides, P, SIZE)
    store_rows(scale, scale_cache, slot, head, inside, scale_strides, P, 1)


@triton.jit(do_not_specialize=["num_mapped", "num_slots"])
def _reshape_and_cache_dynamic(
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv]
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv]
    k_scale_cache,  # [N, P, Hkv] float32
    v_scale_cache,  # [N, P, Hkv] float32
    slot_mapping,  # [<= T]
    key_strides,  # of tokens and heads
    value_strides,
    key_cache_strides,  # of blocks, slots and heads
    value_cache_strides,
    k_scale_strides,
    v_scale_strides,
    slot_mapping_stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest code of key_cache
    LIMIT_V: tl.constexpr,
    WRAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = find_slot(slot_mapping, token, slot_mapping_stride, num_mapped, num_slots, WRAP)
    token, slot = token[:, None, None], slot[:, None, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    inside = (token < num_mapped) & (head < HKV)
    if tl.program_id(2) == 0:
        _write(
            key, key_cache, k_scale_cache, token, slot, head, inside,
            key_strides, key_cache_strides, k_scale_strides, P, D, BLOCK_D, LIMIT,
        )  # fmt: skip
    else:
        _write(
            value, value_cache, v_scale_cache, token, slot, head, inside,
            value_strides, value_cache_strides, v_scale_strides, P, DV, BLOCK_DV, LIMIT_V,
        )  # fmt: skip


def prepare(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache_dynamic`."""
    caches = as_slots(key_cache, value_cache, k_scale_cache, v_scale_cache)
    num_blocks, block_size, heads, head_size = caches[0].shape
    value_size, tokens = value.shape[2], slot_mapping.shape[0]
    layout = plan(tokens=tokens, heads=heads, head_size=head_size, value_size=value_size)
    return Launch(
        _reshape_and_cache_dynamic,
        (*layout.grid[:2], 2),
        (key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping),
        (
            row_strides(key),
            row_strides(value),
            *(fixed(*cache.stride()[:3]) for cache in caches),
            slot_mapping.stride(0),
            tokens,
            num_blocks * block_size,
        ),
        (
            block_size,
            heads,
            head_size,
            value_size,
            _LIMITS[key_cache.dtype],
            _LIMITS[value_cache.dtype],
            wrap,
            layout.BLOCK_T,
            layout.BLOCK_H,
            layout.BLOCK_D,
            layout.BLOCK_DV,
        ),
        {"num_warps": layout.num_warps, "debug": DEBUG},
    )
