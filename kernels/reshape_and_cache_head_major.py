"""Write keys and values into the x-packed caches K [N, Hkv, D / x, P, x] and V [N, Hkv, Dv, P].

T tokens, Hkv KV heads, head sizes D (key) and Dv (value), N blocks of P slots. One program moves a
few heads of a few tokens, of keys or of values. An element of V shares its sector (32 bytes) with
no other of its token, but with those of the neighbouring slots: where a run of tokens fills such
slots, as a prompt does, its values are transposed and whole sectors written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.cache_tiles import (
    SATURATES_AT,
    find_rows,
    find_slot,
    fixed,
    load_rows,
    row_strides,
    to_cache,
)
from torch_tkv.kernels.launcher import DEBUG, Launch
from torch_tkv.kernels.reshape_and_cache import Plan, plan, scale_stride

_RUN = 16  # tokens of a run
# Fewer tokens are often those of decoding, which fill no neighbouring slots: for 1024 of these, to
# look for runs took 32 us instead of 17; 1024 of a prompt took 3.5 us (one H200, 2026-11-21).
_MIN_TOKENS = 513
_MAX_TILE = 4096  # elements of a program that writes runs


@triton.jit
def _find_runs(
    slot_mapping,  # [<= T]
    first,
    stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    WRAP: tl.constexpr,
    RUN: tl.constexpr,
):
    """Find the run that begins in the RUN tokens from `first` on, and the one before it.

    A run is RUN tokens of consecutive slots, the first of them a multiple of RUN. Returns the first
    token and slot of the one, or num_mapped and -1, and the end of the other, or 0.
    """
    token = first - RUN + tl.arange(0, 2 * RUN)
    step = tl.arange(0, RUN)[None, :]
    ahead = tl.where(token[:, None] < 0, num_mapped, token[:, None] + step)  # [2 RUN, RUN]
    slots = find_slot(slot_mapping, ahead, stride, num_mapped, num_slots, WRAP)
    slot = tl.max(tl.where(step == 0, slots, -1), 1)
    follow = tl.min((slots == slot[:, None] + step).to(tl.int32), 1)
    is_run = (follow == 1) & (slot >= 0) & (slot % RUN == 0)
    start = tl.min(tl.where(is_run & (token >= first), token, num_mapped))
    end = tl.max(tl.where(is_run & (token < first), token + RUN, 0))
    return start, tl.max(tl.where(token == start, slot, -1)), end


@triton.jit(do_not_specialize=["num_mapped", "num_slots"])
def _reshape_and_cache_head_major(
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv]
    key_cache,  # [N, Hkv, D / X, P, X]
    value_cache,  # [N, Hkv, Dv, P]
    slot_mapping,  # [<= T]
    k_scale,  # None, or float32 [] or [Hkv]
    v_scale,  # None, or float32 [] or [Hkv]
    key_strides,  # of tokens and heads
    value_strides,
    key_cache_strides,  # of blocks, heads, chunks of X and slots
    value_cache_strides,  # of blocks, heads, elements and slots
    slot_mapping_stride,
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    X: tl.constexpr,
    K_SCALE_STRIDE: tl.constexpr,  # None where all heads share a scale
    V_SCALE_STRIDE: tl.constexpr,
    LIMIT: tl.constexpr,  # where key_cache saturates, None where it does not
    LIMIT_V: tl.constexpr,
    WRAP: tl.constexpr,
    RUNS: tl.constexpr,  # runs of BLOCK_T tokens are written whole
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    slot = find_slot(slot_mapping, token, slot_mapping_stride, num_mapped, num_slots, WRAP)
    token, slot = token[:, None, None], slot[:, None, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    is_head = head < HKV
    inside = (token < num_mapped) & is_head
    if tl.program_id(2) == 0:
        k = load_rows(key, token, head, inside, key_strides, D, BLOCK_D)
        k = to_cache(k, k_scale, K_SCALE_STRIDE, head, is_head, key_cache.dtype.element_ty, LIMIT)
        strides = (key_cache_strides[0], key_cache_strides[3], key_cache_strides[1])
        dim = tl.arange(0, BLOCK_D)[None, None, :]
        place = key_cache + find_rows(slot, head, strides, P)
        place += (dim // X).to(tl.int64) * key_cache_strides[2] + dim % X
        tl.store(place, k, mask=is_head & (slot >= 0) & (dim < D))
    else:
        dtype: tl.constexpr = value_cache.dtype.element_ty
        # Names of their own: what both branches assign has to be of one shape.
        slot_strides = (value_cache_strides[0], value_cache_strides[3], value_cache_strides[1])
        value_dim = tl.arange(0, BLOCK_DV)[None, None, :]
        column = value_cache + value_dim.to(tl.int64) * value_cache_strides[2]
        is_value = is_head & (value_dim < DV)
        some = True
        if RUNS:
            start, run_slot, end = _find_runs(
                slot_mapping, first, slot_mapping_stride, num_mapped, num_slots, WRAP, BLOCK_T
            )
            if start < num_mapped:
                step = tl.arange(0, BLOCK_T)[:, None, None]
                v = load_rows(value, start + step, head, is_head, value_strides, DV, BLOCK_DV)
                v = to_cache(v, v_scale, V_SCALE_STRIDE, head, is_head, dtype, LIMIT_V)
                block = (run_slot // P).to(tl.int64) * value_cache_strides[0]
                row = block + head.to(tl.int64) * value_cache_strides[1]
                offset = tl.multiple_of(run_slot % P, BLOCK_T) + step
                tl.store(column + row + offset, v, mask=is_value)
            # What is in no run: often nothing.
            slot = tl.where((token >= end) & (token < start), slot, -1)
            some = tl.max(slot) >= 0
        if some:
            v = load_rows(value, token, head, inside, value_strides, DV, BLOCK_DV)
            v = to_cache(v, v_scale, V_SCALE_STRIDE, head, is_head, dtype, LIMIT_V)
            tl.store(
                column + find_rows(slot, head, slot_strides, P), v, mask=is_value & (slot >= 0)
            )


def plan_runs(*, tokens: int, heads: int, head_size: int, value_size: int) -> Plan:
    """Plan as `plan` does, but for runs."""
    block_d, block_dv = (triton.next_power_of_2(size) for size in (head_size, value_size))
    run = _RUN * max(block_d, block_dv)
    block_h = min(triton.next_power_of_2(heads), max(_MAX_TILE // run, 1))
    num_warps = min(max(block_h * run // (32 * 32), 1), 8)
    grid = (triton.cdiv(tokens, _RUN), triton.cdiv(heads, block_h), 2)
    return Plan(grid, True, _RUN, block_h, block_d, block_dv, num_warps)


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
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache_head_major`."""
    num_blocks, heads, _, block_size, x = key_cache.shape
    tokens, sizes = slot_mapping.shape[0], (key.shape[2], value.shape[2])
    runs = tokens >= _MIN_TOKENS and _may_hold_runs(value_cache)
    layout = (plan_runs if runs else plan)(
        tokens=tokens, heads=heads, head_size=sizes[0], value_size=sizes[1]
    )
    return Launch(
        _reshape_and_cache_head_major,
        (*layout.grid[:2], 2),
        (key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale),
        (
            row_strides(key),
            row_strides(value),
            fixed(*key_cache.stride()[:4]),
            fixed(*value_cache.stride()),
            slot_mapping.stride(0),
            tokens,
            num_blocks * block_size,
        ),
        (
            *(block_size, heads, *sizes, x),
            *(scale_stride(k_scale), scale_stride(v_scale)),
            *(SATURATES_AT.get(key_cache.dtype), SATURATES_AT.get(value_cache.dtype)),
            *(wrap, runs),
            *(layout.BLOCK_T, layout.BLOCK_H, layout.BLOCK_D, layout.BLOCK_DV),
        ),
        {"num_warps": layout.num_warps, "debug": DEBUG},
    )


def _may_hold_runs(value_cache: Tensor) -> bool:
    """Return whether the slots of a run adjoin, each run from a multiple of its length on."""
    *strides, stride_p = value_cache.stride()
    return stride_p == 1 and all(size % _RUN == 0 for size in (*strides, value_cache.shape[3]))
