"""tkv::copy_blocks: copy blocks of a paged cache onto other blocks, in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_tkv.ops.checks import CACHE_DTYPES, Checker
from torch_tkv.ops.library import define

_DTYPES = (*CACHE_DTYPES, torch.int8)

_checker = Checker("copy_blocks")


def copy_blocks(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> None:
    """Copy blocks of keys and values onto other blocks of their caches, in place.

    Pair `(source, destination)` does `cache[..., destination, :, :, :] = cache[..., source, :, :,
    :]`, in every layer. All pairs are copied at once: a block that one pair writes is written by no
    other, and read by none. A pair with a negative number is padding, and a pair of a block with
    itself does nothing.

    Args:
        key_cache: [N, P, Hkv, D] or, stacked, [L, N, P, Hkv, D]; float32, float16, bfloat16,
            float8_e4m3fn, float8_e5m2 or int8; any strides whose last is 1.
        value_cache: [..., N, P, Hkv, Dv], stacked as key_cache is, with strides and a dtype of its
            own.
        block_pairs: [n, 2], int32 or int64; source and destination.

    Raises:
        TypeError: a dtype is none of the above, or float8_e4m3fn on a GPU that lacks it.
        ValueError: shapes, strides or devices do not fit together; on CPU also, a block is written
            twice, or written and read. On a GPU the contents of such a block are unspecified.
        IndexError: on CPU, a number is no block of the cache. On a GPU such a pair is dropped, and
            TKV_DEBUG=1 makes it a device assert.
        NotImplementedError: autograd would record the call.
    """
    torch.ops.tkv.copy_blocks(key_cache, value_cache, block_pairs)


def _check(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> None:
    require = _checker.require
    stacked = key_cache.dim() == 5
    layers = "L, " if stacked else ""
    for argument, cache, size in (
        ("key_cache", key_cache, "D"),
        ("value_cache", value_cache, "Dv"),
    ):
        _checker.floats(argument, cache, f"[{layers}N, P, Hkv, {size}]", _DTYPES)
        require(0 not in cache.shape[-3:], argument, "of P, Hkv and head size > 0", cache)
    ok = value_cache.shape[:-1] == key_cache.shape[:-1]
    sizes = ", ".join(map(str, key_cache.shape[:-1]))
    require(ok, "value_cache", f"[{sizes}, Dv] like key_cache", value_cache)
    _checker.indices("block_pairs", block_pairs, "[n, 2]")
    require(block_pairs.shape[1] == 2, "block_pairs", "[n, 2]", block_pairs)
    _checker.same_device(key_cache.device, value_cache=value_cache, block_pairs=block_pairs)


def _check_indices(key_cache: Tensor, value_cache: Tensor, block_pairs: Tensor) -> None:
    require = _checker.require
    blocks = key_cache.shape[-4]
    got = block_pairs.tolist()
    ok = bool((block_pairs < blocks).all())
    require(ok, "block_pairs", f"of the cache's {blocks} blocks", got, IndexError)
    used = block_pairs[(block_pairs >= 0).all(1)]
    written = used[used[:, 0] != used[:, 1], 1]
    ok = len(written.unique()) == len(written) and not torch.isin(written, used[:, 0]).any()
    require(ok, "block_pairs", "of destinations that are written once and never read", got)


define(
    "copy_blocks(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_pairs) -> ()",
    check=_check,
    check_indices=_check_indices,
)
