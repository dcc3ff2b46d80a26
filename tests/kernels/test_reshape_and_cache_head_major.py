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
from torch_tkv.kernels import reshape_and_cache_head_major as kernel

# block size, heads, head size, value size, x
SIZES = [(8, 3, 16, 16, 4), (5, 13, 46, 24, 2), (1, 1, 6, 1, 3), (8, 8, 128, 128, 8)]
if HAS_GPU:
    SIZES += [(16, 8, d, d, 8) for d in (80, 96, 112, 192, 256)]
    SIZES += [(block, 8, 128, 128, 16) for block in (1, 32, 64, 256)]


@pytest.mark.parametrize("tokens", [0, 1, 33, 1000 if HAS_GPU else 70])
@pytest.mark.parametrize("cache_dtype", [MODEL_DTYPE, *FP8S])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, sizes: tuple[int, ...], cache_dtype: torch.dtype, tokens: int
) -> None:
    skip_inexact_casts(cache_dtype)
    block_size, heads, head_size, value_size, x = sizes
    blocks = tokens // block_size + 4
    shapes = (blocks, heads, head_size // x, block_size, x), (blocks, heads, value_size, block_size)
    caches = [torch.randn(shape, device=device).to(cache_dtype) for shape in shapes]
    kv = torch.randn(tokens, heads, head_size + value_size, device=device).to(MODEL_DTYPE)
    slots = shuffled_slots(tokens, blocks * block_size, device)
    scale = torch.rand(heads, device=device) + 0.1
    for scales in ((None, None), (scale[0], scale)):
        assert_writes_as_reference(
            kernel,
            reference.reshape_and_cache_head_major,
            kv.split((head_size, value_size), -1),
            caches,
            slots,
            *scales,
        )


def test_any_strides_are_followed(device: str) -> None:
    key, value = torch.randn(20, 3, 16, device=device), torch.randn(20, 3, 24, device=device)
    key_cache = torch.randn(5, 4, 3, 9, 8, device=device)[..., :4].transpose(1, 2)
    value_cache = torch.randn(5, 9, 24, 3, device=device).transpose(1, 3)
    assert_writes_as_reference(
        kernel,
        reference.reshape_and_cache_head_major,
        (key, value),
        (key_cache, value_cache),
        shuffled_slots(20, 45, device, wrap=True),
        wrap=True,
    )


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 96)],
        [(5, 85), (101, 150)],
        [(37, 60), (64, 96), (0, 16), (100, 117)],
        [(32, 48), (3, 27), (192, 210), (52, 80)],
    ],
)
@pytest.mark.parametrize("unmapped", [0, 7])
@pytest.mark.parametrize("cache_dtype", [MODEL_DTYPE, *FP8S])
def test_runs_of_consecutive_slots_are_written_wherever_they_begin(
    device: str,
    pieces: list[tuple[int, int]],
    block_size: int,
    unmapped: int,
    cache_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_inexact_casts(cache_dtype)
    monkeypatch.setattr(kernel, "_MIN_TOKENS", 65)
    slots = torch.cat([torch.arange(*piece) for piece in pieces]).to(device)
    slots[70] = -1
    key, value = torch.randn(2, len(slots) + unmapped, 3, 24, device=device).to(MODEL_DTYPE)
    key_cache = torch.randn(16, 3, 6, block_size, 4, device=device).to(cache_dtype)
    value_cache = torch.randn(16, 3, 24, block_size, device=device).to(cache_dtype)
    scale = torch.rand(3, device=device) + 0.1
    assert_writes_as_reference(
        kernel,
        reference.reshape_and_cache_head_major,
        (key, value),
        (key_cache, value_cache),
        slots,
        scale,
        scale[0],
    )


def test_runs_are_written_whole_where_every_one_is_aligned(device: str) -> None:
    def writes_runs(tokens: int, value_cache: torch.Tensor) -> bool:
        key = torch.randn(tokens, 3, 24, device=device)
        key_cache = torch.randn(9, 3, 6, value_cache.shape[3], 4, device=device)
        slots = torch.arange(tokens, device=device)
        launch = kernel.prepare(key, key, key_cache, value_cache, slots)
        names = kernel._reshape_and_cache_head_major.arg_names
        return (*launch.tensors, *launch.scalars, *launch.constexprs)[names.index("RUNS")]

    cache = torch.randn(9, 3, 24, 32, device=device)
    assert writes_runs(600, cache)
    assert writes_runs(600, cache[..., :16])
    assert not writes_runs(512, cache)
    assert not writes_runs(600, cache[..., :8])
    assert not writes_runs(600, torch.randn(9, 3, 24, 33, device=device)[..., :32])
    assert not writes_runs(600, cache.transpose(1, 3).contiguous().transpose(1, 3))
