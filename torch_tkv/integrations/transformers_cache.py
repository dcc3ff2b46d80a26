"""A cache of Hugging Face Transformers over `torch_tkv.PagedKVCache`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from torch_tkv.ops import paged_attention, reshape_and_cache, reshape_and_cache_dynamic
from torch_tkv.paged_kv_cache import PagedKVCache

NAME = "tkv"  # of the implementation of attention that reads such a cache


class PagedKeys(NamedTuple):
    """What a `TkvCache` returns in place of a layer's keys: the new ones, and where they go."""

    new: Tensor  # [B, Hkv, n, D]
    cache: TkvCache
    layer: int


class TkvCache(Cache):
    """Cache of Transformers over a `torch_tkv.PagedKVCache`, for models that run with "tkv".

    Each sequence owns blocks for `max_cache_len` tokens from the beginning, so nothing is decided
    on the host while tokens are generated, and a forward can be compiled and captured as a whole.
    Padding on the left is not written: it takes no slots. Layers with a sliding window keep all
    their keys, but read only those within it.

    Example::

        cache = TkvCache(model, batch_size=4, max_cache_len=1024)
        model.generate(**inputs, past_key_values=cache)

    Args:
        model: with "tkv" as its attention, of one dtype, on one device.
        batch_size: B.
        max_cache_len: most tokens of a sequence, padding not counted.
        block_size: P, tokens of a block.
        dtype: of the cached values; None means that of the model.
        scales: of 8-bit values, as for `PagedKVCache`.
        layout: of the blocks, as for `PagedKVCache`.

    Attributes:
        paged: the `PagedKVCache`.
        block_table: int32 [B, max_blocks], the blocks of each sequence.
        length: int64 [], tokens that each row of the batch has seen, padding included.

    Raises:
        ValueError: the model does not run with "tkv" or has layers without keys and values of
            their own; or `PagedKVCache` refuses an argument.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int,
        max_cache_len: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype | None = None,
        scales: Literal["tensor", "head", "token"] | None = None,
        layout: Literal["NHD", "HND"] = "NHD",
    ) -> None:
        self.config = text = model.config.get_text_config(decoder=True)
        self.check_attention()
        device = model.device
        kinds = {*(getattr(text, "layer_types", None) or ())}
        kinds -= {"full_attention", "sliding_attention"}
        _require(not kinds, "model", "one of full and sliding attention only", sorted(kinds))
        shared = getattr(text, "num_kv_shared_layers", 0)
        _require(not shared, "model", "one whose layers share no keys", f"{shared} that do")
        head_size = getattr(text, "head_dim", None)
        self.paged = PagedKVCache(
            text.num_hidden_layers,
            getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_size or text.hidden_size // text.num_attention_heads,
            block_size=block_size,
            num_blocks=batch_size * -(max_cache_len // -block_size),
            dtype=dtype or model.dtype,
            scales=scales,
            layout=layout,
            device=device,
        )
        blocks = torch.arange(self.paged.num_blocks, dtype=torch.int32, device=device)
        self.block_table = blocks.view(batch_size, -1)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.slots: Tensor | None = None  # of a forward's tokens, between its first and last layer
        # Inductor captures a graph only where what it writes has a fixed address.
        for tensor in (*self.paged.buffers(), self.block_table, self.length):
            torch._dynamo.mark_static_address(tensor)
        super().__init__(layers=[TkvLayer(self, i) for i in range(self.paged.num_layers)])

    def __repr__(self) -> str:
        return f"TkvCache({self.paged.extra_repr()})"

    def check_attention(self) -> None:
        """Raise ValueError where the model does not run with "tkv", as no other reads blocks."""
        got = self.config._attn_implementation
        _require(got == NAME, "model", f'one with attn_implementation="{NAME}"', repr(got))

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Raise NotImplementedError: beams would have to share blocks."""
        raise NotImplementedError("TkvCache: beam search is not supported")

    def crop(self, tokens_to_remove: int) -> None:
        """Raise NotImplementedError: tokens are not taken back."""
        raise NotImplementedError("TkvCache: assisted generation is not supported")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raise NotImplementedError: the number of sequences is fixed."""
        raise NotImplementedError("TkvCache: the number of sequences is fixed")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raise NotImplementedError: the number of sequences is fixed."""
        raise NotImplementedError("TkvCache: the number of sequences is fixed")


class TkvLayer(CacheLayerMixin):
    """A layer of a `TkvCache`, as Transformers asks for one; all of them have one length."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: TkvCache, index: int) -> None:
        CacheLayerMixin.__init__(self)  # which has no types, and mypy knows no base of super()
        self.cache, self.index = cache, index
        self.batch_size = cache.block_table.shape[0]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the memory is there from the beginning."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Return what the attention needs to write the new keys, and the new values.

        The attention writes them, because it knows the padding.

        Raises:
            ValueError: there are other sequences, heads or head sizes than the cache was made for,
                or the model does not run with "tkv" any more.
        """
        cache, paged = self.cache, self.cache.paged
        batch, heads, new, size = key_states.shape
        expected = (self.batch_size, paged.num_kv_heads, paged.head_size)
        ok = (batch, heads, size) == expected
        _require(ok, "keys", "[B={}, Hkv={}, n, D={}]".format(*expected), tuple(key_states.shape))
        if self.index == 0:
            cache.check_attention()
            cache.length.add_(new)
            cache.slots = None
        return PagedKeys(key_states, cache, self.index), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return 0 keys, since the indices of a forward need no block table, and no offset."""
        return 0, 0

    def get_seq_length(self) -> Any:
        """Return the tokens seen, padding included, on the device."""
        return self.cache.length

    def get_max_length(self) -> int:
        """Return how many tokens a sequence may have."""
        return self.cache.block_table.shape[1] * self.cache.paged.block_size


def write_and_attend(
    query: Tensor,
    keys: PagedKeys,
    value: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    **options: Any,
) -> Tensor:
    """Write new keys and values to their slots, then attend to all keys of the layer.

    Args:
        query: [B * n, Hq, D].
        keys: what the cache returned for the layer.
        value: [B, Hkv, n, Dv].
        seq_lens: [B], keys of each sequence, padding not counted.
        query_start_loc: [B + 1].
        options: of `torch_tkv.paged_attention`.
    """
    cache, new = keys.cache, keys.new.shape[2]
    if cache.slots is None:
        cache.slots = _slots(seq_lens, new, cache.block_table, cache.paged.block_size)
    slots, layer = cache.slots, cache.paged.layer(keys.layer)
    if keys.layer == cache.paged.num_layers - 1:
        cache.slots = None  # compiled code returns what stays in an object
    new_keys, new_values = (states.transpose(1, 2).flatten(0, 1) for states in (keys.new, value))
    key_cache, value_cache, k_scale, v_scale, k_scale_cache, v_scale_cache = layer
    if k_scale_cache is not None and v_scale_cache is not None:
        reshape_and_cache_dynamic(
            new_keys, new_values, key_cache, value_cache, k_scale_cache, v_scale_cache, slots
        )
    else:
        reshape_and_cache(new_keys, new_values, key_cache, value_cache, slots, k_scale, v_scale)
    return paged_attention(
        query,
        key_cache,
        value_cache,
        cache.block_table,
        seq_lens,
        query_start_loc,
        k_scale=k_scale,
        v_scale=v_scale,
        k_scale_cache=k_scale_cache,
        v_scale_cache=v_scale_cache,
        **options,
    )


def _slots(seq_lens: Tensor, new: int, block_table: Tensor, block_size: int) -> Tensor:
    """Return the slots [B * n] of each sequence's last n tokens, -1 for those it does not have."""
    position = (seq_lens - new)[:, None] + torch.arange(new, device=seq_lens.device)
    inside = (position >= 0) & (position < block_table.shape[1] * block_size)
    block = block_table.gather(1, torch.where(inside, position // block_size, 0))
    return torch.where(inside, block * block_size + position % block_size, -1).flatten()


def _require(ok: bool, argument: str, requirement: str, got: object) -> None:
    if not ok:
        raise ValueError(f"TkvCache: {argument} must be {requirement}, got {got}")
