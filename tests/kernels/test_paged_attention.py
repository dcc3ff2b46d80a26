from __future__ import annotations

import pytest
import torch
from paged import HAS_BF16_DOT, LAYOUTS, Batch, assert_as_accurate, make_batch

from torch_tkv import reference
from torch_tkv.kernels import paged_attention as kernel
from torch_tkv.kernels.launcher import run

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not HAS_BF16_DOT, reason="Triton's interpreter multiplies the bits of bfloat16"
        ),
    ),
]
MIXED = ([5, 33, 20, 0, 70], [1, 4, 0, 0, 40])


def launch(*args, **kwargs):
    return run(kernel.prepare(*args, **kwargs))


def assert_kernel_is_as_accurate_as_reference(
    batch: Batch, device: str, *, scale: float = 0.2, causal: bool = True
) -> None:
    out = launch(*batch.to(device), scale, causal=causal)
    expected = reference.paged_attention(*batch, scale, causal=causal)
    exact = reference.paged_attention(*batch.double(), scale, causal=causal)
    assert out.dtype == batch.query.dtype
    assert_as_accurate(out, expected, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_is_right_in_every_layout(
    device: str, layout: str, dtype: torch.dtype, causal: bool
) -> None:
    batch = make_batch(*MIXED, layout=layout, dtype=dtype, block_size=8, padding=3)
    assert_kernel_is_as_accurate_as_reference(batch, device, causal=causal)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (71, 1), (14, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_group_of_query_heads_is_right(
    device: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    for query_lens in (MIXED[1], [1, 1, 1, 0, 1]):
        batch = make_batch(MIXED[0], query_lens, heads=heads, dtype=dtype)
        assert_kernel_is_as_accurate_as_reference(batch, device)


@pytest.mark.parametrize("sizes", [(8, 8), (46, 46), (80, 80), (96, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_head_size_is_right(device: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    batch = make_batch(*MIXED, head_size=sizes[0], value_size=sizes[1], dtype=dtype)
    assert_kernel_is_as_accurate_as_reference(batch, device)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_any_block_size_and_index_dtype_is_right(
    device: str, block_size: int, index_dtype: torch.dtype
) -> None:
    batch = make_batch(*MIXED, block_size=block_size, index_dtype=index_dtype)
    assert_kernel_is_as_accurate_as_reference(batch, device)


def test_strided_queries_and_indices_are_followed(device: str) -> None:
    batch = make_batch(*MIXED)
    columns = [torch.stack((x, x + 10**6), -1)[..., 0] for x in batch[3:]]
    query = torch.cat((batch.query, batch.query + 1), -1)[..., :16]
    strided = Batch(query, *batch[1:3], *columns)
    assert all(not tensor.is_contiguous() for tensor in (query, *columns))
    assert_kernel_is_as_accurate_as_reference(strided, device)


def test_many_sequences_find_their_tiles(device: str) -> None:
    lens = torch.randint(0, 4, (1100,)).tolist()
    batch = make_batch([n + 2 for n in lens], lens, heads=(1, 1), block_size=4, padding=70)
    assert_kernel_is_as_accurate_as_reference(batch, device)


def test_an_empty_batch_and_an_empty_query_give_empty_or_zero_outputs(device: str) -> None:
    batch = make_batch([], []).to(device)
    assert launch(*batch, 1.0).shape == (0, 4, 16)
    padded = batch._replace(query=torch.randn(5, 4, 16, device=device))
    assert (launch(*padded, 1.0) == 0).all()


def test_large_scores_do_not_overflow(device: str) -> None:
    batch = make_batch(*MIXED)
    assert_kernel_is_as_accurate_as_reference(batch, device, scale=300.0)


@pytest.mark.parametrize("garbage", [-1, -(2**31), 2**31 - 1, 9])
def test_garbage_indices_read_nothing_outside_the_caches(device: str, garbage: int) -> None:
    """A block that is no block of the cache is not read: its guard regions hold NaN."""
    batch = make_batch(*MIXED, block_size=8).to(device)
    finite = [torch.nan_to_num(cache) for cache in batch[1:3]]
    n = finite[0].shape[0]
    guarded = [torch.full((3 * n, *c.shape[1:]), torch.nan, device=device) for c in finite]
    for guard, cache in zip(guarded, finite, strict=True):
        guard[n : 2 * n] = cache
    caches = [guard[n : 2 * n] for guard in guarded]
    wild = torch.full_like(batch.block_table, n if garbage == 9 else garbage)
    table = torch.where(torch.rand(wild.shape, device=device) < 0.5, wild, batch.block_table)
    out = launch(batch.query, *caches, table, *batch[4:], 0.2)
    assert not out.isnan().any()
    for indices in (torch.full_like(batch.seq_lens, garbage), batch.seq_lens):
        starts = torch.full_like(batch.query_start_loc, garbage)
        launch(batch.query, *caches, table, indices, starts, 0.2)
    lens = torch.full_like(batch.seq_lens, garbage)
    assert not launch(batch.query, *caches, table, lens, batch[5], 0.2).isnan().any()


def test_the_plan_packs_a_group_of_heads_into_the_rows_of_a_tile() -> None:
    shape = {"seqs": 4, "kv_heads": 8, "head_size": 128, "value_size": 128, "bits": 16}
    decode = kernel.plan(tokens=4, group=4, **shape)
    assert (decode.grid, decode.BLOCK_M, decode.BLOCK_Q) == ((8, 6), 16, 4)
    prefill = kernel.plan(tokens=1000, group=4, **shape)
    assert (prefill.grid, prefill.BLOCK_M, prefill.BLOCK_Q) == ((8, 67), 64, 16)
    odd = kernel.plan(tokens=1000, group=71, **shape)
    assert (odd.grid, odd.BLOCK_M, odd.BLOCK_Q) == ((8, 1005), 128, 1)
