"""Gather ragged sequences from a paged cache: row = cache[table[b, i // P], i % P] * scale.

T output rows, sequences b of B with tokens i, Hkv KV heads, head sizes D (key) and Dv (value), N
blocks of P slots. One program moves a few consecutive rows of keys or of values; where its rows
come from it finds by itself, so the grid depends on shapes only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.launcher import DEBUG, Launch


@triton.jit
def _find_row(
    token,
    block_table,  # [B, max_blocks]
    cu_seq_lens,  # [B + 1]
    table_stride_b,
    table_stride_n,
    cu_stride,
    num_seqs,
    max_blocks,
    num_blocks,
    P: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # bits of B
):
    """Return the block and the offset of `token`, a block of -1 where it has none."""
    seq = tl.zeros_like(token)
    for i in tl.static_range(SEARCH_STEPS):
        ahead = seq + (1 << (SEARCH_STEPS - 1 - i))
        inside = ahead <= num_seqs
        start = tl.load(cu_seq_lens + ahead * cu_stride, mask=inside, other=0).to(tl.int64)
        seq = tl.where(inside & (start <= token), ahead, seq)
    position = token - tl.load(cu_seq_lens + seq * cu_stride).to(tl.int64)
    # Lengths may hold anything: nothing outside the table is read, and no block outside the cache.
    used = (seq < num_seqs) & (position >= 0) & (position < max_blocks.to(tl.int64) * P)
    entry = block_table + seq * table_stride_b + position // P * table_stride_n
    block = tl.load(entry, mask=used, other=-1).to(tl.int64)
    exists = (block >= 0) & (block < num_blocks)
    tl.device_assert(exists | (seq == num_seqs), "gather_cache: a block lies outside the cache")
    return tl.where(exists, block, -1), position % P


@triton.jit
def _gather(
    cache,  # [N, P, Hkv, D]
    rows,  # [T, Hkv, D]
    scale,  # None or [Hkv]
    token,  # [BLOCK_T, 1, 1]
    block,  # [BLOCK_T, 1, 1]
    offset,  # [BLOCK_T, 1, 1]
    num_tokens,
    stride_n,
    stride_p,
    stride_h,
    scale_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)[None, :, None]
    dim = tl.arange(0, BLOCK_D)[None, None, :]
    inside = (head < HEADS) & (dim < HEAD_SIZE)
    source = cache + block * stride_n + offset * stride_p + head * stride_h + dim
    x = tl.load(source, mask=(block >= 0) & inside, other=0.0)  # [BLOCK_T, BLOCK_H, BLOCK_D]
    if scale is not None:
        factor = tl.load(scale + head * scale_stride, mask=head < HEADS, other=0.0)
        x = tl.where(block >= 0, x.to(tl.float32) * factor, 0.0)  # no inf * 0 in a row of zeros
    elif x.dtype.primitive_bitwidth == 8:
        x = x.to(tl.float32)  # Triton 3.6 converts float8_e5m2 to bfloat16 without inf and NaN
    target = rows + (token * HEADS + head) * HEAD_SIZE + dim
    tl.store(target, x.to(rows.dtype.element_ty), mask=(token < num_tokens) & inside)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "max_blocks", "num_blocks"])
def _gather_cache(
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv]
    block_table,  # [B, max_blocks]
    cu_seq_lens,  # [B + 1]
    k_scale,  # None or float32 [Hkv]
    v_scale,  # None or float32 [Hkv]
    key,  # [T, Hkv, D]
    value,  # [T, Hkv, Dv]
    key_cache_stride_n,
    key_cache_stride_p,
    key_cache_stride_h,
    value_cache_stride_n,
    value_cache_stride_p,
    value_cache_stride_h,
    table_stride_b,
    table_stride_n,
    cu_stride,
    k_scale_stride,  # 0 where all heads share a scale
    v_scale_stride,
    num_tokens,
    num_seqs,
    max_blocks,
    num_blocks,
    P: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    block, offset = _find_row(
        token, block_table, cu_seq_lens, table_stride_b, table_stride_n, cu_stride,
        num_seqs, max_blocks, num_blocks, P, SEARCH_STEPS,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        _gather(
            key_cache, key, k_scale, token, block, offset, num_tokens,
            key_cache_stride_n, key_cache_stride_p, key_cache_stride_h, k_scale_stride,
            HKV, D, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _gather(
            value_cache, value, v_scale, token, block, offset, num_tokens,
            value_cache_stride_n, value_cache_stride_p, value_cache_stride_h, v_scale_stride,
            HKV, DV, BLOCK_H, BLOCK_DV,
        )  # fmt: skip


class Plan(NamedTuple):
    """How to launch: the grid and the tile of a few rows."""

    grid: tuple[int, int]
    BLOCK_T: int
    BLOCK_H: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int


def plan(tokens: int, heads: int, head_size: int, value_size: int) -> Plan:
    """Plan the gather of `tokens` rows of `heads` x `head_size` and `heads` x `value_size`."""
    block_h = triton.next_power_of_2(heads)
    block_d, block_dv = (triton.next_power_of_2(size) for size in (head_size, value_size))
    elements = block_h * max(block_d, block_dv)
    # Several rows a program share the search; few tokens take a program each.
    block_t = min(max(4096 // elements, 1), 4) if tokens > 256 else 1
    num_warps = min(max(block_t * elements // (32 * 32), 1), 8)
    grid = (triton.cdiv(tokens, block_t), 2)
    return Plan(grid, block_t, block_h, block_d, block_dv, num_warps)


def _head_stride(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)


def prepare(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Launch:
    """Describe the launch of a gather; arguments as in `torch_tkv.gather_cache`."""
    num_blocks, block_size, heads, head_size = key_cache.shape
    value_size = value_cache.shape[3]
    num_seqs, max_blocks = block_table.shape
    device = key_cache.device
    key = torch.empty(num_tokens, heads, head_size, dtype=dtype, device=device)
    value = torch.empty(num_tokens, heads, value_size, dtype=dtype, device=device)
    grid, *blocks, num_warps = plan(num_tokens, heads, head_size, value_size)
    return Launch(
        _gather_cache,
        grid,
        (key_cache, value_cache, block_table, cu_seq_lens, k_scale, v_scale, key, value),
        (
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            *block_table.stride(),
            cu_seq_lens.stride(0),
            *map(_head_stride, (k_scale, v_scale)),
            num_tokens,
            num_seqs,
            max_blocks,
            num_blocks,
        ),
        (block_size, heads, head_size, value_size, num_seqs.bit_length(), *blocks),
        {"num_warps": num_warps, "debug": DEBUG},
        out=(key, value),
    )
