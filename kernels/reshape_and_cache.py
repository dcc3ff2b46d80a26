"""Write keys and values into cache slots: cache[slot // P, slot % P] = row / scale.

T tokens, Hkv KV heads, head sizes D (key) and Dv (value), N blocks of P slots. One program moves a
few heads of a few tokens, of keys or of values or of both. Rows are loaded before it is known
whether they have a slot: two loads in flight take the time of one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
    to_cache,
)
from torch_tkv.kernels.launcher import DEBUG, Launch


@triton.jit(do_not_specialize=["num_mapped", "num_slots"])
def _reshape_and_cache(
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv]
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv]
    slot_mapping,  # [<= T]
    k_scale,  # None, or float32 [] or [Hkv]
    v_scale,  # None, or float32 [] or [Hkv]
    key_strides,  # of tokens and heads
    value_strides,
    key_cache_strides,  # of blocks, slots and heads
    value_cache_start,  # where the values are in a cache that holds both, or None
    value_cache_strides,
    slot_mapping_stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_SCALE_STRIDE: tl.constexpr,  # None where all heads share a scale
    V_SCALE_STRIDE: tl.constexpr,
    LIMIT: tl.constexpr,  # where key_cache saturates, None where it does not
    LIMIT_V: tl.constexpr,
    WRAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Slots are loaded in one dimension: in three, each thread would load each once an element.
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = find_slot(slot_mapping, token, slot_mapping_stride, num_mapped, num_slots, WRAP)
    token, slot = token[:, None, None], slot[:, None, None]
    head = tl.arange(0, BLOCK_H)[None, :, None]
    if HKV > BLOCK_H:
        head += tl.program_id(1) * BLOCK_H
    is_head = head < HKV
    inside = (token < num_mapped) & is_head
    values = value_cache
    if value_cache_start is not None:
        values += value_cache_start
    dtype: tl.constexpr = key_cache.dtype.element_ty
    dtype_v: tl.constexpr = value_cache.dtype.element_ty
    if SPLIT:
        if tl.program_id(2) == 0:
            k = load_rows(key, token, head, inside, key_strides, D, BLOCK_D)
            k = to_cache(k, k_scale, K_SCALE_STRIDE, head, is_head, dtype, LIMIT)
            store_rows(k, key_cache, slot, head, is_head, key_cache_strides, P, D)
        else:
            v = load_rows(value, token, head, inside, value_strides, DV, BLOCK_DV)
            v = to_cache(v, v_scale, V_SCALE_STRIDE, head, is_head, dtype_v, LIMIT_V)
            store_rows(v, values, slot, head, is_head, value_cache_strides, P, DV)
    else:
        k = load_rows(key, token, head, inside, key_strides, D, BLOCK_D)
        v = load_rows(value, token, head, inside, value_strides, DV, BLOCK_DV)
        k = to_cache(k, k_scale, K_SCALE_STRIDE, head, is_head, dtype, LIMIT)
        v = to_cache(v, v_scale, V_SCALE_STRIDE, head, is_head, dtype_v, LIMIT_V)
        store_rows(k, key_cache, slot, head, is_head, key_cache_strides, P, D)
        store_rows(v, values, slot, head, is_head, value_cache_strides, P, DV)


class Plan(NamedTuple):
    """How to launch: the grid of tokens, heads and sides, and the tile of one program."""

    grid: tuple[int, int, int]
    SPLIT: bool  # keys and values are written by programs of their own
    BLOCK_T: int
    BLOCK_H: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int


class _Rung(NamedTuple):
    max_tokens: float
    program: int  # elements of a program's tile
    thread: int  # elements of a thread


# us of 8 x 128 bf16 at 1, 64, 1024, 16384 and 65536 tokens, of drafts of this kernel on one H200
# with torch 2.11 and Triton 3.6, 2026-11-30. In the same run one token a program with 8 elements a
# thread took 1.30, 1.37, 2.52, 34.6 and 133.8, and two with 16 took 1.29, 1.35, 2.50, 34.5 and
# 134.2. At 65536 tokens, into fp8 with a scale, programs of 1024 elements took 98 and those of 2048
# took 107 (2026-11-21).
_LADDER = (
    _Rung(4096, 2048, 8),  # 1.26, 1.31, 2.47
    _Rung(math.inf, 1024, 16),  # 1.32, 1.39, 2.52, 35.0, 133.9
)
# Narrow rows fill a tile with many tokens only where that leaves about as many programs as this.
_MIN_PROGRAMS = 64
_MAX_TILE = 4096  # elements of one token's rows that a program takes


def plan(*, tokens: int, heads: int, head_size: int, value_size: int) -> Plan:
    """Plan the write of `tokens` rows of `heads` x `head_size` and `heads` x `value_size`."""
    rung = next(rung for rung in _LADDER if tokens <= rung.max_tokens)
    block_d, block_dv = (triton.next_power_of_2(size) for size in (head_size, value_size))
    wide = max(block_d, block_dv)
    block_h = min(triton.next_power_of_2(heads), max(_MAX_TILE // wide, 1))
    most = max(triton.next_power_of_2(tokens // _MIN_PROGRAMS), 2)
    block_t = max(min(rung.program // (block_h * wide), most), 1)
    # A side that is far the narrower, as the rope part of MLA, is not worth its own programs.
    split = 2 * min(block_d, block_dv) >= wide
    num_warps = min(max(block_t * block_h * wide // (rung.thread * 32), 1), 8)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(heads, block_h), 2 if split else 1)
    return Plan(grid, split, block_t, block_h, block_d, block_dv, num_warps)


class Cache(NamedTuple):
    """A cache that an operator was given, and its part that holds the keys or the values."""

    given: Tensor
    view: Tensor  # [N, P, Hkv, D]

    @property
    def start(self) -> int | None:
        """Where the view starts in what was given, to which kernels take a pointer; None for 0."""
        return int(self.view.storage_offset() - self.given.storage_offset()) or None


def prepare(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache`."""
    keys, values = (Cache(cache, cache) for cache in (key_cache, value_cache))
    return prepare_write(key, value, keys, values, slot_mapping, k_scale, v_scale, wrap)


def prepare_write(
    key: Tensor,
    value: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    wrap: bool,
) -> Launch:
    """Describe the launch of a write into caches of any layout."""
    keys, values = as_slots(key_cache.view, value_cache.view)
    num_blocks, block_size, heads, size = keys.shape
    value_size = values.shape[3]
    scale_strides = scale_stride(k_scale), scale_stride(v_scale)
    if (
        _is_one_row(key, keys)
        and _is_one_row(value, values)
        and scale_strides == (None, None)
        and heads * max(size, value_size) <= _MAX_TILE
    ):
        # One head of all elements: its accesses are wide also where a single head's are not.
        heads, size, value_size = 1, heads * size, heads * value_size
    tokens = slot_mapping.shape[0]
    grid, split, *blocks, num_warps = plan(
        tokens=tokens, heads=heads, head_size=size, value_size=value_size
    )
    return Launch(
        _reshape_and_cache,
        grid,
        (key, value, key_cache.given, value_cache.given, slot_mapping, k_scale, v_scale),
        (
            row_strides(key),
            row_strides(value),
            fixed(*keys.stride()[:3]),
            value_cache.start,
            fixed(*values.stride()[:3]),
            slot_mapping.stride(0),
            tokens,
            num_blocks * block_size,
        ),
        (
            block_size,
            heads,
            size,
            value_size,
            *scale_strides,
            SATURATES_AT.get(key_cache.given.dtype),
            SATURATES_AT.get(value_cache.given.dtype),
            wrap,
            split,
            *blocks,
        ),
        {"num_warps": num_warps, "debug": DEBUG},
    )


def _is_one_row(rows: Tensor, cache: Tensor) -> bool:
    """Return whether the heads of a token adjoin, in `rows` [T, Hkv, D] and in `cache`."""
    heads, size = rows.shape[1:]
    return heads == 1 or rows.stride(1) == cache.stride(2) == size


def scale_stride(scale: Tensor | None) -> int | None:
    """Return the stride of a scale a head, None where all heads share it or there is none."""
    return None if scale is None or scale.dim() == 0 else scale.stride(0)
