"""Attention of ragged queries over a paged cache: softmax(scale * q k^T + mask) v.

T query tokens of B sequences, Hq query heads in groups of G = Hq / Hkv to a KV head, head sizes D
(key) and Dv (value), N blocks of P slots. One program takes a tile of one sequence's queries, the
G heads of a group packed into its rows so that K and V are read once a group, and walks over the
keys with an online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_tkv.kernels.launcher import Launch

# Note [Query tiles of a ragged batch]
# The grid may depend on shapes only, so which sequence a tile belongs to is found on the device.
# With Q queries a tile, sequence b owns the tiles from query_start_loc[b] // Q + b on. It needs
# ceil(n / Q) of them for its n queries, and floor(s / Q) + ceil(n / Q) <= floor((s + n) / Q) + 1,
# so the tiles of two sequences never meet, and T // Q + B + 1 tiles serve every batch. The padded
# rows behind the last sequence are one more sequence, B, of no keys: its tiles write zeros.


@triton.jit
def _find_sequence(
    tile,
    query_start_loc,  # [B + 1]
    stride,
    num_seqs,
    num_tokens,
    BLOCK_Q: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Return the sequence of `tile`, its first query row and the row after its last."""
    seq = -1
    for first in range(0, num_seqs + 1, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        start = tl.load(query_start_loc + b * stride, mask=b <= num_seqs, other=num_tokens)
        seq += tl.sum(((start // BLOCK_Q + b <= tile) & (b <= num_seqs)).to(tl.int32))
    seq = tl.maximum(seq, 0)
    start = tl.load(query_start_loc + seq * stride)
    next_start = query_start_loc + (seq + 1) * stride
    stop = tl.load(next_start, mask=seq < num_seqs, other=num_tokens)
    # Indices may hold anything: rows outside the query are not touched.
    start = tl.minimum(tl.maximum(start, 0), num_tokens).to(tl.int32)
    stop = tl.minimum(tl.maximum(stop, 0), num_tokens).to(tl.int32)
    return seq, start, stop


@triton.jit
def _visible(key_position, query_position, seq_len, CAUSAL: tl.constexpr):
    """Return which keys [1, n] each query [m, 1] sees."""
    seen = key_position < seq_len
    if CAUSAL:
        seen = seen & (key_position <= query_position)
    return seen


@triton.jit
def _load_rows(
    cache,  # [N, P, Hkv, D], at its KV head
    block,  # [BLOCK_N], -1 where there is no key
    position,  # [BLOCK_N]
    stride_n,
    stride_p,
    P: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the rows [BLOCK_N, BLOCK_D] of a tile of keys, zero where there is no key."""
    dim = tl.arange(0, BLOCK_D)
    row = block.to(tl.int64) * stride_n + (position % P).to(tl.int64) * stride_p
    inside = (block >= 0)[:, None] & (dim < HEAD_SIZE)[None, :]
    return tl.load(cache + row[:, None] + dim[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "num_blocks", "max_blocks"])
def _paged_attention(
    out,  # [T, Hq, Dv], contiguous
    query,  # [T, Hq, D]
    key_cache,  # [N, P, Hkv, D]
    value_cache,  # [N, P, Hkv, Dv]
    block_table,  # [B, max_blocks]
    seq_lens,  # [B]
    query_start_loc,  # [B + 1]
    scale_log2,  # scale * log2(e): the softmax uses exp2
    query_stride_t,
    query_stride_h,
    key_cache_stride_n,
    key_cache_stride_p,
    key_cache_stride_h,
    value_cache_stride_n,
    value_cache_stride_p,
    value_cache_stride_h,
    block_table_stride_b,
    block_table_stride_n,
    seq_lens_stride,
    query_start_loc_stride,
    num_seqs,  # B
    num_tokens,  # T
    num_blocks,  # N
    max_blocks,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    seq, start, stop = _find_sequence(
        tile, query_start_loc, query_start_loc_stride, num_seqs, num_tokens, BLOCK_Q, BLOCK_B
    )
    first = (tile - (start // BLOCK_Q + seq)) * BLOCK_Q  # of the tile's queries, in its sequence
    if (first >= stop - start) | (first < 0):
        return
    seq_len = tl.load(seq_lens + seq * seq_lens_stride, mask=seq < num_seqs, other=0)
    seq_len = tl.minimum(tl.maximum(seq_len, 0), max_blocks * P).to(tl.int32)

    row = tl.arange(0, BLOCK_M)
    token = start + first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_query = (row < BLOCK_Q * GROUP) & (token < stop)
    position = (token - start + seq_len - (stop - start))[:, None]  # [BLOCK_M, 1]
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(
        query + (token.to(tl.int64) * query_stride_t + head * query_stride_h)[:, None] + dim,
        mask=is_query[:, None] & (dim < D)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    end = seq_len
    if CAUSAL:
        end = tl.minimum(end, seq_len - (stop - start) + first + BLOCK_Q)
    blocks = block_table + seq.to(tl.int64) * block_table_stride_b
    keys = key_cache + kv_head.to(tl.int64) * key_cache_stride_h
    values = value_cache + kv_head.to(tl.int64) * value_cache_stride_h
    highest = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for n in range(0, end, BLOCK_N):
        key_position = n + tl.arange(0, BLOCK_N)
        block = tl.load(
            blocks + (key_position // P).to(tl.int64) * block_table_stride_n,
            mask=key_position < end,
            other=-1,
        )
        block = tl.where(block < num_blocks, block, -1)
        k = _load_rows(
            keys, block, key_position, key_cache_stride_n, key_cache_stride_p, P, D, BLOCK_D
        )
        v = _load_rows(
            values, block, key_position, value_cache_stride_n, value_cache_stride_p, P, DV, BLOCK_DV
        )
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        seen = _visible(key_position[None, :], position, end, CAUSAL) & (block >= 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))

        top = tl.maximum(highest, tl.max(scores, 1, keep_dims=True))
        shift = tl.where(top == float("-inf"), 0.0, top)  # of a row that has seen no key yet
        weights = tl.exp2(scores - shift)
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, 1, keep_dims=True)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale, input_precision="ieee")
        highest = top

    result = acc / tl.where(total == 0.0, 1.0, total)
    dim = tl.arange(0, BLOCK_DV)
    row_of_out = token.to(tl.int64) * (tl.num_programs(0) * GROUP) + head
    tl.store(
        out + row_of_out[:, None] * DV + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=is_query[:, None] & (dim < DV)[None, :],
    )


class Plan(NamedTuple):
    """How to launch: the grid and the tiles of sequences, queries and keys."""

    grid: tuple[int, int]
    BLOCK_B: int
    BLOCK_Q: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    num_warps: int
    num_stages: int


def plan(
    *, tokens: int, seqs: int, kv_heads: int, group: int, head_size: int, value_size: int, bits: int
) -> Plan:
    """Plan attention of `tokens` queries of `bits`-bit elements in `seqs` sequences."""
    block_d, block_dv = (max(triton.next_power_of_2(d), 16) for d in (head_size, value_size))
    row_bytes = max(block_d, block_dv) * bits // 8
    # One query a sequence needs the rows of one group; more queries fill a tile of 64 rows, or of
    # 32 where a row is wide. tl.dot takes no fewer than 16.
    rows = 16 if tokens <= seqs else 64 if row_bytes <= 256 else 32
    block_m = max(rows, triton.next_power_of_2(group))
    block_q = block_m // group
    # Two stages of K and V tiles of 16 KiB fit the 99 KiB of shared memory of small sm_8x GPUs.
    block_n = min(max(16384 // row_bytes, 16), 64)
    grid = (kv_heads, tokens // block_q + seqs + 1)
    block_b = min(triton.next_power_of_2(seqs + 1), 1024)
    return Plan(grid, block_b, block_q, block_m, block_n, block_d, block_dv, 4, 2)


def prepare(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Launch:
    """Describe the launch of attention; arguments as in `torch_tkv.paged_attention`."""
    tokens, heads, head_size = query.shape
    num_blocks, block_size, kv_heads, value_size = value_cache.shape
    out = query.new_empty(tokens, heads, value_size)
    group, seqs = heads // kv_heads, seq_lens.shape[0]
    grid, *blocks, num_warps, num_stages = plan(
        tokens=tokens,
        seqs=seqs,
        kv_heads=kv_heads,
        group=group,
        head_size=head_size,
        value_size=value_size,
        bits=query.element_size() * 8,
    )
    return Launch(
        _paged_attention,
        grid if tokens else (0,),
        (out, query, key_cache, value_cache, block_table, seq_lens, query_start_loc),
        (
            scale * math.log2(math.e),
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            *block_table.stride(),
            seq_lens.stride(0),
            query_start_loc.stride(0),
            seqs,
            tokens,
            num_blocks,
            block_table.shape[1],
        ),
        (block_size, group, head_size, value_size, causal, *blocks),
        {"num_warps": num_warps, "num_stages": num_stages},
        out,
    )
