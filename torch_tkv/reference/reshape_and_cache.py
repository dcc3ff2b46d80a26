"""Reference of tkv::reshape_and_cache: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

_SATURATING = (torch.float8_e4m3fn, torch.float8_e5m2)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    """Write `key` [T, Hkv, D] and `value` [T, Hkv, Dv] into the slots of their caches, in place.

    Args and meaning are those of `torch_tkv.reshape_and_cache`; slots must lie in the cache.
    """
    tokens, blocks, offsets = find_slots(slot_mapping, key_cache.shape[0], key_cache.shape[1], wrap)
    key_cache[blocks, offsets] = to_cache(key[tokens], k_scale, key_cache.dtype)
    value_cache[blocks, offsets] = to_cache(value[tokens], v_scale, value_cache.dtype)


def find_slots(
    slot_mapping: Tensor, num_blocks: int, block_size: int, wrap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens that are to be written, and the block and offset of each."""
    slots = slot_mapping.long()
    if wrap:
        slots = slots.where(slots >= 0, slots + num_blocks * block_size)
    tokens = (slots >= 0).nonzero().squeeze(1)
    return tokens, slots[tokens] // block_size, slots[tokens] % block_size


def to_cache(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `rows` [T, Hkv, D] / `scale` [] or [Hkv] in float32, rounded once to `dtype`."""
    if scale is not None:
        rows = rows.float() / scale[..., None]
    if dtype in _SATURATING:
        # The cast itself overflows to NaN on some versions of torch, and saturates on others.
        limit = torch.finfo(dtype).max
        rows = rows.float().clamp(-limit, limit)
    return rows.to(dtype)
