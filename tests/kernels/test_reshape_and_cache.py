from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, make_caches, storage
from torch import Tensor

from torch_tkv import reference
from torch_tkv.kernels import reshape_and_cache as kernel
from torch_tkv.kernels.launcher import run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def launch(*args, **kwargs):
    return run(kernel.prepare(*args, **kwargs))


def assert_kernel_equals_reference(
    key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor, wrap: bool = False
) -> None:
    expected = clone_storages(*caches)
    launch(key, value, *caches, slots, wrap=wrap)
    reference.reshape_and_cache(key, value, *expected, slots, wrap=wrap)
    for cache, written in zip(caches, expected, strict=True):
        torch.testing.assert_close(storage(cache), storage(written), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize(
    ("heads", "head_size", "value_size"), [(1, 16, 16), (13, 46, 46), (3, 80, 24), (8, 128, 128)]
)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, layout: str, tokens: int, heads: int, head_size: int, value_size: int
) -> None:
    if layout.startswith("[") and head_size != value_size:
        pytest.skip("one tensor of K and V has one head size")
    caches = make_caches(layout, 6, 8, heads, head_size, value_size, device=device)
    kv = torch.randn(tokens, heads, head_size + value_size, device=device)
    slots = torch.randperm(48, device=device)[:tokens]
    slots[1::5] = -1
    assert_kernel_equals_reference(*kv.split((head_size, value_size), -1), caches, slots)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_every_pair_of_dtypes_is_rounded_as_the_reference_rounds(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    if cache_dtype is torch.bfloat16 is not dtype and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16")
    caches = make_caches("NHD", 6, 8, 3, 16, dtype=cache_dtype, device=device)
    key, value = torch.randn(2, 20, 3, 16, device=device).to(dtype)
    assert_kernel_equals_reference(key, value, caches, torch.arange(20, device=device))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_negative_slots_are_skipped_or_wrapped(
    device: str, wrap: bool, index_dtype: torch.dtype
) -> None:
    caches = make_caches("HND", 6, 8, 3, 16, device=device)
    key, value = torch.randn(2, 5, 3, 16, device=device)
    slots = torch.tensor([-1, 3, -48, 7, -5], dtype=index_dtype, device=device)
    assert_kernel_equals_reference(key, value, caches, slots, wrap)


@pytest.mark.parametrize("wrap", [False, True])
def test_slots_outside_the_cache_write_nothing_anywhere(device: str, wrap: bool) -> None:
    guarded = torch.randn(2, 10, 8, 3, 16, device=device)
    before = guarded.clone()
    key, value = torch.randn(2, 6, 3, 16, device=device)
    slots = torch.tensor([32, -33, 2**40, -(2**62), 2**63 - 1, 47], device=device)
    launch(key, value, guarded[0, 3:7], guarded[1, 3:7], slots, wrap=wrap)
    assert torch.equal(guarded, before)


def test_a_strided_slot_mapping_and_a_short_one_are_followed(device: str) -> None:
    caches = make_caches("NHD", 6, 8, 3, 16, device=device)
    key, value = torch.randn(2, 9, 3, 16, device=device)
    slots = torch.stack((torch.arange(7), torch.full((7,), 40)), dim=1).to(device)[:, 0]
    assert_kernel_equals_reference(key, value, caches, slots)


def test_special_values_are_copied_as_they_are(device: str) -> None:
    caches = make_caches("NHD", 6, 8, 1, 16, device=device)
    key = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0] * 4, device=device).view(1, 1, 16)
    launch(key, key, *caches, torch.tensor([5], device=device))
    assert torch.equal(caches[0][0, 5].view(torch.int32), key[0].view(torch.int32))


def test_the_plan_gives_each_row_a_tile_of_powers_of_two() -> None:
    plan = kernel.plan(1000, 13, 46, 80)
    assert plan == kernel.Plan((1000, 2), BLOCK_H=16, BLOCK_D=64, BLOCK_DV=128, num_warps=4)
    assert kernel.plan(1, 1, 16, 16).num_warps == 1
