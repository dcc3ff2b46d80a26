"""tkv::paged_attention: attention of ragged queries over a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import Checker
from torch_tkv.ops.library import define

_MAX_HEAD_SIZE = 256

_checker = Checker("paged_attention")


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Attend the queries of a ragged batch to their sequences' keys and values in a paged cache.

    Sequence `b` owns the queries `query_start_loc[b] : query_start_loc[b + 1]`, which are its last
    positions, and the keys `0 : seq_lens[b]`, found through `block_table[b]`. One query a sequence
    is decode, several are prefill, chunked prefill or verification; any mix goes in one call. A
    query that sees no key, and every query past `query_start_loc[B]`, gives zeros.

    Args:
        query: [T, Hq, D], float32, float16 or bfloat16; any strides whose last is 1. D <= 256.
        key_cache: [N, P, Hkv, D] in query's dtype; Hkv divides Hq; any strides whose last is 1.
        value_cache: [N, P, Hkv, Dv] in query's dtype, with strides of its own. Dv <= 256.
        block_table: [B, max_blocks], int32 or int64; row `b` lists the blocks of sequence `b`.
        seq_lens: [B], int32 or int64; keys in the cache after this step's writes.
        query_start_loc: [B + 1], int32 or int64; cumulative query lengths, the first 0.
        scale: factor of the scores; None means D ** -0.5.
        causal: a query sees the keys up to its own position, else all keys of its sequence.

    Returns:
        [T, Hq, Dv] in query's dtype. Scores, softmax and sums are float32; the weights are rounded
        to query's dtype before they meet the values.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, strides or devices do not fit together; on CPU also, seq_lens needs
            more blocks than block_table has, or query_start_loc is not ascending from 0 to <= T.
        IndexError: on CPU, a used entry of block_table is no block of the cache. On a GPU such a
            block is not read, and its keys are masked.
        NotImplementedError: autograd would record the call.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    out: Tensor = torch.ops.tkv.paged_attention(
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale, causal=causal
    )
    return out


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> None:
    require = _checker.require
    _checker.floats("query", query, "[T, Hq, D]")
    _checker.caches(key_cache, value_cache)
    _checker.indices("block_table", block_table, "[B, max_blocks]")
    _checker.indices("seq_lens", seq_lens, "[B]")
    _checker.indices("query_start_loc", query_start_loc, "[B + 1]")
    _checker.same_device(
        query.device,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
    )
    for argument, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _checker.layout(argument, cache, "[N, P, Hkv, D]", (query.dtype,))
        ok = cache.shape[3] <= _MAX_HEAD_SIZE
        require(ok, argument, f"of head size <= {_MAX_HEAD_SIZE}", cache)
    heads, head_size = query.shape[1:]
    ok = key_cache.shape[3] == head_size
    require(ok, "key_cache", f"[N, P, Hkv, D = {head_size}] like query", key_cache)
    ok = heads > 0 and heads % key_cache.shape[2] == 0
    require(ok, "query", f"[T, Hq, D] with Hq a multiple of Hkv = {key_cache.shape[2]}", query)
    batch = seq_lens.shape[0]
    ok = block_table.shape[0] == batch
    require(ok, "block_table", f"[B = {batch}, max_blocks] like seq_lens", block_table)
    ok = query_start_loc.shape[0] == batch + 1
    require(ok, "query_start_loc", f"[B + 1 = {batch + 1}] like seq_lens", query_start_loc)


def _check_indices(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> None:
    require = _checker.require
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    tokens, (blocks, block_size) = query.shape[0], key_cache.shape[:2]
    ok = starts[0] == 0 and starts[-1] <= tokens and starts == sorted(starts)
    require(ok, "query_start_loc", f"ascending from 0 to at most T = {tokens}", starts)
    capacity = block_table.shape[1] * block_size
    ok = all(0 <= length <= capacity for length in lengths)
    require(ok, "seq_lens", f"at most the {capacity} keys that block_table has room for", lengths)
    used = torch.arange(0, capacity, block_size) < seq_lens[:, None]
    ok = bool(((block_table >= 0) & (block_table < blocks))[used].all())
    requirement = f"blocks of the cache's {blocks} wherever seq_lens reaches"
    require(ok, "block_table", requirement, block_table.tolist(), IndexError)


def _fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])


define(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
    "Tensor seq_lens, Tensor query_start_loc, float scale, *, bool causal=True) -> Tensor",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
