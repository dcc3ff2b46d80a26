"""Rotate queries and keys.

The kernel is that of `rope_reshape_and_cache`: the rotated keys are a cache with a slot a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.kernels import rope_reshape_and_cache
from torch_tkv.kernels.launcher import Launch


def prepare(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Launch:
    """Describe the launch; arguments as in `torch_tkv.rotary_embedding`."""
    rotated_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    launch = rope_reshape_and_cache.prepare(
        *(query, key, None, cos, sin, positions, rotated_key, None, None),
        interleaved=interleaved,
        rotary_dim=rotary_dim,
    )
    assert isinstance(launch.out, Tensor)
    return launch._replace(out=(launch.out, rotated_key))
