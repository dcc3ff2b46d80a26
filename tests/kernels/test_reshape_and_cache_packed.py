from __future__ import annotations

import pytest
import torch
from writes import (
    FP8S,
    MODEL_DTYPE,
    assert_writes_as_reference,
    shuffled_slots,
    skip_inexact_casts,
)

from torch_tkv import reference
from torch_tkv.kernels import reshape_and_cache_packed as kernel

SHAPES = {0: (2, 9, 8, 5, 48), 1: (9, 2, 8, 5, 48), -1: (9, 8, 5, 48 + 32)}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("cache_dtype", [MODEL_DTYPE, *FP8S])
@pytest.mark.parametrize("kv_dim", SHAPES)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, kv_dim: int, cache_dtype: torch.dtype, wrap: bool
) -> None:
    skip_inexact_casts(cache_dtype)
    value_size = 32 if kv_dim == -1 else 48
    key = torch.randn(50, 5, 48, device=device).to(MODEL_DTYPE)
    value = torch.randn(50, 5, value_size, device=device).to(MODEL_DTYPE)
    slots = shuffled_slots(45, 72, device, wrap=wrap)
    v_scale = torch.rand(5, device=device) + 0.1
    # The second of two layers in one storage; then blocks whose heads come first.
    cache = torch.randn(2, *SHAPES[kv_dim], device=device).to(cache_dtype)[1]
    permuted = cache.transpose(-3, -2).contiguous().transpose(-3, -2)
    for kv_cache in (cache, permuted):
        for scales in ((None, None), (v_scale[0], v_scale)):
            assert_writes_as_reference(
                kernel,
                reference.reshape_and_cache_packed,
                (key, value),
                (kv_cache,),
                slots,
                *scales,
                kv_dim=kv_dim,
                wrap=wrap,
            )
