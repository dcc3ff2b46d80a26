"""Reference of tkv::rope_reshape_and_cache: the specification, the oracle of the tests."""

from __future__ import annotations

from torch import Tensor

from torch_tkv.reference.reshape_and_cache import reshape_and_cache
from torch_tkv.reference.rotary_embedding import rotary_embedding


def rope_reshape_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    wrap: bool = False,
) -> Tensor:
    """Return `query` rotated; write `key`, rotated, and `value` into the slots of their caches.

    Args and meaning are those of `torch_tkv.rope_reshape_and_cache`; indices must be in range.
    """
    query, key = rotary_embedding(
        query, key, cos, sin, positions, interleaved=interleaved, rotary_dim=rotary_dim
    )
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, wrap=wrap)
    return query
