"""Reference of tkv::paged_attention: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
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
    """Return the attention [T, Hq, Dv] of each sequence's queries over its cached keys.

    Args and meaning are those of `torch_tkv.paged_attention`; indices must be in range. Computes
    in float32, or in float64 where the inputs are.
    """
    num_tokens, num_query_heads, _ = query.shape
    out = query.new_zeros(num_tokens, num_query_heads, value_cache.shape[3])
    starts = query_start_loc.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        if length > 0 and rows.start < rows.stop:
            keys = _gather(key_cache, block_table[b], length)
            values = _gather(value_cache, block_table[b], length)
            out[rows] = _attend(query[rows], keys, values, scale, causal)
    return out


def _gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the first `length` rows [L, Hkv, D] of a sequence that lives in `blocks`."""
    needed = -(-length // cache.shape[1])
    return cache[blocks[:needed].long()].flatten(0, 1)[:length]


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Tensor:
    """Attend `query` [n, Hq, D], the last n positions, to `keys` [L, Hkv, D]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    n, length, kv_heads = query.shape[0], keys.shape[0], keys.shape[1]
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1))  # [n, Hkv, G, D]
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, keys.to(dtype)) * scale
    if causal:
        position = torch.arange(length - n, length, device=query.device)
        hidden = torch.arange(length, device=query.device) > position[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    # A query before the first key (n > L) sees nothing: its softmax is 0 / 0, its output 0.
    weights = scores.softmax(-1).nan_to_num(0.0) if causal and n > length else scores.softmax(-1)
    return torch.einsum("hgnl,lhd->nhgd", weights, values.to(dtype)).flatten(1, 2).to(query.dtype)
