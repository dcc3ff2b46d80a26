"""Reference of tkv::copy_blocks: the specification, the CPU implementation, the oracle."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> None:
    """Copy blocks of `key_cache` [..., N, P, Hkv, D] and `value_cache` [..., N, P, Hkv, Dv].

    Args and meaning are those of `torch_tkv.copy_blocks`; numbers must be in range.
    """
    source, destination = block_pairs.long().unbind(1)
    moves = (source >= 0) & (destination >= 0) & (source != destination)
    source, destination = source[moves], destination[moves]
    for cache in (key_cache, value_cache):
        cache[..., destination, :, :, :] = cache[..., source, :, :, :]
