"""Random arguments for every operator that writes to a cache."""

from __future__ import annotations

from typing import Any

import torch
from paged import clone_storages
from rope import make_rotation, make_write
from torch import Tensor

WRITES = (
    "concat_and_cache_mla",
    "qk_norm_rope_reshape_and_cache",
    "reshape_and_cache",
    "reshape_and_cache_dynamic",
    "reshape_and_cache_head_major",
    "reshape_and_cache_packed",
    "rope_reshape_and_cache",
)


def make_arguments(
    stem: str,
    tokens: int = 6,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    block_size: int = 8,
) -> dict[str, Any]:
    """Return arguments of the operator `stem` by name: scales too, where it has them."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    write = {"cache_dtype": dtype, "block_size": block_size, **options}
    pool: dict[str, Any] = make_rotation(tokens, **options) | make_write(tokens, **write)
    blocks, _, heads, size = pool["key_cache"].shape

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    pool["kv_cache"] = randn(2, blocks, block_size, heads, size)
    pool["kv_c"], pool["k_pe"] = randn(tokens, 21).split((16, 5), -1)
    pool["q_weight"], pool["k_weight"] = randn(2, size)
    pool["eps"] = 1e-3
    pool["scale"], pool["k_scale"] = torch.rand(2, device=device) + 0.1
    pool["v_scale"] = torch.rand(heads, device=device) + 0.1
    if stem == "concat_and_cache_mla":
        pool["kv_cache"] = randn(blocks, block_size, 21)
    elif stem == "reshape_and_cache_head_major":
        pool["key_cache"] = randn(blocks, heads, size // 4, block_size, 4)
        pool["value_cache"] = randn(blocks, heads, size, block_size)
    elif stem == "reshape_and_cache_dynamic":
        for side in ("key", "value"):
            pool[f"{side}_cache"] = pool[f"{side}_cache"].char()
            pool[f"{side[0]}_scale_cache"] = randn(blocks, block_size, heads).float()
    return {a.name: pool[a.name] for a in _schema_arguments(stem) if a.name in pool}


def mutated(stem: str) -> list[str]:
    """Return the names of the arguments that the operator `stem` writes to."""
    return [a.name for a in _schema_arguments(stem) if a.alias_info and a.alias_info.is_write]


def with_own_caches(stem: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments whose caches are copies, storages and all, of those in `kwargs`."""
    names = mutated(stem)
    copies = clone_storages(*(kwargs[name] for name in names))
    return kwargs | dict(zip(names, copies, strict=True))


def _schema_arguments(stem: str) -> list[Any]:
    import torch_tkv  # noqa: F401, for it registers the operators

    return list(getattr(torch.ops.tkv, stem).default._schema.arguments)
