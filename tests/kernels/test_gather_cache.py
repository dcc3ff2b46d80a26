from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, make_caches
from torch import Tensor

from torch_tkv import reference
from torch_tkv.kernels import gather_cache as kernel
from torch_tkv.kernels.launcher import run

HAS_GPU = torch.cuda.is_available()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)
# Heads, D, Dv; block sizes; lengths of the sequences. The interpreter takes the small ones.
SHAPES = [(1, 16, 16), (13, 46, 46), (3, 80, 24)]
BLOCK_SIZES = [1, 8]
LENGTHS = [[], [0], [1, 0, 17]]
if HAS_GPU:
    SHAPES += [(8, 128, 128), (2, 112, 96), (1, 512, 64), (32, 256, 192)]
    BLOCK_SIZES += [16, 32, 64, 256]
    LENGTHS += [[300, 0, 0, 41, 7, 652], [1] * 1000]


def make_indices(
    lengths: list[int], num_blocks: int, block_size: int, device: str
) -> tuple[Tensor, Tensor]:
    """Return a table of random blocks, garbage behind each sequence, and cumulative lengths."""
    width = max([-(-length // block_size) for length in lengths], default=0) + 1
    table = torch.randint(num_blocks, (len(lengths), width))
    used = -(-torch.tensor(lengths, dtype=torch.long) // block_size)
    table[torch.arange(width) >= used[:, None]] = 10**6
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return table.to(device, torch.int32), starts.to(device, torch.int32)


def assert_kernel_equals_reference(*args, **kwargs) -> None:
    rows = run(kernel.prepare(*args, **kwargs))
    expected = reference.gather_cache(*args, **kwargs)
    for out, right in zip(rows, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("heads", "head_size", "value_size"), SHAPES)
def test_the_kernel_gathers_what_the_reference_gathers(
    device: str,
    layout: str,
    lengths: list[int],
    block_size: int,
    heads: int,
    head_size: int,
    value_size: int,
) -> None:
    if layout.startswith("[") and head_size != value_size:
        pytest.skip("one tensor of K and V has one head size")
    caches = make_caches(layout, 7, block_size, heads, head_size, value_size, device=device)
    indices = make_indices(lengths, 7, block_size, device)
    rows = sum(lengths) + 5
    assert_kernel_equals_reference(*caches, *indices, rows, dtype=torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *FLOAT8S])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_pair_of_dtypes_is_rounded_as_the_reference_rounds(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype, scaled: bool
) -> None:
    if device == "cpu" and (cache_dtype in FLOAT8S or dtype is torch.bfloat16):
        pytest.skip("Triton's interpreter truncates to bfloat16 and misreads float8")
    key_cache, value_cache = make_caches("NHD", 6, 8, 3, 32, 48, device=device)
    caches = (16 * key_cache).to(cache_dtype), (16 * value_cache).to(cache_dtype)
    scales = (torch.tensor(0.37, device=device), torch.rand(3, device=device)) if scaled else ()
    indices = make_indices([20, 3], 6, 8, device)
    assert_kernel_equals_reference(*caches, *indices, 29, *scales, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", FLOAT8S)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scaled", [False, True])
def test_every_code_of_a_float8_is_dequantised_exactly(
    cache_dtype: torch.dtype, dtype: torch.dtype, scaled: bool
) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(cache_dtype)
    cache = codes.view(1, 16, 1, 16)
    table = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 16], device="cuda")
    scales = [torch.tensor(s, device="cuda") for s in (0.1, 3.0)] if scaled else []
    assert_kernel_equals_reference(cache, cache, table, starts, 16, *scales, dtype=dtype)


@pytest.mark.usefixtures("poisoned_empty")
def test_blocks_outside_the_cache_read_as_zeros_and_touch_nothing(device: str) -> None:
    guarded = torch.full((2, 9, 4, 3, 16), torch.nan, device=device)
    guarded[:, 2:7] = torch.randn(2, 5, 4, 3, 16, device=device)
    caches = guarded[0, 2:7], guarded[1, 2:7]
    table = torch.tensor([[1, 5], [-1, 2], [2**62, -(2**63)]], device=device)
    starts = torch.tensor([0, 8, 16, 22], device=device)
    scale = torch.tensor(torch.inf, device=device)
    for scales in ((), (scale, scale)):
        rows = run(kernel.prepare(*caches, table, starts, 24, *scales, dtype=torch.float32))
        for out, cache in zip(rows, caches, strict=True):
            expected = torch.zeros(24, 3, 16, device=device)
            expected[:4], expected[12:16] = cache[1], cache[2]
            live = expected != 0
            expected[live] *= torch.inf if scales else 1.0
            assert torch.equal(out, expected)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    "starts",
    [[5, 9, 2], [-(2**63), 2**63 - 1, 7], [0, 10**9, 10**9], [3, 3, 3], [-4, -2, -1], [2**62] * 3],
)
def test_garbage_lengths_read_nothing_outside_the_cache(device: str, starts: list[int]) -> None:
    guarded = torch.full((9, 4, 3, 16), torch.nan, device=device)
    guarded[2:7] = 1.0
    cache = guarded[2:7]
    table = torch.arange(4, device=device).view(2, 2)
    starts = torch.tensor(starts, device=device)
    for rows in run(kernel.prepare(cache, cache, table, starts, 30, dtype=torch.float32)):
        assert ((rows == 0) | (rows == 1)).all()


def test_strided_tables_lengths_and_scales_are_followed(device: str) -> None:
    caches = make_caches("HND", 6, 8, 3, 16, device=device)
    table, starts = make_indices([20, 3, 9], 6, 8, device)
    table = table.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    starts = starts.repeat_interleave(2)[::2]
    scales = torch.rand(2, 6, device=device)[:, ::2]
    assert_kernel_equals_reference(*caches, table, starts, 40, *scales, dtype=torch.float32)


def test_special_values_are_gathered_as_they_are(device: str) -> None:
    cache = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0] * 4, device=device)
    cache = cache.view(1, 1, 1, 16)
    indices = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.arange(2, device=device)
    key, _ = run(kernel.prepare(cache, cache, *indices, 1, dtype=torch.float32))
    assert torch.equal(key.view(torch.int32), cache[0].view(torch.int32))


def test_the_plan_covers_every_token_with_tiles_of_powers_of_two() -> None:
    plan = kernel.plan(1000, 13, 46, 80)
    assert plan.grid[0] * plan.BLOCK_T >= 1000 > (plan.grid[0] - 1) * plan.BLOCK_T
    assert (plan.BLOCK_H, plan.BLOCK_D, plan.BLOCK_DV) == (16, 64, 128)
    assert kernel.plan(0, 8, 128, 128).grid[0] == 0
