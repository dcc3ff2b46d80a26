"""Tensor parallelism by heads: importing this module tells DTensor how to shard the operators.

`import torch_tkv` does not import it. A model whose modules hand each other plain local tensors, as
`parallelize_module` has them by default, needs none of it: there the operators see the heads of one
rank and a `PagedKVCache` made for as many.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from torch_tkv import ops
from torch_tkv.paged_kv_cache import PagedKVCache

Sharding = tuple[list[Placement], list[Placement]]  # of outputs and of input tensors

# The dimension of the heads, by the name of the argument; a scale [] has none.
_HEADS = {
    **dict.fromkeys(("query", "key", "value", "out_a", "out_b"), -2),
    **dict.fromkeys(("key_cache", "value_cache", "kv_cache"), -2),
    **dict.fromkeys(("k_scale_cache", "v_scale_cache", "lse_a", "lse_b"), -1),
    **dict.fromkeys(("k_scale", "v_scale", "alibi_slopes", "sinks"), -1),
}
_HEADS_OF: Mapping[str, Mapping[str, int]] = {
    "concat_and_cache_mla": {},  # one latent for all heads
    "reshape_and_cache_head_major": _HEADS | {"key_cache": 1, "value_cache": 1},
}


def distribute_cache(cache: PagedKVCache, mesh: DeviceMesh) -> PagedKVCache:
    """Return a cache of DTensors, split by heads, for a model that computes on DTensors.

    Args:
        cache: this rank's part, made for `num_kv_heads / mesh.size()` heads. It shares its memory
            with the result; blocks are copied through it.
        mesh: of one dimension.

    Raises:
        ValueError: the mesh has more dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"distribute_cache: mesh must be of one dimension, got {mesh}")
    shared = copy.copy(cache)
    shared._buffers = cache._buffers.copy()
    for name, part in cache.named_buffers():
        placement = _by_heads(name.rpartition("_")[0], part.ndim, _HEADS)
        buffer = DTensor.from_local(part, mesh, [placement], run_check=False)
        shared.register_buffer(name, buffer, persistent=False)
    return shared


def _by_heads(name: str, ndim: int, heads: Mapping[str, int]) -> Placement:
    """Return the placement of an argument of `ndim` dimensions whose heads are split."""
    return Shard(heads[name] % ndim) if name in heads and ndim > 0 else Replicate()


def _shard(op: OpOverload, heads: Mapping[str, int], *args: Any, **kwargs: Any) -> list[Sharding]:
    """Return the ways to run `op`: each rank on its heads, or every rank on all of them.

    A cache stays as it is placed, and so decides the way. Were both allowed, DTensor could
    redistribute a cache and have the operator write to the copy.
    """
    schema, stem = op._schema, op._schema.name.removeprefix("tkv::")
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    specs = {name: spec for name, spec in given.items() if hasattr(spec, "placements")}
    by_heads = {name: _by_heads(name, spec.ndim, heads) for name, spec in specs.items()}
    cached = {name: specs[name].placements[0] for name in specs if name.endswith("_cache")}
    for name, spec in specs.items():
        if spec.mesh.ndim != 1:
            raise ValueError(f"{stem}: {name} must be on a mesh of one dimension, got {spec.mesh}")
    ranks = next(iter(specs.values())).mesh.size()
    even = all(
        specs[name].shape[split.dim] % ranks == 0
        for name, split in by_heads.items()
        if isinstance(split, Shard)
    )
    ways: list[Sharding] = []
    if even and all(placement == by_heads[name] for name, placement in cached.items()):
        ways.append(([Shard(1)] * len(schema.returns), list(by_heads.values())))
    if all(placement == Replicate() for placement in cached.values()):
        ways.append(([Replicate()] * len(schema.returns), [Replicate()] * len(specs)))
    if not ways:
        wanted = {name: by_heads[name] for name in cached}
        raise ValueError(
            f"{stem}: caches must be replicated, or split by heads that {ranks} ranks can share "
            f"evenly, {wanted}, got {cached}"
        )
    return ways


for _stem in ops.__all__:
    _op = getattr(torch.ops.tkv, _stem).default
    register_sharding(_op)(partial(_shard, _op, _HEADS_OF.get(_stem, _HEADS)))
