"""Write keys and values into cache slots: cache[slot // P, slot % P] = row.

T tokens, Hkv KV heads, head sizes D (key) and Dv (value), N blocks of P slots. One program moves
one token's key row or one token's value row, so that even a single token keeps two multiprocessors
busy, and a row of Hkv * D elements is one tile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.launcher import Launch

# TKV_DEBUG=1 turns a slot outside the cache from a dropped write into a device assert.
_DEBUG = os.environ.get("TKV_DEBUG", "0") == "1"


@triton.jit
def _copy_row(
    source,  # [T, Hkv, D]
    cache,  # [N, P, Hkv, D]
    token,
    slot,
    source_stride_t,
    source_stride_h,
    cache_stride_n,
    cache_stride_p,
    cache_stride_h,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (dim < HEAD_SIZE)
    row = source + token * source_stride_t + head * source_stride_h + dim  # [BLOCK_H, BLOCK_D]
    x = tl.load(row, mask=inside, other=0.0)
    place = cache + (slot // P) * cache_stride_n + (slot % P) * cache_stride_p
    tl.store(place + head * cache_stride_h + dim, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_slots"])
def _reshape_and_cache(
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv]
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv]
    slot_mapping,  # [<= T]
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    key_cache_stride_n,
    key_cache_stride_p,
    key_cache_stride_h,
    value_cache_stride_n,
    value_cache_stride_p,
    value_cache_stride_h,
    slot_mapping_stride,
    num_slots,  # N * P
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WRAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token * slot_mapping_stride).to(tl.int64)
    if WRAP:
        slot = tl.where(slot < 0, slot + num_slots, slot)
    tl.device_assert(slot < num_slots, "reshape_and_cache: a slot lies outside the cache")
    if (slot >= 0) & (slot < num_slots):
        if tl.program_id(1) == 0:
            _copy_row(
                key, key_cache, token, slot,
                key_stride_t, key_stride_h,
                key_cache_stride_n, key_cache_stride_p, key_cache_stride_h,
                P, HKV, D, BLOCK_H, BLOCK_D,
            )  # fmt: skip
        else:
            _copy_row(
                value, value_cache, token, slot,
                value_stride_t, value_stride_h,
                value_cache_stride_n, value_cache_stride_p, value_cache_stride_h,
                P, HKV, DV, BLOCK_H, BLOCK_DV,
            )  # fmt: skip


class Plan(NamedTuple):
    """How to launch: the grid and the tile of one row."""

    grid: tuple[int, int]
    BLOCK_H: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int


def plan(tokens: int, heads: int, head_size: int, value_size: int) -> Plan:
    """Plan the write of `tokens` rows of `heads` x `head_size` and `heads` x `value_size`."""
    block_h = triton.next_power_of_2(heads)
    block_d, block_dv = (triton.next_power_of_2(size) for size in (head_size, value_size))
    elements = block_h * max(block_d, block_dv)
    # 16 elements a thread: at 65536 tokens of 8 x 128 bf16, 1 and 2 warps take 135.7 us, 4 take 146
    # and 8 take 187 (one H200, torch 2.11, Triton 3.6, 2026-11-21).
    num_warps = min(max(elements // (16 * 32), 1), 8)
    return Plan((tokens, 2), block_h, block_d, block_dv, num_warps)


def prepare(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache`."""
    num_blocks, block_size, heads, head_size = key_cache.shape
    value_size = value.shape[2]
    grid, *blocks, num_warps = plan(slot_mapping.shape[0], heads, head_size, value_size)
    return Launch(
        _reshape_and_cache,
        grid,
        (key, value, key_cache, value_cache, slot_mapping),
        (
            *key.stride()[:2],
            *value.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            slot_mapping.stride(0),
            num_blocks * block_size,
        ),
        (block_size, heads, head_size, value_size, wrap, *blocks),
        {"num_warps": num_warps, "debug": _DEBUG},
    )
