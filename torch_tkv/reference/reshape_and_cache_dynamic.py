"""Reference of tkv::reshape_and_cache_dynamic: the specification, CPU implementation and oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.reference.reshape_and_cache import find_slots


def reshape_and_cache_dynamic(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    *,
    wrap: bool = False,
) -> None:
    """Write 8-bit codes of `key` and `value`, and a scale per token and head, in place.

    Args and meaning are those of `torch_tkv.reshape_and_cache_dynamic`; slots must lie in the
    cache.
    """
    tokens, blocks, offsets = find_slots(slot_mapping, key_cache.shape[0], key_cache.shape[1], wrap)
    sides = (key, key_cache, k_scale_cache), (value, value_cache, v_scale_cache)
    for rows, cache, scale_cache in sides:
        codes, scales = quantize(rows[tokens], cache.dtype)
        cache[blocks, offsets] = codes
        scale_cache[blocks, offsets] = scales


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [T, Hkv, D] of `rows` in `dtype`, and their scales [T, Hkv].

    A row whose scale would be 0, as that of zeros, has the scale 1. A row that holds NaN or
    infinity has the scale NaN and codes of 0: all of it reads as NaN.
    """
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    rows = rows.float()
    # A tensor, because on a GPU PyTorch divides by a number as it multiplies by its inverse.
    scales = rows.abs().amax(-1) / rows.new_tensor(limit)
    scales = scales.where(scales != 0, 1.0).where(scales < torch.inf, torch.nan)
    codes = (rows / scales[..., None]).nan_to_num(0.0).clamp(-limit, limit)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales
