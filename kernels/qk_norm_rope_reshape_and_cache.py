"""RMS-norm and rotate queries and keys, and write keys and values into cache slots.

The kernel is that of `rope_reshape_and_cache`, which norms the heads between its loads and the
rotation.
"""

from __future__ import annotations

from torch import Tensor

from torch_tkv.kernels import rope_reshape_and_cache
from torch_tkv.kernels.launcher import Launch


def prepare(
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
) -> Launch:
    """Describe the launch; arguments as in `torch_tkv.qk_norm_rope_reshape_and_cache`."""
    return rope_reshape_and_cache.prepare(
        *(query, key, value, cos, sin, positions),
        *(key_cache, value_cache, slot_mapping, k_scale, v_scale),
        interleaved=interleaved,
        rotary_dim=rotary_dim,
        wrap=wrap,
        norm=rope_reshape_and_cache.Norm(q_weight, k_weight, eps, weight_plus_one),
    )
