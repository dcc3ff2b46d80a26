"""The keys and values of all layers of a model, in blocks, at addresses that never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_tkv.ops.checks import CACHE_DTYPES, FP8_DTYPES
from torch_tkv.ops.copy_blocks import copy_blocks

_LAYOUTS = ("NHD", "HND")
_SCALES = ("tensor", "head", "token")


class LayerCache(NamedTuple):
    """The cache of one layer, as the operators take it; None where the cache has no such scale."""

    key_cache: Tensor  # [N, P, Hkv, D]
    value_cache: Tensor  # [N, P, Hkv, Dv]
    k_scale: Tensor | None  # float32 [] or [Hkv]
    v_scale: Tensor | None
    k_scale_cache: Tensor | None  # float32 [N, P, Hkv]
    v_scale_cache: Tensor | None


class PagedKVCache(nn.Module):
    """Holds K and V of all layers, zeroed, as buffers outside of the state dict.

    K and V of each layer are storages of their own, and each buffer has the shape that the
    operators take: torch.compile then hands an operator the buffers themselves to write to, which
    it never gets wrong, and CUDA graphs find them at fixed addresses. Move the cache (`to`, `cuda`)
    before anything is compiled or captured. Conversions of dtype (`half`, `to(dtype)`) pass it by.

    Args:
        num_layers: layers of the model.
        num_kv_heads: Hkv; with tensor parallelism, those of this rank.
        head_size: D.
        value_size: Dv; None means D.
        block_size: P, tokens of a block.
        num_blocks: N. Exactly one of it and `memory` is given.
        memory: bytes that the cache may take, for as many blocks as fit.
        dtype: of the cached values: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8.
        scales: None for values as they are; for 8-bit values also "tensor" (`k_scale` [], ones to
            begin with, to be filled by calibration), "head" (the same, [Hkv]) or "token" (a scale
            for each token and head, written by `reshape_and_cache_dynamic`; int8 needs it).
        layout: "NHD" or, with the slots of a head side by side in memory, "HND".
        device: where the cache lives.

    Raises:
        TypeError: dtype is none of the above.
        ValueError: a size is below 1, memory is less than a block needs, both or none of
            num_blocks and memory are given, or scales or layout are none of the above or do not fit
            the dtype.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        memory: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        scales: Literal["tensor", "head", "token"] | None = None,
        layout: Literal["NHD", "HND"] = "NHD",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        value_size = head_size if value_size is None else value_size
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "value_size": value_size,
            "block_size": block_size,
        }
        for argument, size in sizes.items():
            _require(size >= 1, argument, "at least 1", size)
        _require(layout in _LAYOUTS, "layout", '"NHD" or "HND"', repr(layout))
        _check_dtype(dtype, scales)
        ok = (num_blocks is None) != (memory is None)
        _require(ok, "num_blocks", "given, or else memory", f"{num_blocks} and {memory}")
        self.num_layers, self.num_kv_heads, self.block_size = num_layers, num_kv_heads, block_size
        self.head_size, self.value_size = head_size, value_size
        self.dtype, self.scales, self.layout = dtype, scales, layout

        fixed = num_layers * {"tensor": 8, "head": 8 * num_kv_heads}.get(scales or "", 0)
        row = (head_size + value_size) * dtype.itemsize + (8 if scales == "token" else 0)
        block = num_layers * block_size * num_kv_heads * row
        if memory is not None:
            num_blocks = (memory - fixed) // block
            _require(num_blocks >= 1, "memory", f"at least {fixed + block}, for a block", memory)
        self.num_blocks = num_blocks or 0
        _require(self.num_blocks >= 1, "num_blocks", "at least 1", num_blocks)
        self.num_bytes = fixed + self.num_blocks * block

        for i in range(num_layers):
            for name, buffer in self._allocate(device)._asdict().items():
                self.register_buffer(f"{name}_{i}", buffer, persistent=False)

    @property
    def num_slots(self) -> int:
        """Tokens that the cache has room for."""
        return self.num_blocks * self.block_size

    def layer(self, index: int) -> LayerCache:
        """Return the tensors of layer `index`, counted from 0.

        Raises:
            IndexError: there is no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer: index must be from 0 to {self.num_layers - 1}, got {index}")
        return LayerCache(*(getattr(self, f"{name}_{index}") for name in LayerCache._fields))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks onto others in every layer: what `BlockAllocator.append` returns.

        Args:
            pairs: numbers of source and destination, with meaning and errors as in
                `torch_tkv.copy_blocks`.
        """
        if not pairs:
            return
        block_pairs = torch.tensor(pairs, device=self.layer(0).key_cache.device)
        for i in range(self.num_layers):
            layer = self.layer(i)
            copy_blocks(layer.key_cache, layer.value_cache, block_pairs)
            if layer.k_scale_cache is not None and layer.v_scale_cache is not None:
                scales = layer.k_scale_cache[..., None], layer.v_scale_cache[..., None]
                copy_blocks(*scales, block_pairs)

    def extra_repr(self) -> str:
        """Say what was allocated."""
        value_size = "" if self.value_size == self.head_size else f"value_size={self.value_size}, "
        scales = "" if self.scales is None else f"scales={self.scales!r}, "
        return (
            f"num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, "
            f"head_size={self.head_size}, {value_size}block_size={self.block_size}, "
            f"num_blocks={self.num_blocks}, dtype={self.dtype}, {scales}layout={self.layout!r}: "
            f"{self.num_slots:,} tokens, {self.num_bytes:,} bytes"
        )

    def _allocate(self, device: torch.device | str | None) -> LayerCache:
        def zeros(size: int, dtype: torch.dtype) -> Tensor:  # [N, P, Hkv, size]
            shape = [self.num_blocks, self.block_size, self.num_kv_heads, size]
            if self.layout == "HND":
                shape[1:3] = reversed(shape[1:3])
            memory = torch.zeros(shape, dtype=dtype, device=device)
            return memory.transpose(1, 2) if self.layout == "HND" else memory

        def scale() -> Tensor | None:
            if self.scales not in ("tensor", "head"):
                return None
            shape = (self.num_kv_heads,) if self.scales == "head" else ()
            return torch.ones(shape, dtype=torch.float32, device=device)

        def scale_cache() -> Tensor | None:
            return zeros(1, torch.float32).squeeze(3) if self.scales == "token" else None

        return LayerCache(
            zeros(self.head_size, self.dtype),
            zeros(self.value_size, self.dtype),
            *(scale(), scale(), scale_cache(), scale_cache()),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PagedKVCache:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _check_dtype(dtype: torch.dtype, scales: str | None) -> None:
    if dtype not in (*CACHE_DTYPES, torch.int8):
        names = ", ".join(str(known).removeprefix("torch.") for known in CACHE_DTYPES)
        raise TypeError(f"PagedKVCache: dtype must be {names} or int8, got {dtype}")
    if dtype == torch.int8:
        _require(scales == "token", "scales", '"token" for int8', repr(scales))
    elif dtype in FP8_DTYPES:
        allowed = (None, *_SCALES)
        _require(scales in allowed, "scales", 'None, "tensor", "head" or "token"', repr(scales))
    else:
        _require(scales is None, "scales", f"None for {dtype}", repr(scales))


def _require(ok: bool, argument: str, requirement: str, got: object) -> None:
    if not ok:
        raise ValueError(f"PagedKVCache: {argument} must be {requirement}, got {got}")
