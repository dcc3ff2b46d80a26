from __future__ import annotations

import itertools

import pytest
import torch
from paged import LAYOUTS, make_caches
from torch import Tensor
from writes import (
    FLOATS,
    FP8S,
    HAS_GPU,
    MODEL_DTYPE,
    assert_writes_as_reference,
    shuffled_slots,
    skip_inexact_casts,
)

from torch_tkv import reference
from torch_tkv.kernels import reshape_and_cache as kernel
from torch_tkv.kernels.launcher import run

# tokens, block size, heads, head size, value size
SIZES = [(0, 8, 3, 16, 16), (1, 8, 13, 46, 46), (33, 8, 13, 46, 46), (33, 8, 3, 80, 24)]
SIZES += [(33, 8, 8, 128, 128), (70, 1, 1, 16, 16), (9, 5, 40, 128, 128)]
if HAS_GPU:
    SIZES += [(1000, 16, 8, d, d) for d in (16, 46, 64, 72, 80, 96, 112, 128, 192, 256)]
    SIZES += [(1000, 16, heads, 128, 128) for heads in (1, 2, 3, 4, 13, 16, 32, 128)]
    SIZES += [(1000, block, 8, 128, 128) for block in (1, 8, 32, 64, 256)]
    SIZES += [(tokens, 16, 8, 128, 128) for tokens in (1, 64, 65, 5000, 20000)]
    SIZES += [(1000, 16, 8, 192, 128), (1000, 16, 1, 512, 64), (1000, 16, 2, 24, 200)]


def assert_kernel_equals_reference(
    key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], *rest: Tensor | None, **options
) -> None:
    rows = (key, value)
    assert_writes_as_reference(kernel, reference.reshape_and_cache, rows, caches, *rest, **options)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (layout, sizes)
        for layout, sizes in itertools.product(LAYOUTS, SIZES)
        if sizes[3] == sizes[4] or not layout.startswith("[")
    ],
)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, layout: str, sizes: tuple[int, ...]
) -> None:
    tokens, block_size, heads, head_size, value_size = sizes
    blocks = tokens // block_size + 6
    caches = make_caches(
        layout, blocks, block_size, heads, head_size, value_size, dtype=MODEL_DTYPE, device=device
    )
    qkv = torch.randn(tokens, heads, head_size + value_size + 7, device=device).to(MODEL_DTYPE)
    key, value, _ = qkv.split((head_size, value_size, 7), -1)
    slots = shuffled_slots(tokens, blocks * block_size, device)
    assert_kernel_equals_reference(key, value, caches, slots)
    assert_kernel_equals_reference(key.contiguous(), value.contiguous(), caches, slots.flip(0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *FP8S])
@pytest.mark.parametrize("scales", ["none", "one", "one a head", "one for keys"])
def test_every_pair_of_dtypes_is_divided_and_rounded_as_the_reference_does(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype, scales: str
) -> None:
    skip_inexact_casts(cache_dtype)
    caches = make_caches("NHD", 6, 8, 3, 16, dtype=cache_dtype, device=device)
    key, value = (100 * torch.randn(2, 20, 3, 16, device=device)).to(dtype)
    key[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    k_scale = v_scale = None
    if scales != "none":
        k_scale = torch.rand(3, 2, device=device)[:, 0] + 0.1
        v_scale = None if scales == "one for keys" else torch.rand(3, device=device) + 0.1
    if scales in ("one", "one for keys"):
        k_scale, v_scale = (s if s is None else s[0] for s in (k_scale, v_scale))
    slots = torch.arange(20, device=device)
    assert_kernel_equals_reference(key, value, caches, slots, k_scale, v_scale)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_negative_slots_are_skipped_or_wrapped(
    device: str, layout: str, index_dtype: torch.dtype, wrap: bool
) -> None:
    caches = make_caches(layout, 6, 8, 3, 16, device=device)
    key, value = torch.randn(2, 100, 3, 16, device=device)
    slots = torch.tensor([-1, 3, -48, 7, -5], dtype=index_dtype, device=device)
    assert_kernel_equals_reference(key, value, caches, slots, wrap=wrap)
    skipped = torch.full((100,), -1, dtype=index_dtype, device=device)
    assert_kernel_equals_reference(key, value, caches, skipped)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_strided_slot_mapping_and_a_short_one_are_followed(device: str, wrap: bool) -> None:
    caches = make_caches("NHD", 6, 8, 3, 16, device=device)
    key, value = torch.randn(2, 90, 3, 16, device=device)
    slots = torch.stack((torch.arange(7), torch.full((7,), 40)), dim=1).to(device)[:, 0]
    assert_kernel_equals_reference(key, value, caches, slots, wrap=wrap)


def test_k_and_v_of_unlike_layouts_and_dtypes_are_written(device: str) -> None:
    key_cache, _ = make_caches("HND", 6, 8, 8, 16, dtype=torch.float16, device=device)
    _, value_cache = make_caches("packed", 6, 8, 8, 40, 24, device=device)
    key, value = torch.randn(20, 8, 16, device=device), torch.randn(8, 20, 24, device=device)
    slots = shuffled_slots(20, 48, device)
    assert_kernel_equals_reference(key, value.transpose(0, 1), (key_cache, value_cache), slots)


def test_special_values_are_copied_as_they_are(device: str) -> None:
    caches = make_caches("NHD", 6, 8, 1, 16, device=device)
    key = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0] * 4, device=device).view(1, 1, 16)
    run(kernel.prepare(key, key, *caches, torch.tensor([5], device=device)))
    assert torch.equal(caches[0][0, 5].view(torch.int32), key[0].view(torch.int32))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_are_reached(device: str) -> None:
    blocks = 2**31 // (16 * 8 * 128) + 2
    key_cache = torch.empty(blocks, 8, 16, 128, dtype=torch.float8_e5m2, device=device)
    key_cache = key_cache.transpose(1, 2)  # [N, P, Hkv, D]
    value_cache = torch.empty(blocks, 16, 8, 1, device=device)
    key, value = torch.randn(3, 8, 128, device=device), torch.randn(3, 8, 1, device=device)
    slots = torch.tensor([blocks * 16 - 1, 0, blocks * 8], device=device)
    run(kernel.prepare(key, value, key_cache, value_cache, slots))
    written = key_cache[slots // 16, slots % 16]
    assert torch.equal(written.float(), key.to(torch.float8_e5m2).float())
    assert torch.equal(value_cache[slots // 16, slots % 16], value)


def test_heads_that_adjoin_are_one_row_unless_each_has_a_scale(device: str) -> None:
    key, value = torch.randn(2, 4, 13, 46, device=device)
    caches = make_caches("NHD", 2, 8, 13, 46, device=device)
    slots = torch.arange(4, device=device)
    scale = torch.ones(13, device=device)
    heads = kernel._reshape_and_cache.arg_names.index("HKV")

    def planned(*args) -> int:
        launch = kernel.prepare(*args)
        return (*launch.tensors, *launch.scalars, *launch.constexprs)[heads]

    assert planned(key, value, *caches, slots) == 1
    assert planned(key, value, *caches, slots, scale[0]) == 1
    assert planned(key, value, *caches, slots, scale) == 13
    assert planned(key, value[..., :45], caches[0], caches[1][..., :45], slots) == 13


@pytest.mark.parametrize(
    ("layout", "block_size"), [("NHD", 1), ("[2, N, ...]", 1), ("[N, 2, ...]", 8), ("HND", 8)]
)
def test_blocks_that_adjoin_are_written_to_as_slots(
    device: str, layout: str, block_size: int
) -> None:
    caches = make_caches(layout, 6, 8, 3, 16, device=device)
    key = torch.randn(4, 3, 16, device=device)
    launch = kernel.prepare(key, key, *caches, torch.arange(4, device=device))
    names = kernel._reshape_and_cache.arg_names
    args = (*launch.tensors, *launch.scalars, *launch.constexprs)
    assert args[names.index("P")] == block_size
    assert args[names.index("num_slots")] == 48


@pytest.mark.parametrize("tokens", [1, 64, 1000, 100_000])
@pytest.mark.parametrize(
    ("heads", "head_size", "value_size"), [(1, 16, 16), (13, 46, 80), (128, 192, 128), (1, 512, 64)]
)
def test_the_plan_covers_every_token_head_and_element(
    tokens: int, heads: int, head_size: int, value_size: int
) -> None:
    plan = kernel.plan(tokens=tokens, heads=heads, head_size=head_size, value_size=value_size)
    assert plan.grid[0] * plan.BLOCK_T >= tokens > (plan.grid[0] - 1) * plan.BLOCK_T
    assert plan.grid[1] * plan.BLOCK_H >= heads > (plan.grid[1] - 1) * plan.BLOCK_H
    assert head_size <= plan.BLOCK_D < 2 * head_size
    assert value_size <= plan.BLOCK_DV < 2 * value_size
    assert plan.grid[2] == (2 if plan.SPLIT else 1)
    assert plan.BLOCK_T * plan.BLOCK_H * max(plan.BLOCK_D, plan.BLOCK_DV) <= 4096
    assert plan.num_warps in (1, 2, 4, 8)


def test_few_tokens_have_more_threads_and_a_narrow_side_shares_a_program() -> None:
    row = {"heads": 1, "head_size": 1024, "value_size": 1024}
    for tokens, blocks in ((1, 1), (64, 32), (4096, 2048)):
        assert kernel.plan(tokens=tokens, **row) == kernel.Plan(
            (blocks, 1, 2), True, BLOCK_T=2, BLOCK_H=1, BLOCK_D=1024, BLOCK_DV=1024, num_warps=8
        )
    assert kernel.plan(tokens=4097, **row) == kernel.Plan(
        (4097, 1, 2), True, BLOCK_T=1, BLOCK_H=1, BLOCK_D=1024, BLOCK_DV=1024, num_warps=2
    )
    assert not kernel.plan(tokens=1, heads=1, head_size=512, value_size=64).SPLIT


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "block_t", "num_warps"),
    [
        (1, 1, 64, 2, 1),
        (64, 1, 64, 2, 1),
        (1024, 1, 64, 16, 4),
        (4096, 1, 64, 32, 8),
        (64, 8, 64, 2, 4),
        (64, 8, 256, 1, 8),
        (1, 40, 128, 1, 8),
    ],
)
def test_narrow_rows_take_tiles_of_more_tokens_where_there_are_many(
    tokens: int, heads: int, size: int, block_t: int, num_warps: int
) -> None:
    plan = kernel.plan(tokens=tokens, heads=heads, head_size=size, value_size=size)
    assert (plan.BLOCK_T, plan.num_warps) == (block_t, num_warps)
