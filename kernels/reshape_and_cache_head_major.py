"""Write keys and values into the x-packed caches K [N, Hkv, D / x, P, x] and V [N, Hkv, Dv, P].

They are caches [N, P, Hkv, D] whose heads lie in chunks: of x elements, and of one.
"""

from __future__ import annotations

from torch import Tensor

from torch_tkv.kernels.launcher import Launch
from torch_tkv.kernels.reshape_and_cache import Cache, prepare_write


def prepare(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> Launch:
    """Describe the launch of a write; arguments as in `torch_tkv.reshape_and_cache_head_major`."""
    keys = Cache(key_cache, key_cache.permute(0, 3, 1, 2, 4))
    values = Cache(value_cache, value_cache.permute(0, 3, 1, 2).unsqueeze(4))
    return prepare_write(key, value, keys, values, slot_mapping, k_scale, v_scale, wrap)
