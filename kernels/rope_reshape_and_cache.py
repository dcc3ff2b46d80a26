"""Rotate queries and keys, and write keys and values into cache slots.

A pair (x, y) becomes (x cos - y sin, y cos + x sin) (RoFormer, Su et al., 2021), in float32, and is
rounded once. Where heads are normed, x is x / sqrt(mean(x^2) + eps) * weight first (RMSNorm, Zhang
and Sennrich, 2019). T tokens, Hq query heads, Hkv KV heads, head sizes D (query, key) and Dv
(value), the first R of D rotated, N blocks of P slots. One program takes one of PIECES even shares
of a token's heads, those of queries in GROUPS, and loads all of it before it computes. The kernel
also serves the operators that norm first and the one that caches nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.cache_tiles import (
    SATURATES_AT,
    as_slots,
    divide_to_cache,
    find_rows,
    find_slot,
    fixed,
    load_rows,
    load_scale,
    row_strides,
    store_rows,
)
from torch_tkv.kernels.device import device_of
from torch_tkv.kernels.launcher import DEBUG, Launch
from torch_tkv.kernels.rope_tiles import (
    find_angle,
    heads_to_cache,
    load_angles,
    load_heads,
    load_weight,
    rotate_heads,
    store_heads,
)


@triton.jit(do_not_specialize=["num_angles", "num_mapped", "num_slots"])
def _rope_reshape_and_cache(
    out,  # [T, Hq, D], contiguous
    query,  # [T, Hq, D]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv], or None
    cos,  # [T or positions, R or R / 2]
    sin,  # as cos
    positions,  # [T], or None
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv], or None
    slot_mapping,  # [<= T], or None where token t goes to slot t
    k_scale,  # float32 [] or [Hkv], or None
    v_scale,  # as k_scale
    q_weight,  # [D], or None
    k_weight,  # as q_weight
    eps,
    query_strides,  # of tokens and heads
    key_strides,
    value_strides,
    cos_strides,  # of rows and columns
    sin_strides,
    positions_stride,
    key_cache_strides,  # of blocks, slots and heads
    value_cache_strides,
    slot_mapping_stride,
    k_scale_stride,
    v_scale_stride,
    num_angles,  # rows of cos
    num_mapped,  # slots in slot_mapping
    num_slots,  # N * P
    P: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_WIDTH: tl.constexpr,
    WEIGHT_PLUS_ONE: tl.constexpr,
    WRAP: tl.constexpr,
    K_SATURATES_AT: tl.constexpr,
    V_SATURATES_AT: tl.constexpr,
    PIECES: tl.constexpr,
    GROUPS: tl.constexpr,  # of BLOCK_HQ query heads
    BLOCK_HQ: tl.constexpr,
    BLOCK_HKV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVICTION: tl.constexpr,  # of cos and sin
):
    token = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.program_id(0) % PIECES
    slot = token
    if slot_mapping is not None:
        slot = find_slot(slot_mapping, token, slot_mapping_stride, num_mapped, num_slots, WRAP)
    angle = find_angle(positions, token, positions_stride, num_angles)
    # Tiles, because Triton 3.9's interpreter takes no scalars in masks.
    slot = slot + tl.zeros([1, 1, 1], slot.dtype)
    angle = angle + tl.zeros([1, 1, 1], angle.dtype)

    # Groups, because one tile of all query heads would need as many rows of angles.
    q_head = piece * (GROUPS * BLOCK_HQ) + tl.arange(0, BLOCK_HQ)[None, :, None]
    row = query + token * query_strides[0] + q_head.to(tl.int64) * query_strides[1]
    q = ()
    for i in tl.static_range(GROUPS):
        rows = row + tl.full([1, 1, 1], i * BLOCK_HQ, tl.int64) * query_strides[1]
        is_query = q_head + i * BLOCK_HQ < HQ
        x = load_heads(rows, is_query, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
        q += (x,)  # type: ignore[assignment]
    head = piece * BLOCK_HKV + tl.arange(0, BLOCK_HKV)[None, :, None]
    is_head = head < HKV
    row = key + token * key_strides[0] + head.to(tl.int64) * key_strides[1]
    k = load_heads(row, is_head, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    k_factor = load_scale(k_scale, k_scale_stride, head, is_head)
    if value is not None:
        v = load_rows(value, token, head, is_head, value_strides, DV, BLOCK_DV)
        v_factor = load_scale(v_scale, v_scale_stride, head, is_head)
    q_weights = load_weight(q_weight, BLOCK_HQ, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    k_weights = load_weight(k_weight, BLOCK_HKV, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    # ptxas would wait for the position before it issued these loads, but moves none past a barrier.
    tl.debug_barrier()
    q_angles = load_angles(
        cos, sin, angle, cos_strides, sin_strides,
        BLOCK_HQ, R, BLOCK_R, INTERLEAVED, FULL_WIDTH, EVICTION,
    )  # fmt: skip
    k_angles = load_angles(
        cos, sin, angle, cos_strides, sin_strides,
        BLOCK_HKV, R, BLOCK_R, INTERLEAVED, FULL_WIDTH, EVICTION,
    )  # fmt: skip

    k = rotate_heads(
        k, k_angles, k_weights, eps, key.dtype.element_ty, D, BLOCK_REST, WEIGHT_PLUS_ONE
    )
    row = out + (token * HQ + q_head) * D
    for i in tl.static_range(GROUPS):
        x = rotate_heads(
            q[i], q_angles, q_weights, eps, query.dtype.element_ty, D, BLOCK_REST, WEIGHT_PLUS_ONE
        )
        rows = row + i * BLOCK_HQ * D
        is_query = q_head + i * BLOCK_HQ < HQ
        store_heads(rows, is_query, x, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    k = heads_to_cache(k, k_factor, key_cache.dtype.element_ty, K_SATURATES_AT, BLOCK_REST)
    row = key_cache + find_rows(slot, head, key_cache_strides, P)
    store_heads(row, is_head & (slot >= 0), k, D, R, BLOCK_R, BLOCK_REST, INTERLEAVED)
    if value is not None:
        v = divide_to_cache(v, v_factor, value_cache.dtype.element_ty, V_SATURATES_AT)
        store_rows(v, value_cache, slot, head, is_head, value_cache_strides, P, DV)


class Rung(NamedTuple):
    """What one program takes, up to a number of tokens."""

    tokens: float
    elements: int
    warps: int
    groups: int = 1  # of query heads, which take turns in one tile of angles
    keeps_angles: bool = False  # in L1 and L2, which the rows of many tokens pass through
    registers: int | None = None  # of a thread, at most


# us of 32 query and 8 KV heads of 128 bf16 at 1, 64, 1024, 16384 and 65536 tokens with slots in
# blocks, of drafts of this kernel on one H200 with torch 2.11 and Triton 3.6, 2026-11-30. With
# strides that were arguments the rungs of then, which had no groups, took 1.44, 1.99, 5.47, 103.2
# and 398 in the same run.
_LADDER = (
    Rung(tokens=128, elements=2048, warps=4),  # 1.45, 1.92; of 1024 elements 1.55, 1.95
    Rung(tokens=4096, elements=4096, warps=2),  # -, 2.07, 5.24, 103.6, 401
    # -, 2.08, 5.63, 101.8, 395
    Rung(tokens=float("inf"), elements=4096, warps=2, groups=2, keeps_angles=True),
)
# After a norm, programs of 4096 elements have 99 registers a thread, 68 without, and took 6.7, 116
# and 455 at 1024, 16384 and 65536 tokens in random slots (2026-11-21). Groups took 6.09, 103.6 and
# 401 with slots in blocks, on 2026-11-30 as the numbers here; rotating alone, 5.51, 103.0 and 399.
_NORM_LADDER = (
    Rung(tokens=8, elements=1024, warps=4),  # 1.51, 2.07
    Rung(tokens=128, elements=2048, warps=2),  # 1.57, 1.96, 6.01; of 4 warps 1.61, 2.08
    # -, -, 5.71, 102.2, 398
    Rung(tokens=float("inf"), elements=2048, warps=2, keeps_angles=True, registers=64),
)


class Plan(NamedTuple):
    """How to launch: the grid and the tiles of one program."""

    grid: tuple[int]
    PIECES: int
    GROUPS: int
    BLOCK_HQ: int
    BLOCK_HKV: int
    BLOCK_R: int
    BLOCK_REST: int  # 0 where all of a head is rotated
    BLOCK_DV: int
    EVICTION: str  # of cos and sin
    num_warps: int
    registers: int | None = None  # of a thread, at most


def plan(
    tokens: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    value_size: int,
    rotary_dim: int,
    normed: bool = False,
) -> Plan:
    """Plan the rotation of all heads and the write of the KV heads; a value_size of 0 has no V."""
    rung = next(rung for rung in (_NORM_LADDER if normed else _LADDER) if tokens <= rung.tokens)
    block_r, block_rest, block_dv = (
        triton.next_power_of_2(size)
        for size in (rotary_dim // 2, head_size - rotary_dim, value_size)
    )
    row = 2 * block_r + block_rest
    elements = query_heads * row + kv_heads * (row + block_dv)
    pieces = triton.next_power_of_2(triton.cdiv(elements, rung.elements))
    share, block_hkv = (
        triton.next_power_of_2(triton.cdiv(heads, pieces)) for heads in (query_heads, kv_heads)
    )
    if share * row + block_hkv * (row + block_dv) > rung.elements:
        share = max(share // 2, 1)  # of 40 heads in 2 pieces it was 32
    pieces = max(triton.cdiv(query_heads, share), triton.cdiv(kv_heads, block_hkv))
    elements = share * row + block_hkv * (row + block_dv)
    # At least 4 elements a thread.
    num_warps = min(rung.warps, triton.next_power_of_2(triton.cdiv(elements, 4 * 32)))
    # A thread takes 8 elements of each half of the pairs of a group: 16 bytes of a 16-bit float.
    groups = max(min(rung.groups, share, share * block_r // (8 * 32 * num_warps)), 1)
    blocks = (pieces, groups, share // groups, block_hkv, block_r, block_rest, block_dv)
    eviction = "evict_last" if rung.keeps_angles else ""
    return Plan((tokens * pieces,), *blocks, eviction, num_warps, rung.registers)


class Norm(NamedTuple):
    """How the heads are normed before they are rotated; without weights they are not."""

    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0
    weight_plus_one: bool = False


_NO_NORM = Norm()


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    slot_mapping: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    wrap: bool = False,
    norm: Norm = _NO_NORM,
) -> Launch:
    """Describe the launch; arguments as in `torch_tkv.rope_reshape_and_cache`.

    Without value, value_cache and slot_mapping, key_cache is [T, Hkv, D] and token `t` goes to
    its row `t`.
    """
    tokens, query_heads, head_size = query.shape
    kv_heads = key.shape[1]
    value_size = 0 if value is None else value.shape[2]
    rotary_dim = head_size if rotary_dim is None else rotary_dim
    key_blocks = key_cache.unsqueeze(1) if slot_mapping is None else key_cache
    blocks, *values = as_slots(*(x for x in (key_blocks, value_cache) if x is not None))
    caches = (blocks, values[0] if values else None)
    normed = norm.q_weight is not None
    grid, *tiles, num_warps, registers = plan(
        tokens, query_heads, kv_heads, head_size, value_size, rotary_dim, normed
    )
    # A fused multiply-add would skip a rounding that PyTorch does.
    options = {"num_warps": num_warps, "enable_fp_fusion": False, "debug": DEBUG}
    if registers is not None and device_of(query.device).arch:
        options["maxnreg"] = registers
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return Launch(
        _rope_reshape_and_cache,
        grid,
        (
            *(out, query, key, value, cos, sin, positions, key_cache, value_cache, slot_mapping),
            *(k_scale, v_scale, norm.q_weight, norm.k_weight),
        ),
        (
            norm.eps,
            *(None if rows is None else row_strides(rows) for rows in (query, key, value)),
            *(row_strides(cos), row_strides(sin), _stride(positions)),
            *(None if cache is None else fixed(*cache.stride()[:3]) for cache in caches),
            *(_stride(slot_mapping), _stride(k_scale), _stride(v_scale)),
            cos.shape[0],
            0 if slot_mapping is None else slot_mapping.shape[0],
            blocks.shape[0] * blocks.shape[1],
        ),
        (
            *(blocks.shape[1], query_heads, kv_heads, head_size, value_size, rotary_dim),
            *(interleaved, cos.shape[1] == rotary_dim, norm.weight_plus_one, wrap),
            SATURATES_AT.get(key_cache.dtype),
            None if value_cache is None else SATURATES_AT.get(value_cache.dtype),
            *tiles,
        ),
        options,
        out,
    )


def _stride(tensor: Tensor | None) -> int:
    """Return the stride of an optional vector, 0 for a scalar and for None."""
    return 0 if tensor is None or tensor.dim() == 0 else tensor.stride(0)
