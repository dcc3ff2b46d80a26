"""Reference of tkv::concat_and_cache_mla: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.reference.reshape_and_cache import find_slots, to_cache


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None = None,
    *,
    wrap: bool = False,
) -> None:
    """Write `kv_c` [T, R] and `k_pe` [T, Pe] side by side into the slots of `kv_cache`, in place.

    Args and meaning are those of `torch_tkv.concat_and_cache_mla`; slots must lie in the cache.
    """
    tokens, blocks, offsets = find_slots(slot_mapping, kv_cache.shape[0], kv_cache.shape[1], wrap)
    rows = torch.cat((kv_c[tokens], k_pe[tokens]), dim=-1)
    kv_cache[blocks, offsets] = to_cache(rows, scale, kv_cache.dtype)
