from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, make_caches, storage
from torch import Tensor

from torch_tkv import reference
from torch_tkv.kernels import copy_blocks as kernel
from torch_tkv.kernels.launcher import run

HAS_GPU = torch.cuda.is_available()
# P, heads, D, Dv. The interpreter takes the small ones.
SHAPES = [(1, 1, 16, 16), (8, 13, 46, 46), (4, 3, 80, 24)]
if HAS_GPU:
    SHAPES += [(16, 8, 128, 128), (256, 2, 96, 112), (64, 1, 512, 64), (32, 32, 256, 192)]


def assert_kernel_equals_reference(caches: tuple[Tensor, ...], pairs: Tensor) -> None:
    expected = clone_storages(*caches)
    run(kernel.prepare(*caches, pairs))
    reference.copy_blocks(*expected, pairs)
    for cache, copied in zip(caches, expected, strict=True):
        assert torch.equal(storage(cache), storage(copied))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("block_size", "heads", "head_size", "value_size"), SHAPES)
def test_the_kernel_copies_what_the_reference_copies(
    device: str, layout: str, block_size: int, heads: int, head_size: int, value_size: int
) -> None:
    if layout.startswith("[") and head_size != value_size:
        pytest.skip("one tensor of K and V has one head size")
    sizes = (30, block_size, heads, head_size, value_size)
    caches = make_caches(layout, *sizes, device=device)
    order = torch.randperm(30, device=device)
    pairs = torch.stack((order[:9], order[-9:]), 1)
    pairs[3, 0], pairs[5, 1], pairs[7] = -1, -(2**40), 4
    assert_kernel_equals_reference(caches, pairs)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_every_layer_of_a_stacked_cache_is_copied(device: str, index_dtype: torch.dtype) -> None:
    kv = torch.randn(5, 2, 9, 4, 3, 16, device=device)
    pairs = torch.tensor([[0, 8, 1], [0, 3, 1]], dtype=index_dtype, device=device)[:, :2]
    assert_kernel_equals_reference(kv.unbind(1), pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_bits_are_copied_as_they_are(device: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-128, 128, (2, 5, 8, 3, 32), dtype=torch.int8, device=device)
    expected = bits.clone()
    expected[:, 4] = bits[:, 0]
    run(kernel.prepare(*bits.view(dtype), torch.tensor([[0, 4]], device=device)))
    assert torch.equal(bits, expected)


@pytest.mark.parametrize("pairs", [[[2, 5]], [[5, 2]], [[0, 2**62]], [[2**63 - 1, 0]], []])
def test_pairs_outside_the_cache_copy_nothing_anywhere(device: str, pairs: list) -> None:
    guarded = torch.randn(2, 11, 4, 3, 16, device=device)
    before = guarded.clone()
    pairs = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    run(kernel.prepare(guarded[0, 3:8], guarded[1, 3:8], pairs))
    assert torch.equal(guarded, before)


def test_the_plan_covers_a_block_with_tiles_of_powers_of_two() -> None:
    plan = kernel.plan(7, 32, 16 * 13, 46, 80)
    assert plan.grid[0] == 7
    assert plan.grid[1] * plan.BLOCK_R >= 16 * 13
    assert plan.grid[2] == 64
    assert (plan.BLOCK_D, plan.BLOCK_DV) == (64, 128)
    assert kernel.plan(1, 1, 128, 1, 1).BLOCK_R == 128
