"""Attention of Hugging Face Transformers over the pages of its own continuous batching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousBatchingManager

from torch_tkv.integrations.transformers_cache import NAME
from torch_tkv.ops import paged_attention, reshape_and_cache


def keep_in_continuous_batching() -> None:
    """Let continuous batching, which knows the implementations by name, keep "tkv"."""
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if hasattr(switch, "__wrapped__"):
        return

    @functools.wraps(switch)
    def keep(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != NAME:
            switch(self, model, *args, **kwargs)

    setattr(ContinuousBatchingManager, switch.__name__, keep)


# Note [Continuous batching]
# Transformers names the tokens of its paged cache one by one: read_index lists those of all
# sequences in a row, sequence b's up to cu_seq_lens_k[b + 1]. Full attention keeps them in pages,
# so every P-th of a sequence names a page, and these are its block table. A batch of prompts alone
# reads nothing older and has no read_index: there write_index lists the same. Layers with a window
# keep a ring, which Transformers unrolls into keys in a row: blocks of one token.


class Pages(NamedTuple):
    """Where continuous batching keeps the keys and values of a layer."""

    group: int  # of layers that share the indices of their tokens
    caches: tuple[Tensor, Tensor] | None  # [N, P, Hkv, D], and None for a ring


def _pages(cache: Any, layer: int) -> Pages:
    """Return the pages of a layer."""
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        paged = allocator.supports_block_table
        return Pages(allocator.index, allocator.get_cache_for_block_table(layer) if paged else None)
    group, place = cache.layer_index_to_group_indices[layer]  # Transformers 5.17
    if cache.sliding_windows[layer] != 1:  # which stands for none
        return Pages(group, None)
    tokens = cache.key_cache[place], cache.value_cache[place]
    keys, values = (states.unflatten(0, (-1, cache.block_size)) for states in tokens)
    return Pages(group, (keys, values))


def _lengths(pages: Pages, step: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return where the keys of each sequence end, and how many the longest may have."""
    kind = "sliding_attention" if pages.caches is None else "full_attention"
    ends = step["cu_seq_lens_k"]
    longest = step["max_length_k" if "max_length_k" in step else "max_seqlen_k"]  # until 5.18
    return (ends[kind], longest[kind]) if isinstance(ends, dict) else (ends, longest)


def _update_ring(
    cache: Any, layer: int, key: Tensor, value: Tensor, step: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write to a ring; return its keys and values of each sequence in a row [L, Hkv, D]."""
    if "max_length_k" not in step:  # until Transformers 5.18
        rows = cache.update(key, value, layer, step["read_index"], step["write_index"])
        return rows[0], rows[1]
    key, value = cache.update(key, value, layer, dict(step))  # which is changed
    return key[0].transpose(0, 1), value[0].transpose(0, 1)


def _attend_batch(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    step: Mapping[str, Any],
    **options: Any,
) -> Tensor:
    """Attend for a step of continuous batching; see Note [Continuous batching].

    Args:
        layer: its number.
        query: [T, Hq, D].
        key: [1, Hkv, T, D], the new ones.
        value: [1, Hkv, T, D].
        cache: of Transformers.
        step: the indices of the step, by the names that Transformers gives them.
        options: of `torch_tkv.paged_attention`.
    """
    pages = _pages(cache, layer)
    ends, longest = _lengths(pages, step)
    if pages.caches is None and options["window"] is None:  # known from the mask elsewhere
        options["window"] = cache.config.sliding_window
    read, write = step["read_index"][pages.group], step["write_index"][pages.group]
    if pages.caches is not None:
        keys, values = pages.caches
        new_keys, new_values = (states[0].transpose(0, 1) for states in (key, value))
        reshape_and_cache(new_keys, new_values, keys, values, write)
        tokens = read if read.numel() else write
    else:
        rows = _update_ring(cache, layer, key, value, step)
        keys, values = (states.unsqueeze(1) for states in rows)
        tokens = torch.arange(len(keys), device=query.device)
    block_size = keys.shape[1]
    first = torch.arange(0, longest, block_size, device=query.device)  # of each block's tokens
    entries = (ends[:-1, None] + first).clamp(max=len(tokens) - 1)
    table = tokens[entries] // block_size
    return paged_attention(
        query, keys, values, table, ends.diff(), step["cu_seq_lens_q"], **options
    )


# Keys and values of all layers are views of one tensor, which compiled code would copy.
attend_batch: Callable[..., Tensor] = torch.compiler.disable(_attend_batch)
