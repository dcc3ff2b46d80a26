from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, make_caches
from writes import (
    FP8S,
    HAS_GPU,
    MODEL_DTYPE,
    assert_writes_as_reference,
    shuffled_slots,
    skip_inexact_casts,
)

from torch_tkv import reference
from torch_tkv.kernels import reshape_and_cache_dynamic as kernel

# tokens, block size, heads, head size
SIZES = [(0, 8, 3, 16), (1, 8, 13, 46), (33, 5, 13, 46), (70, 8, 8, 128), (9, 1, 40, 128)]
if HAS_GPU:
    SIZES += [(1000, 16, 8, d) for d in (16, 80, 96, 112, 192, 256)]
    SIZES += [(1000, block, 1, 128) for block in (1, 32, 64, 256)]


@pytest.mark.parametrize("cache_dtype", [torch.int8, *FP8S])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, sizes: tuple[int, ...], layout: str, cache_dtype: torch.dtype
) -> None:
    skip_inexact_casts(cache_dtype)
    tokens, block_size, heads, head_size = sizes
    blocks = tokens // block_size + 6
    caches = make_caches(
        layout, blocks, block_size, heads, head_size, dtype=cache_dtype, device=device
    )
    scales = torch.randn(blocks, heads, 2, block_size, device=device).permute(2, 0, 3, 1)
    kv = torch.randn(tokens, heads, 2, head_size, device=device) * 10
    wrap = layout == "HND"
    slots = shuffled_slots(tokens, blocks * block_size, device, wrap=wrap)
    assert_writes_as_reference(
        kernel,
        reference.reshape_and_cache_dynamic,
        kv.to(MODEL_DTYPE).unbind(2),
        (*caches, *scales),
        slots,
        wrap=wrap,
    )


@pytest.mark.parametrize("cache_dtype", [torch.int8, *FP8S])
def test_zeros_halves_extremes_and_what_is_not_finite_are_as_the_reference_says(
    device: str, cache_dtype: torch.dtype
) -> None:
    skip_inexact_casts(cache_dtype)
    rows = torch.randn(8, 1, 16, device=device)
    rows[0] = 0.0
    rows[1, 0, 3] = torch.nan
    rows[2, 0, 5] = -torch.inf
    rows[3, 0] = torch.arange(-8, 8, device=device) + 0.5
    rows[3, 0, 0] = 127.0  # the scale of int8 is 1: halves are rounded to even
    rows[4] *= 1e-44
    rows[5] *= 1e38
    rows[6] = -1e-45
    caches = make_caches("NHD", 1, 8, 1, 16, dtype=cache_dtype, device=device)
    scales = torch.zeros(2, 1, 8, 1, device=device)
    assert_writes_as_reference(
        kernel,
        reference.reshape_and_cache_dynamic,
        (rows, rows.flip(-1)),
        (*caches, *scales),
        torch.arange(8, device=device),
    )
