"""Reference of tkv::paged_attention: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_tkv.reference.reshape_and_cache import to_cache


class Arguments(NamedTuple):
    """The arguments of tkv::paged_attention in its schema's order, as its public function says."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_scale_cache: Tensor | None = None
    v_scale_cache: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    query_bias: Tensor | None = None
    output_scale: Tensor | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None


def paged_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Return the attention [T, Hq, Dv] of each sequence's queries over its cached keys.

    Takes `Arguments`; indices must be in range.
    """
    arguments = Arguments(*args, **kwargs)
    out, _ = attend(arguments)
    if arguments.output_scale is not None:
        return to_cache(out, arguments.output_scale, torch.float8_e4m3fn)
    return out.to(arguments.query.dtype)


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the outputs [T, Hq, Dv] and the logs of the softmax's denominators [T, Hq].

    Both are computed and left in float32, or in float64 where the query is.
    """
    dtype = torch.promote_types(a.query.dtype, torch.float32)
    num_tokens, num_heads, _ = a.query.shape
    out = a.query.new_zeros(num_tokens, num_heads, a.value_cache.shape[3], dtype=dtype)
    lse = a.query.new_full((num_tokens, num_heads), -torch.inf, dtype=dtype)
    starts = a.query_start_loc.tolist()
    for b, length in enumerate(a.seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        if length > 0 and rows.start < rows.stop:
            first = first_key(length, rows.stop - rows.start, a.window)
            keys, values = (
                _gather(cache, a.block_table[b], first, length, scale, scale_cache, dtype)
                for cache, scale, scale_cache in (
                    (a.key_cache, a.k_scale, a.k_scale_cache),
                    (a.value_cache, a.v_scale, a.v_scale_cache),
                )
            )
            scores = _scores(a, rows, keys, first, length)
            out[rows], lse[rows] = _weigh(scores, values, a.sinks)
    return out, lse


def first_key(length: int, num_queries: int, window: int | None) -> int:
    """Return the position of the first key that any of a sequence's queries sees."""
    return 0 if window is None else max(0, length - num_queries + 1 - window)


def _gather(
    cache: Tensor,
    blocks: Tensor,
    first: int,
    length: int,
    scale: Tensor | None,
    scale_cache: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the rows [L, Hkv, D] of the keys `first : length` of a sequence in `blocks`."""
    block_size = cache.shape[1]
    skipped = first // block_size
    used = blocks[skipped : -(-length // block_size)].long()
    keys = slice(first - skipped * block_size, length - skipped * block_size)
    rows = cache[used].flatten(0, 1)[keys].to(dtype)
    if scale is not None:
        rows = rows * scale[..., None]
    if scale_cache is not None:
        rows = rows * scale_cache[used].flatten(0, 1)[keys][..., None]
    return rows


def _scores(a: Arguments, rows: slice, keys: Tensor, first: int, length: int) -> Tensor:
    """Return the scores [Hkv, G, n, L] of a sequence's queries, its last n positions.

    The keys are those of the positions `first : length`; scores of hidden ones are -inf.
    """
    n, kv_heads = rows.stop - rows.start, keys.shape[1]
    grouped = a.query[rows].to(keys.dtype).unflatten(1, (kv_heads, -1))  # [n, Hkv, G, D]
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, keys) * a.scale
    key_position = torch.arange(first, length, device=keys.device)
    query_position = torch.arange(length - n, length, device=keys.device)[:, None]
    if a.softcap is not None:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes.view(kv_heads, -1, 1, 1)
        scores = scores + slopes * (key_position - query_position)
    if a.query_bias is not None:
        new = min(n, length)  # keys that are new tokens, were there fewer keys than queries
        bias = a.query_bias[rows, n - new : n]
        scores[..., len(keys) - new :][..., : bias.shape[1]] += bias
    if a.causal:
        scores = scores.masked_fill(key_position > query_position, -torch.inf)
    if a.window is not None:
        scores = scores.masked_fill(key_position <= query_position - a.window, -torch.inf)
    return scores


def _weigh(scores: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax(scores) @ values [n, Hq, Dv] and the logs of its denominators [n, Hq]."""
    lse = scores.logsumexp(-1)  # [Hkv, G, n]
    blind = lse == -torch.inf  # a query that sees no key: -inf - -inf is NaN, its weights are 0
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(*lse.shape[:2], 1))
    weights = (scores - lse[..., None]).exp().masked_fill(blind[..., None], 0.0)
    out = torch.einsum("hgnl,lhd->nhgd", weights, values).flatten(1, 2)
    return out, lse.masked_fill(blind, -torch.inf).flatten(0, 1).T
