"""Attention of Hugging Face Transformers over its own caches and over `torch_tkv.PagedKVCache`.

Importing this module registers `attn_implementation="tkv"`. Transformers asks for a mask once a
forward and for the attention of each layer. Here the "mask" is the indices that
`torch_tkv.paged_attention` takes: it reads a sequence's own keys only, and what is causal and
within a window it knows by itself.

Shape letters: B sequences, n new tokens of each, Hq query heads, Hkv KV heads, S slots of a row of
a contiguous cache, D head size, N blocks of P slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from torch_tkv.integrations.transformers_batching import (
    attend_batch,
    keep_in_continuous_batching,
)
from torch_tkv.integrations.transformers_cache import (
    NAME,
    PagedKeys,
    TkvCache,
    write_and_attend,
)
from torch_tkv.ops import paged_attention

__all__ = ["TkvCache", "attention", "index_mask", "register"]


class Options(TypedDict):
    """What a model's configuration says of its attention, as `paged_attention` takes it."""

    scale: float | None
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Indices(NamedTuple):
    """The indices of a forward, as `paged_attention` takes them."""

    block_table: Tensor  # [B, max_blocks]
    seq_lens: Tensor  # [B]
    query_start_loc: Tensor  # [B + 1]
    windowed: bool  # whether the mask is of the window of the model's configuration


def register() -> None:
    """Make "tkv" known to Transformers; importing this module does it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, index_mask)
    keep_in_continuous_batching()


def _require(ok: bool, argument: str, requirement: str, got: object) -> None:
    if not ok:
        raise ValueError(_error(argument, requirement, got))


def _error(argument: str, requirement: str, got: object) -> str:
    return f'attn_implementation="{NAME}": {argument} must be {requirement}, got {got}'


# Note [Indices instead of masks]
# A causal mask with left padding says no more than which keys are a sequence's: those from its
# first token to its newest. So the "mask" is an int32 matrix with a row for each sequence and one
# more: where its queries begin, how many keys it has, and its row of the block table. It comes as
# [1, 1, B + 1, 2 + W] because Transformers hands on what has four dimensions as it is; and as
# [1, B + 1, 1, 2 + W] where the mask is that of a window, which some models tell to the mask alone.
# All of it is computed once a forward, on the device: no value is read on the host.

# Note [Contiguous caches as blocks]
# A contiguous [B, Hkv, S, D] is a paged cache by strides alone: block i is its i-th run of P rows
# of D elements, of which those of head h lie h * S rows further on. The blocks of sequence b begin
# at b * Hkv * S / P. With P = 1 a sequence may begin at any slot: left padding is never read, and
# costs an entry of the block table for every key. Where nobody can have padded, a block is as
# large as S allows; of few sizes, as each is a kernel of its own and S may grow with every token.
_BLOCK_SIZES = (256, 64, 16)


def index_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the indices of a forward in place of a mask; see Note [Indices instead of masks].

    Transformers calls it. There is no mask, None, for a bidirectional encoder without padding, nor
    for packed sequences, of which continuous batching says itself where they end.

    Raises:
        ValueError: the mask is neither causal nor a causal window; or attention_mask hides more
            than left padding, which is checked where a prompt is computed, and neither in compiled
            code nor in a capture: its values would have to be read on the host.
    """
    if "allow_is_bidirectional_skip" in kwargs:
        requirement = "None for bidirectional attention"
        _require(attention_mask is None, "attention_mask", requirement, "a tensor")
        _require(local_size is None, "the mask", "causal where it is a window", "one of both sides")
        return None
    window = getattr(config, "sliding_window", None)
    requirement = "causal or a causal window"
    _require(local_size in (None, window), "the mask", requirement, f"chunks of {local_size}")
    _require(not use_vmap, "the mask", requirement, "one with a function of the model's own")
    if q_length > 1 and not allow_is_causal_skip:
        _require(attention_mask is None, "the mask", requirement, "one of more than the padding")
        return None
    row = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    first = torch.zeros_like(row)
    block_size = next((size for size in _BLOCK_SIZES if kv_length % size == 0), 1)
    if attention_mask is not None:
        if q_length > 1:
            _check_left_padded(attention_mask, q_offset + q_length)
        slots = attention_mask.int().argmax(-1) - kv_offset
        first, block_size = F.pad(slots.clamp(min=0).int(), (0, 1)), 1
    per_row = kv_length // block_size
    begin = row * (_kv_heads(config) * per_row) + first
    blocks = begin[:, None] + torch.arange(per_row, dtype=torch.int32, device=device)
    num_keys = (q_offset - kv_offset + q_length - first).clamp(min=0).int()
    indices = torch.cat(((row * q_length)[:, None], num_keys[:, None], blocks), 1)
    return indices[None, None] if local_size is None else indices[None, :, None]


def _kv_heads(config: PreTrainedConfig | None) -> int:
    return getattr(config, "num_key_value_heads", None) or 0


def _check_left_padded(attention_mask: Tensor, length: int | Tensor) -> None:
    """Raise where a mask [B, >= length] has zeros after ones, if it may be read now.

    A row may be zeros only: the first chunk of a prompt that begins later.
    """
    if torch.compiler.is_compiling():
        return
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    used = attention_mask[:, : int(length)].int()
    ones = used.sum(-1)
    ok = bool(((used.argmax(-1) + ones == used.shape[1]) | (ones == 0)).all())
    _require(ok, "attention_mask", "zeros, then ones: padding on the left", "zeros after ones")


def _indices(mask: Tensor | None) -> Indices:
    """Return what `index_mask` packed."""
    if mask is None or mask.dtype != torch.int32 or mask.shape[0] != 1 or 1 not in mask.shape[1:3]:
        got = "None" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        requirement = "2-D [B, length], or None where no sequences are packed into a row"
        raise ValueError(_error("attention_mask", requirement, got))
    rows = mask[0].flatten(0, 1)
    return Indices(rows[:-1, 2:], rows[:-1, 1], rows[:, 0], mask.shape[1] > 1)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor | PagedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from new tokens to the keys of a layer; Transformers calls it.

    Args:
        module: the layer, for its number, its configuration and whether it is causal.
        query: [B, Hq, n, D].
        key: [B, Hkv, S, D], as any cache of Transformers returns it; or what a `TkvCache` returns.
        value: [B, Hkv, S, Dv]; with a `TkvCache`, the new ones only.
        attention_mask: what `index_mask` returned.
        dropout: 0; there is no backward pass.
        scaling: factor of the scores; None means D ** -0.5.
        sliding_window: how many keys a query sees, its own position counted; None means the window
            of the mask, if it has one.
        softcap: a score `s` becomes `softcap * tanh(s / softcap)`.
        s_aux: [Hq], attention sinks.
        is_causal: whether queries see no later keys; None means what `module` says.
        position_bias: None.
        cache: the cache of continuous batching, whose indices are among `kwargs`.

    Returns:
        [B, n, Hq, Dv], and None in place of the weights, which are not computed.

    Raises:
        ValueError: an argument is none of the above, as a mask of one's own.
    """
    _require(not dropout, "dropout", "0", dropout)
    _require(position_bias is None, "position_bias", "None", "a tensor")
    _require(not kwargs.get("output_attentions"), "output_attentions", "False", True)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = Options(
        scale=scaling, causal=causal, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    rows = query.transpose(1, 2).flatten(0, 1)  # [B * n, Hq, D]
    if cache is not None:
        out = attend_batch(module.layer_idx, rows, key, value, cache, kwargs, **options)
        return out.unflatten(0, (query.shape[0], -1)), None
    if attention_mask is None and not causal and isinstance(key, Tensor):
        batch, new, length = query.shape[0], query.shape[2], key.shape[2]
        attention_mask = index_mask(
            *(batch, new, length, length - new), config=module.config, device=query.device
        )
    indices = _indices(attention_mask)
    if indices.windowed and sliding_window is None:
        options["window"] = module.config.sliding_window
    if isinstance(key, PagedKeys):
        out = write_and_attend(
            rows, key, value, indices.seq_lens, indices.query_start_loc, **options
        )
    else:
        out = _attend_contiguous(module, rows, key, value, indices, options)
    return out.unflatten(0, (query.shape[0], -1)), None


def _attend_contiguous(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Indices,
    options: Options,
) -> Tensor:
    """Attend to keys [B, Hkv, S, D]; see Note [Contiguous caches as blocks]."""
    batch, heads, length, _ = key.shape
    table = indices.block_table
    per_row = table.shape[1]
    ok = table.shape[0] == batch and per_row > 0 and length % per_row == 0
    _require(ok, "keys", f"those of the mask {tuple(table.shape)}", f"{batch} rows of {length}")
    expected = _kv_heads(module.config)
    if heads != expected:  # those of a rank, or of a layer unlike the others
        row = torch.arange(batch, dtype=torch.int32, device=table.device)
        table = table + (row * ((heads - expected) * per_row))[:, None]
    return paged_attention(
        query,
        _as_blocks(key, length // per_row),
        _as_blocks(value, length // per_row),
        table,
        indices.seq_lens,
        indices.query_start_loc,
        **options,
    )


def _as_blocks(states: Tensor, block_size: int) -> Tensor:
    """Return [B, Hkv, S, D] as blocks [N, P, Hkv, D]; see Note [Contiguous caches as blocks]."""
    batch, heads, length, size = states.shape
    blocks = ((batch - 1) * heads + 1) * (length // block_size)
    strides = (block_size * size, size, length * size, 1)
    return states.contiguous().as_strided((blocks, block_size, heads, size), strides)


register()
