"""Reference of tkv::qk_norm_rope_reshape_and_cache: the specification, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.reference.reshape_and_cache import reshape_and_cache
from torch_tkv.reference.rotary_embedding import rotary_embedding


def qk_norm_rope_reshape_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    weight_plus_one: bool = False,
    wrap: bool = False,
) -> Tensor:
    """Return `query` normed and rotated; write `key`, normed and rotated, and `value`.

    Args and meaning are those of `torch_tkv.qk_norm_rope_reshape_and_cache`; indices must be in
    range. Nothing is rounded to the model's dtype between the norm and the rotation.
    """
    dtype = query.dtype
    query = _rms_norm(query, q_weight, eps, weight_plus_one)
    key = _rms_norm(key, k_weight, eps, weight_plus_one)
    query, key = rotary_embedding(
        query, key, cos, sin, positions, interleaved=interleaved, rotary_dim=rotary_dim
    )
    key = key.to(dtype)
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, wrap=wrap)
    return query.to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool) -> Tensor:
    """Return every head of `x` over its root mean square, times `weight`, in float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * (1 + weight if weight_plus_one else weight)
