"""Reference of tkv::reshape_and_cache_head_major: specification, CPU implementation and oracle."""

from __future__ import annotations

from torch import Tensor

from torch_tkv.reference.reshape_and_cache import find_slots, to_cache


def reshape_and_cache_head_major(
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
    """Write `key` into [N, Hkv, D / x, P, x] and `value` into [N, Hkv, Dv, P], in place.

    Args and meaning are those of `torch_tkv.reshape_and_cache_head_major`; slots must lie in the
    cache.
    """
    num_blocks, _, _, block_size, x = key_cache.shape
    tokens, blocks, offsets = find_slots(slot_mapping, num_blocks, block_size, wrap)
    keys = to_cache(key[tokens], k_scale, key_cache.dtype)
    key_cache[blocks, :, :, offsets] = keys.unflatten(2, (-1, x))
    value_cache[blocks, :, :, offsets] = to_cache(value[tokens], v_scale, value_cache.dtype)
