"""Random caches, batches and error bounds shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HAS_BF16_DOT = torch.cuda.is_available()
LAYOUTS = ("NHD", "HND", "[2, N, ...]", "[N, 2, ...]", "packed")


def make_caches(
    layout: str,
    num_blocks: int,
    block_size: int,
    heads: int,
    head_size: int,
    value_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return random K and V caches; the last three layouts hold both in one storage."""
    n, p, h, d, dv = num_blocks, block_size, heads, head_size, value_size or head_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if layout == "[2, N, ...]":
        key, value = randn(2, n, p, h, d)
        return key, value
    if layout == "[N, 2, ...]":
        key, value = randn(n, 2, p, h, d).unbind(1)
        return key, value
    if layout == "packed":
        key, value = randn(n, p, h, d + dv).split((d, dv), dim=-1)
        return key, value
    if layout == "HND":
        return randn(n, h, p, d).transpose(1, 2), randn(n, h, p, dv).transpose(1, 2)
    return randn(n, p, h, d), randn(n, p, h, dv)


def storage(view: Tensor) -> Tensor:
    """Return the whole storage under `view`, flat: what a stray write would show in."""
    return view.new_empty(0).set_(view.untyped_storage())


def clone_storages(*views: Tensor) -> tuple[Tensor, ...]:
    """Return clones of `views` that share storages and offsets as the originals do."""
    clones = {view.untyped_storage().data_ptr(): storage(view).clone() for view in views}
    return tuple(
        clones[view.untyped_storage().data_ptr()].as_strided(
            view.shape, view.stride(), view.storage_offset()
        )
        for view in views
    )


class Batch(NamedTuple):
    """The tensor arguments of paged_attention."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor

    def double(self) -> Batch:
        """Return the batch with float64 data, for an oracle."""
        floats = (tensor.double() for tensor in self[:3])
        return Batch(*floats, *self[3:])

    def to(self, device: str) -> Batch:
        """Return the batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))


def make_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    value_size: int | None = None,
    block_size: int = 16,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    padding: int = 0,
) -> Batch:
    """Return a random batch whose blocks are permuted and whose unused slots hold NaN.

    `heads` is (Hq, Hkv). `padding` query rows follow the last sequence, and entries of the block
    table behind a sequence's last block are out of range.
    """
    used = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(used) + 3
    key_cache, value_cache = make_caches(
        layout, num_blocks, block_size, heads[1], head_size, value_size, dtype=dtype
    )
    order = torch.randperm(num_blocks)
    block_table = torch.full((len(seq_lens), max([*used, 1]) + 1), -(10**6))
    live = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for b, (length, count) in enumerate(zip(seq_lens, used, strict=True)):
        block_table[b, :count] = order[sum(used[:b]) :][:count]
        slots = torch.arange(length)
        live[block_table[b, slots // block_size], slots % block_size] = True
    key_cache[~live] = torch.nan
    value_cache[~live] = torch.nan
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    query = torch.randn(int(starts[-1]) + padding, heads[0], head_size).to(dtype)
    indices = (block_table, torch.tensor(seq_lens), starts)
    return Batch(query, key_cache, value_cache, *(index.to(index_dtype) for index in indices))


def assert_as_accurate(out: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Assert that `out` errs at most twice as much as `reference`, plus one rounding."""
    assert not out.isnan().any()
    out, reference, exact = out.double().cpu(), reference.double().cpu(), exact.cpu()
    rounding = torch.finfo(torch.float32).eps
    bound = 2 * (reference - exact).abs().max() + rounding * exact.abs().max()
    assert (out - exact).abs().max() <= bound
