"""Random arguments of the rotating operators."""

from __future__ import annotations

import torch
from paged import make_caches
from torch import Tensor


def make_rotation(
    tokens: int,
    heads: tuple[int, int] = (6, 3),
    head_size: int = 16,
    *,
    rotary_dim: int | None = None,
    full_width: bool = False,
    max_positions: int | None = 40,
    dtype: torch.dtype = torch.float32,
    angle_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Return query, key, cos, sin and positions, which are None where `max_positions` is.

    `heads` is (Hq, Hkv). Query and key are slices of one tensor, as of a packed projection. A cos
    and a sin of full width have columns of their own, which no angles have: an operator that reads
    the wrong ones is seen.
    """
    size = head_size if rotary_dim is None else rotary_dim
    qk = torch.randn(tokens, sum(heads), head_size, device=device).to(dtype)
    query, key = qk.split(heads, 1)
    rows = tokens if max_positions is None else max_positions
    cos, sin = torch.randn(2, rows, size if full_width else size // 2, device=device)
    positions = None
    if max_positions is not None:
        positions = torch.randint(max_positions, (tokens,), device=device)
    return {
        "query": query,
        "key": key,
        "cos": cos.to(angle_dtype),
        "sin": sin.to(angle_dtype),
        "positions": positions,
    }


def make_write(
    tokens: int,
    heads: int = 3,
    head_size: int = 16,
    value_size: int | None = None,
    *,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    block_size: int = 8,
) -> dict[str, Tensor]:
    """Return value, key_cache, value_cache and a slot_mapping in which some tokens are padding."""
    num_blocks = tokens // block_size + 3
    key_cache, value_cache = make_caches(
        layout, num_blocks, block_size, heads, head_size, value_size, device=device
    )
    if cache_dtype != torch.float32:
        key_cache, value_cache = key_cache.to(cache_dtype), value_cache.to(cache_dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:tokens]
    slots[1::5] = -1
    value = torch.randn(tokens, heads, value_size or head_size, device=device).to(dtype)
    return {
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slots,
    }
