"""Reference of tkv::reshape_and_cache: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

from torch import Tensor


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    """Write `key` [T, Hkv, D] and `value` [T, Hkv, Dv] into the slots of their caches, in place.

    Args and meaning are those of `torch_tkv.reshape_and_cache`; slots must lie in the cache.
    """
    num_blocks, block_size = key_cache.shape[:2]
    slots = slot_mapping.long()
    if wrap:
        slots = slots.where(slots >= 0, slots + num_blocks * block_size)
    tokens = (slots >= 0).nonzero().squeeze(1)
    blocks, offsets = slots[tokens] // block_size, slots[tokens] % block_size
    key_cache[blocks, offsets] = key[tokens].to(key_cache.dtype)
    value_cache[blocks, offsets] = value[tokens].to(value_cache.dtype)
