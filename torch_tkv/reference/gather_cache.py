"""Reference of tkv::gather_cache: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_cache(
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
    """Return keys [num_tokens, Hkv, D] and values [num_tokens, Hkv, Dv] of the sequences in a row.

    Args and meaning are those of `torch_tkv.gather_cache`; indices must be in range.
    """
    block_size = key_cache.shape[1]
    lengths = cu_seq_lens.diff()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(sequence), device=lengths.device) - cu_seq_lens[sequence]
    blocks = block_table[sequence, position // block_size].long()
    offsets = position % block_size
    key = _rows(key_cache[blocks, offsets], num_tokens, k_scale, dtype)
    value = _rows(value_cache[blocks, offsets], num_tokens, v_scale, dtype)
    return key, value


def _rows(found: Tensor, num_tokens: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `found` [<= num_tokens, Hkv, D], dequantised, with rows of zeros behind it."""
    rows = torch.zeros(num_tokens, *found.shape[1:], dtype=dtype, device=found.device)
    if scale is not None:
        found = found.float() * scale[..., None]
    rows[: len(found)] = found.to(dtype)
    return rows
