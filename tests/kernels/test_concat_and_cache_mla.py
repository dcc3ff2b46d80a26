from __future__ import annotations

import pytest
import torch
from writes import (
    FP8S,
    HAS_GPU,
    MODEL_DTYPE,
    assert_writes_as_reference,
    shuffled_slots,
    skip_inexact_casts,
)

from torch_tkv import reference
from torch_tkv.kernels import concat_and_cache_mla as kernel

TOKENS = [0, 1, 33, 70, *([1000, 20000] if HAS_GPU else [])]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cache_dtype", [MODEL_DTYPE, *FP8S])
@pytest.mark.parametrize(("rank", "rope_size"), [(512, 64), (46, 10), (16, 16), (3, 1)])
def test_the_kernel_writes_what_the_reference_writes(
    device: str, rank: int, rope_size: int, cache_dtype: torch.dtype, tokens: int
) -> None:
    skip_inexact_casts(cache_dtype)
    blocks = tokens // 8 + 4
    rows = torch.randn(tokens, rank + 5 + rope_size, device=device).to(MODEL_DTYPE)
    kv_c, _, k_pe = rows.split((rank, 5, rope_size), -1)
    # Rows of a wider cache, so that a row does not end where the next begins.
    cache = torch.randn(blocks, 8, rank + rope_size + 3, device=device).to(cache_dtype)
    cache = cache[..., 1 : 1 + rank + rope_size]
    for scale in (None, torch.tensor(0.3, device=device)):
        wrap = scale is None
        slots = shuffled_slots(tokens, blocks * 8, device, wrap=wrap)
        assert_writes_as_reference(
            kernel,
            reference.concat_and_cache_mla,
            (kv_c, k_pe),
            (cache,),
            slots,
            scale,
            wrap=wrap,
        )
