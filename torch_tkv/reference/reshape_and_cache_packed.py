"""Reference of tkv::reshape_and_cache_packed: the specification, CPU implementation and oracle."""

from __future__ import annotations

from torch import Tensor

from torch_tkv.reference.reshape_and_cache import reshape_and_cache


def reshape_and_cache_packed(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    kv_dim: int = 0,
    wrap: bool = False,
) -> None:
    """Write `key` and `value` into the slots of one cache that holds both, in place.

    Args and meaning are those of `torch_tkv.reshape_and_cache_packed`; slots must lie in the cache.
    """
    key_cache, value_cache = unpack(kv_cache, kv_dim, key.shape[2])
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, wrap=wrap)


def unpack(kv_cache: Tensor, kv_dim: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Return the keys [N, P, Hkv, D] and the values [N, P, Hkv, Dv] of a cache that holds both."""
    if kv_dim == -1:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    return kv_cache.select(kv_dim, 0), kv_cache.select(kv_dim, 1)
