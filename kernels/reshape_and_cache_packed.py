"""Write keys and values into one cache that holds both: tkv::reshape_and_cache on its two views."""

from __future__ import annotations

from torch import Tensor

from torch_tkv.kernels.launcher import Launch
from torch_tkv.kernels.reshape_and_cache import Cache, prepare_write


def prepare(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    kv_dim: int = 0,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache_packed`."""
    if kv_dim == -1:
        views = kv_cache.split((key.shape[2], value.shape[2]), -1)
    else:
        views = kv_cache.unbind(kv_dim)
    keys, values = (Cache(kv_cache, view) for view in views)
    return prepare_write(key, value, keys, values, slot_mapping, k_scale, v_scale, wrap)
