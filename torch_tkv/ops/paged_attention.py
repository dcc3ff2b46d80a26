"""tkv::paged_attention: attention of ragged queries over a paged cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_tkv.ops.checks import FLOAT_DTYPES, FP8_DTYPES, Checker, has_e4m3fn
from torch_tkv.ops.library import define
from torch_tkv.reference.paged_attention import Arguments, first_key

_MAX_HEAD_SIZE = 256
_8_BIT_DTYPES = (torch.int8, *FP8_DTYPES)


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
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Attend the queries of a ragged batch to their sequences' keys and values in a paged cache.

    Sequence `b` owns the queries `query_start_loc[b] : query_start_loc[b + 1]`, which are its last
    positions, and the keys `0 : seq_lens[b]`, found through `block_table[b]`. One query a sequence
    is decode, several are prefill, chunked prefill or verification; any mix goes in one call. A
    query that sees no key, and every query past `query_start_loc[B]`, gives zeros.

    A score is `scale * q . k`, then the softcap, ALiBi and the query bias in this order, and -inf
    where the key is hidden. Options that are None cost nothing.

    Args:
        query: [T, Hq, D], float32, float16 or bfloat16; any strides whose last is 1. D <= 256.
        key_cache: [N, P, Hkv, D] in query's dtype, float8_e4m3fn, float8_e5m2 or int8; Hkv divides
            Hq; any strides whose last is 1.
        value_cache: [N, P, Hkv, Dv] in key_cache's dtype, with strides of its own. Dv <= 256.
        block_table: [B, max_blocks], int32 or int64; row `b` lists the blocks of sequence `b`.
            Blocks before the window of all queries of a sequence are not read.
        seq_lens: [B], int32 or int64; keys in the cache after this step's writes.
        query_start_loc: [B + 1], int32 or int64; cumulative query lengths, the first 0.
        scale: factor of the scores, positive; None means D ** -0.5.
        causal: a query sees the keys up to its own position, else all keys of its sequence.
        window: how many keys a query sees, its own position counted; needs causal.
        softcap: a score `s` becomes `softcap * tanh(s / softcap)`.
        alibi_slopes: float32 [Hq]; adds `slope * (key position - query position)`.
        sinks: [Hq], float32, float16 or bfloat16; a logit of each head that joins the softmax's
            denominator, with no value.
        query_bias: float32 [T, Q], last stride 1; query `t` adds `query_bias[t, j]` to its score
            with the `j`-th new token of its sequence, at `seq_lens[b] - n + j` for its n queries.
            -inf hides. New tokens from the Q-th on, and older keys, get nothing.
        k_scale: float32 [] or [Hkv], positive, multiplied with the keys of a float8 cache. None
            means 1.
        v_scale: the same for values.
        k_scale_cache: float32 [N, P, Hkv], any strides; the factor of each key and head of a float8
            or int8 cache, as `reshape_and_cache_dynamic` writes it; with v_scale_cache only.
        v_scale_cache: the same for values.
        output_scale: float32 []; the result is divided by it, saturated and returned as
            float8_e4m3fn.

    Returns:
        [T, Hq, Dv] in query's dtype, or float8_e4m3fn where there is an output_scale. Scores,
        softmax and sums are float32; the weights are rounded to 16 bits where the query has them.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, strides, devices or options do not fit together; on CPU also, seq_lens
            needs more blocks than block_table has, or query_start_loc is not ascending from 0 to
            <= T.
        IndexError: on CPU, a used entry of block_table is no block of the cache. On a GPU the keys
            and values of such a block are zeros.
        NotImplementedError: autograd would record the call.
    """
    out: Tensor = torch.ops.tkv.paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        query.shape[-1] ** -0.5 if scale is None else scale,
        k_scale,
        v_scale,
        k_scale_cache,
        v_scale_cache,
        alibi_slopes,
        sinks,
        query_bias,
        output_scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return out


class AttentionChecker(Checker):
    """Checks the arguments of tkv::paged_attention, in its name or that of tkv::..._lse."""

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Raise for shapes, dtypes, strides, devices and options that do not fit."""
        arguments = Arguments(*args, **kwargs)
        self._check_tensors(arguments)
        self._check_modifiers(arguments)
        self._check_scales(arguments)

    def check_indices(self, *args: Any, **kwargs: Any) -> None:
        """Raise for lengths and block numbers out of range."""
        a = Arguments(*args, **kwargs)
        starts, lengths = a.query_start_loc.tolist(), a.seq_lens.tolist()
        tokens, (blocks, block_size) = a.query.shape[0], a.key_cache.shape[:2]
        ok = starts[0] == 0 and starts[-1] <= tokens and starts == sorted(starts)
        requirement = f"ascending from 0 to at most T = {tokens}"
        self.require(ok, "query_start_loc", requirement, starts)
        capacity = a.block_table.shape[1] * block_size
        ok = all(0 <= length <= capacity for length in lengths)
        requirement = f"at most the {capacity} keys that block_table has room for"
        self.require(ok, "seq_lens", requirement, lengths)
        queries = a.query_start_loc.diff().tolist()
        firsts = [
            first_key(length, n, a.window) for length, n in zip(lengths, queries, strict=True)
        ]
        position = torch.arange(0, capacity, block_size)
        used = (position < a.seq_lens[:, None]) & (
            position + block_size > torch.tensor(firsts)[:, None]
        )
        ok = bool(((a.block_table >= 0) & (a.block_table < blocks))[used].all())
        requirement = f"blocks of the cache's {blocks} wherever seq_lens reaches"
        self.require(ok, "block_table", requirement, a.block_table.tolist(), IndexError)

    def _check_tensors(self, a: Arguments) -> None:
        self.floats("query", a.query, "[T, Hq, D]")
        self.caches(a.key_cache, a.value_cache, (*FLOAT_DTYPES, *_8_BIT_DTYPES))
        self.indices("block_table", a.block_table, "[B, max_blocks]")
        self.indices("seq_lens", a.seq_lens, "[B]")
        self.indices("query_start_loc", a.query_start_loc, "[B + 1]")
        tensors = {k: v for k, v in a._asdict().items() if isinstance(v, Tensor)}
        self.same_device(a.query.device, **tensors)
        dtypes = (a.query.dtype, *_8_BIT_DTYPES)
        self.layout("key_cache", a.key_cache, "[N, P, Hkv, D]", dtypes)
        self.layout("value_cache", a.value_cache, "[N, P, Hkv, Dv]", (a.key_cache.dtype,))
        for argument, cache in (("key_cache", a.key_cache), ("value_cache", a.value_cache)):
            ok = cache.shape[3] <= _MAX_HEAD_SIZE
            self.require(ok, argument, f"of head size <= {_MAX_HEAD_SIZE}", cache)
        heads, head_size = a.query.shape[1:]
        kv_heads = a.key_cache.shape[2]
        ok = a.key_cache.shape[3] == head_size
        self.require(ok, "key_cache", f"[N, P, Hkv, D = {head_size}] like query", a.key_cache)
        ok = heads > 0 and heads % kv_heads == 0
        requirement = f"[T, Hq, D] with Hq a multiple of Hkv = {kv_heads}"
        self.require(ok, "query", requirement, a.query)
        batch = a.seq_lens.shape[0]
        ok = a.block_table.shape[0] == batch
        self.require(ok, "block_table", f"[B = {batch}, max_blocks] like seq_lens", a.block_table)
        ok = a.query_start_loc.shape[0] == batch + 1
        requirement = f"[B + 1 = {batch + 1}] like seq_lens"
        self.require(ok, "query_start_loc", requirement, a.query_start_loc)

    def _check_modifiers(self, a: Arguments) -> None:
        tokens, heads, _ = a.query.shape
        if a.window is not None:
            self.require(a.window >= 1, "window", "at least 1, a query's own position", a.window)
            self.require(a.causal, "causal", "True where there is a window", a.causal)
        ok = 0 < a.scale < math.inf  # the softmax takes its highest score before it scales
        self.require(ok, "scale", "positive and finite", a.scale)
        if a.softcap is not None:
            ok = 0 < a.softcap < math.inf
            self.require(ok, "softcap", "positive and finite", a.softcap)
        if a.alibi_slopes is not None:
            self.floats("alibi_slopes", a.alibi_slopes, "[Hq]", (torch.float32,))
            ok = a.alibi_slopes.shape[0] == heads
            self.require(ok, "alibi_slopes", f"[Hq = {heads}] like query", a.alibi_slopes)
        if a.sinks is not None:
            self.floats("sinks", a.sinks, "[Hq]")
            ok = a.sinks.shape[0] == heads
            self.require(ok, "sinks", f"[Hq = {heads}] like query", a.sinks)
        if a.query_bias is not None:
            self.floats("query_bias", a.query_bias, "[T, Q]", (torch.float32,))
            ok = a.query_bias.shape[0] == tokens
            self.require(ok, "query_bias", f"[T = {tokens}, Q] like query", a.query_bias)

    def _check_scales(self, a: Arguments) -> None:
        dtype, heads = a.key_cache.dtype, a.key_cache.shape[2]
        for argument, scale in (("k_scale", a.k_scale), ("v_scale", a.v_scale)):
            self.scale(argument, scale, heads)
            ok = scale is None or dtype in FP8_DTYPES
            self.require(ok, argument, "None where the caches are not float8", scale)
            ok = scale is None or a.k_scale_cache is None
            self.require(ok, argument, "None where there is a k_scale_cache", scale)
        shape = tuple(a.key_cache.shape[:3])
        scale_caches = {"k_scale_cache": a.k_scale_cache, "v_scale_cache": a.v_scale_cache}
        for argument, scale_cache in scale_caches.items():
            ok = scale_cache is not None or dtype != torch.int8
            self.require(ok, argument, "given where the caches are int8", scale_cache)
            if scale_cache is not None:
                ok = dtype in _8_BIT_DTYPES
                requirement = "None where the caches are not float8 or int8"
                self.require(ok, argument, requirement, scale_cache)
                self.layout(argument, scale_cache, "[N, P, Hkv]", (torch.float32,))
                ok = tuple(scale_cache.shape) == shape
                self.require(ok, argument, f"[N, P, Hkv] = {shape} like key_cache", scale_cache)
        ok = (a.k_scale_cache is None) == (a.v_scale_cache is None)
        requirement = "given where k_scale_cache is, and only there"
        self.require(ok, "v_scale_cache", requirement, a.v_scale_cache)
        self.scale("output_scale", a.output_scale)
        ok = a.output_scale is None or has_e4m3fn(a.query.device)
        requirement = "None on a GPU before sm_89: it has no float8_e4m3fn"
        self.require(ok, "output_scale", requirement, a.output_scale, TypeError)


def fake_out(*args: Any, **kwargs: Any) -> Tensor:
    """Return a fake output of tkv::paged_attention."""
    a = Arguments(*args, **kwargs)
    dtype = a.query.dtype if a.output_scale is None else torch.float8_e4m3fn
    return a.query.new_empty(*a.query.shape[:2], a.value_cache.shape[3], dtype=dtype)


_checker = AttentionChecker("paged_attention")

# What follows the name of tkv::paged_attention and of tkv::paged_attention_lse.
TENSORS = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor query_start_loc, float scale, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? k_scale_cache=None, Tensor? v_scale_cache=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? query_bias=None"
)
OPTIONS = "bool causal=True, int? window=None, float? softcap=None"

define(
    f"paged_attention({TENSORS}, Tensor? output_scale=None, *, {OPTIONS}) -> Tensor",
    check=_checker.check,
    check_indices=_checker.check_indices,
    fake=fake_out,
)
