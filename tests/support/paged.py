"""Random caches, batches and error bounds shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
        if dtype == torch.int8:
            return torch.randint(-128, 128, shape, device=device).to(dtype)
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
        """Return the batch on `device`, its caches in their own strides and storages."""
        caches = (moved(cache, device) for cache in self[1:3])
        return Batch(self.query.to(device), *caches, *(index.to(device) for index in self[3:]))


def moved(tensor: Tensor, device: str) -> Tensor:
    """Return `tensor` on `device` with the strides and the offset that it has."""
    whole = storage(tensor).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


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
    cache_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    padding: int = 0,
    window: int | None = None,
) -> Batch:
    """Return a random batch whose blocks are permuted and whose unused slots are poisoned.

    `heads` is (Hq, Hkv). `padding` query rows, of NaN, follow the last sequence. Entries of the
    block table behind a sequence's last block are out of range. With a `window`, slots before that
    of a sequence's first query are unused too.
    """
    used = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(used) + 3
    caches = make_caches(
        layout,
        num_blocks,
        block_size,
        heads[1],
        head_size,
        value_size,
        dtype=cache_dtype or dtype,
    )
    order = torch.randperm(num_blocks)
    block_table = torch.full((len(seq_lens), max([*used, 1]) + 1), -(10**6))
    for b, count in enumerate(used):
        block_table[b, :count] = order[sum(used[:b]) :][:count]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    query = torch.randn(int(starts[-1]) + padding, heads[0], head_size).to(dtype)
    query[int(starts[-1]) :] = torch.nan
    indices = (block_table, torch.tensor(seq_lens, dtype=torch.long), starts)
    batch = Batch(query, *caches, *(index.to(index_dtype) for index in indices))
    for cache in caches:
        poison(cache, ~live_slots(batch, window))
    return batch


def live_slots(batch: Batch, window: int | None = None) -> Tensor:
    """Return which slots [N, P] hold a key that a query may see."""
    block_size = batch.key_cache.shape[1]
    live = torch.zeros(batch.key_cache.shape[:2], dtype=torch.bool)
    lengths, queries = batch.seq_lens.tolist(), batch.query_start_loc.diff().tolist()
    for b, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        first = 0 if window is None else max(0, length - count + 1 - window)
        position = torch.arange(first, length)
        live[batch.block_table[b, position // block_size].long(), position % block_size] = True
    return live


def poison(cache: Tensor, dead: Tensor) -> None:
    """Fill the `dead` slots of a cache with NaN and infinities, one of int8 with its extremes."""
    values = [127, -128] if cache.dtype == torch.int8 else [torch.nan, torch.inf, -torch.inf]
    values = torch.tensor(values).to(cache.dtype)
    cache[dead] = values[torch.randint(len(values), cache[dead].shape)]


SCALES = ("one", "per head", "per token and head")


def make_scales(batch: Batch, kind: str | None, *, window: int | None = None) -> dict[str, Tensor]:
    """Return scales of the 8-bit caches of `batch`, poisoned where the caches are."""
    kv_heads = batch.key_cache.shape[2]
    if kind is None:
        return {}
    if kind == "one":
        return {"k_scale": torch.tensor(0.7), "v_scale": torch.tensor(1.3)}
    if kind == "per head":
        k_scale, v_scale = torch.rand(2, kv_heads) + 0.5
        return {"k_scale": k_scale, "v_scale": v_scale}
    largest = 1 / 64 if batch.key_cache.dtype == torch.int8 else 1.0
    num_blocks, block_size = batch.key_cache.shape[:2]
    by_head = largest * (torch.rand(2, num_blocks, kv_heads, block_size) + 0.5)
    k_scale_cache, v_scale_cache = by_head.transpose(2, 3)  # [N, P, Hkv], not contiguous
    dead = ~live_slots(batch, window)
    poison(k_scale_cache, dead)
    poison(v_scale_cache, dead)
    return {"k_scale_cache": k_scale_cache, "v_scale_cache": v_scale_cache}


MODIFIERS = ("softcap", "alibi_slopes", "sinks", "query_bias")


def make_modifiers(batch: Batch, names: Sequence[str], *, width: int = 5) -> dict[str, Any]:
    """Return the named options of `MODIFIERS`; a query bias is for `width` new tokens."""
    tokens, heads, _ = batch.query.shape
    bias = torch.randn(tokens, width + 3)[:, :width]
    bias[torch.rand(tokens, width) < 0.3] = -torch.inf
    modifiers = {
        "softcap": 1.5,
        "alibi_slopes": torch.rand(heads) / 8,
        "sinks": torch.randn(heads),
        "query_bias": bias,
    }
    return {name: modifiers[name] for name in names}


def options_on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a call with its tensors on `device`."""
    return {k: moved(v, device) if isinstance(v, Tensor) else v for k, v in options.items()}


def attend_by_loop(
    batch: Batch,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_bias: Tensor | None = None,
    **scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend query by query and head by head: the meaning of paged_attention_lse, spelled out."""
    query, _, _, block_table, seq_lens, starts = batch
    key_cache = dequantized(batch.key_cache, scales.get("k_scale"), scales.get("k_scale_cache"))
    value_cache = dequantized(batch.value_cache, scales.get("v_scale"), scales.get("v_scale_cache"))
    block_size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    out = query.new_zeros(*query.shape[:2], value_cache.shape[3])
    lse = query.new_full(query.shape[:2], -torch.inf)
    for b, length in enumerate(seq_lens.tolist()):
        rows = range(int(starts[b]), int(starts[b + 1]))
        for position, t in enumerate(rows, start=length - len(rows)):
            visible = range(position + 1) if causal else range(length)
            if window is not None:
                visible = visible[max(0, position + 1 - window) :]
            slots = [(int(block_table[b, n // block_size]), n % block_size) for n in visible]
            for h in range(query.shape[1]) if slots else ():
                keys, values = (
                    torch.stack([cache[block, offset, h // group] for block, offset in slots])
                    for cache in (key_cache, value_cache)
                )
                scores = keys @ query[t, h] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    scores += alibi_slopes[h] * (torch.tensor(visible) - position)
                for i, n in enumerate(visible):
                    new = n - (length - len(rows))
                    if query_bias is not None and 0 <= new < query_bias.shape[1]:
                        scores[i] += query_bias[t, new]
                denominator = scores.exp().sum()
                if denominator > 0:
                    denominator += 0 if sinks is None else sinks[h].exp()
                    out[t, h] = scores.exp() / denominator @ values
                    lse[t, h] = denominator.log()
    return out, lse


def dequantized(cache: Tensor, scale: Tensor | None, scale_cache: Tensor | None) -> Tensor:
    """Return the numbers [N, P, Hkv, D] that a cache and its scales stand for."""
    cache = cache.float()
    if scale is not None:
        cache = cache * scale[..., None]
    return cache if scale_cache is None else cache * scale_cache[..., None]


def assert_as_accurate(out: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Assert that `out` errs at most twice as much as `reference`, plus one rounding."""
    assert not out.isnan().any()
    rounding = max(torch.finfo(out.dtype).eps / 2, torch.finfo(torch.float32).eps)
    out, reference, exact = out.double().cpu(), reference.double().cpu(), exact.cpu()
    bound = 2 * (reference - exact).abs().max() + rounding * exact.abs().max()
    assert (out - exact).abs().max() <= bound
