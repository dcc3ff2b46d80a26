"""tkv::gather_cache: the keys and values of ragged sequences, from a paged cache into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, FLOAT_DTYPES, FP8_DTYPES, Checker
from torch_tkv.ops.library import define

_checker = Checker("gather_cache")


def gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of ragged sequences from a paged cache into contiguous rows.

    Row `cu_seq_lens[b] + i` is key `i` of sequence `b`, found in block `block_table[b, i // P]`.
    Rows past `cu_seq_lens[B]` are zeros. The cache may hold anything narrower than a head too: the
    latent and rope parts of an MLA cache are `cache[..., None, :R]` and `cache[..., None, R:]`.

    Args:
        key_cache: [N, P, Hkv, D], float32, float16, bfloat16, float8_e4m3fn or float8_e5m2; any
            strides whose last is 1.
        value_cache: [N, P, Hkv, Dv], with strides and a dtype of its own.
        block_table: [B, max_blocks], int32 or int64; row `b` lists the blocks of sequence `b`.
        cu_seq_lens: [B + 1], int32 or int64; cumulative lengths of the sequences, the first 0.
        num_tokens: rows of the output; the shape is an argument so that no data decides it.
        k_scale: float32 [] or [Hkv], multiplied with the keys in float32; None multiplies nothing.
        v_scale: the same for the values.
        dtype: float32, float16 or bfloat16; None means key_cache's dtype, or bfloat16 where that is
            a float8.

    Returns:
        Keys [num_tokens, Hkv, D] and values [num_tokens, Hkv, Dv], contiguous, rounded once to
        `dtype`.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together; on CPU also, cu_seq_lens is not
            ascending from 0 to <= num_tokens, or needs more blocks than block_table has.
        IndexError: on CPU, a used entry of block_table is no block of the cache. On a GPU the rows
            of such a block are zeros, and TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    if dtype is None:
        dtype = torch.bfloat16 if key_cache.dtype in FP8_DTYPES else key_cache.dtype
    rows: tuple[Tensor, Tensor] = torch.ops.tkv.gather_cache(
        key_cache, value_cache, block_table, cu_seq_lens, num_tokens, k_scale, v_scale, dtype=dtype
    )
    return rows


def _check(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    require = _checker.require
    _checker.caches(key_cache, value_cache, CACHE_DTYPES)
    _checker.indices("block_table", block_table, "[B, max_blocks]")
    _checker.indices("cu_seq_lens", cu_seq_lens, "[B + 1]")
    _checker.scale("k_scale", k_scale, key_cache.shape[2])
    _checker.scale("v_scale", v_scale, key_cache.shape[2])
    _checker.same_device(
        key_cache.device,
        value_cache=value_cache,
        block_table=block_table,
        cu_seq_lens=cu_seq_lens,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    batch = block_table.shape[0]
    ok = cu_seq_lens.shape[0] == batch + 1
    require(ok, "cu_seq_lens", f"[B + 1 = {batch + 1}] like block_table", cu_seq_lens)
    # Not `require`: under torch.compile the number may come from data, and then has no truth yet.
    text = f"gather_cache: num_tokens must be at least 0, got {num_tokens}"
    torch._check_value(num_tokens >= 0, lambda: text)
    ok = dtype in FLOAT_DTYPES
    require(ok, "dtype", "float32, float16 or bfloat16", dtype, TypeError)


def _check_indices(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    require = _checker.require
    starts = cu_seq_lens.tolist()
    ok = starts[0] == 0 and starts[-1] <= num_tokens and starts == sorted(starts)
    require(ok, "cu_seq_lens", f"ascending from 0 to at most num_tokens = {num_tokens}", starts)
    blocks, block_size = key_cache.shape[:2]
    capacity = block_table.shape[1] * block_size
    lengths = cu_seq_lens.diff()
    ok = bool((lengths <= capacity).all())
    requirement = f"of sequences of at most the {capacity} keys that block_table has room for"
    require(ok, "cu_seq_lens", requirement, starts)
    used = torch.arange(0, capacity, block_size) < lengths[:, None]
    ok = bool(((block_table >= 0) & (block_table < blocks))[used].all())
    requirement = f"blocks of the cache's {blocks} wherever a sequence reaches"
    require(ok, "block_table", requirement, block_table.tolist(), IndexError)


def _fake(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    key, value = (
        cache.new_empty(num_tokens, *cache.shape[2:], dtype=dtype)
        for cache in (key_cache, value_cache)
    )
    return key, value


define(
    "gather_cache(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor cu_seq_lens, "
    "SymInt num_tokens, Tensor? k_scale=None, Tensor? v_scale=None, *, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    check=_check,
    check_indices=_check_indices,
    fake=_fake,
)
