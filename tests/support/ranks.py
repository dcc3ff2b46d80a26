"""Checks that run in each of several processes, which share the heads of a cache."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from steps import DIM, HKV, Step, Traffic
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torch_tkv import BatchIndices, PagedBatch
from torch_tkv.distributed import distribute_cache

RANKS = 2
T, N, P, HQ, H, D = 5, 6, 4, 8, 4, 16


class Argument(NamedTuple):
    """An argument of an operator and the dimension of its heads, None where it has none."""

    value: Any
    heads: int | None = None

    def shared(self, mesh: DeviceMesh) -> Any:
        """Return a copy as DTensor, split by heads."""
        if not isinstance(self.value, Tensor):
            return self.value
        placement = Replicate() if self.heads is None else Shard(self.heads)
        return distribute_tensor(self.value.clone(), mesh, [placement])


def operators() -> dict[str, tuple[list[Argument], dict[str, Any]]]:
    """Return random arguments and options of every operator."""

    def randn(*shape: int, heads: int | None = None) -> Argument:
        return Argument(torch.randn(shape), heads)

    query, key, value = (randn(T, count, D, heads=1) for count in (HQ, H, H))
    caches = [randn(N, P, H, D, heads=2) for _ in range(2)]
    head_major = [randn(N, H, D // 4, P, 4, heads=1), randn(N, H, D, P, heads=1)]
    codes = [Argument(torch.randint(-9, 9, (N, P, H, D)).to(torch.int8), 2) for _ in range(2)]
    scale_caches = [Argument(torch.ones(N, P, H), 2) for _ in range(2)]
    scales = [Argument(torch.rand(H) + 1, 0), Argument(torch.rand(()) + 1)]
    angles = [randn(T, D // 2), randn(T, D // 2), Argument(torch.arange(T))]
    slots = Argument(torch.tensor([0, 1, 2, 8, -1]))
    table, starts = Argument(torch.tensor([[0], [2]])), Argument(torch.tensor([0, 3, 4]))
    sequences = [table, Argument(torch.tensor([3, 1])), starts]
    state = [randn(T, HQ, D, heads=1), randn(T, HQ, heads=1)]
    per_head = [randn(HQ, heads=0), randn(HQ, heads=0)]
    norm = [randn(D), randn(D), Argument(1e-6)]
    factor, absent = Argument(0.3), Argument(None)
    return {
        "concat_and_cache_mla": ([randn(T, 8), randn(T, 4), randn(N, P, 12), slots], {}),
        "copy_blocks": ([*caches, Argument(torch.tensor([[0, 3], [5, 4]]))], {}),
        "gather_cache": ([*caches, table, starts, Argument(T)], {"dtype": torch.float32}),
        "merge_attention_states": ([*state, *state], {}),
        "paged_attention": (
            [query, *caches, *sequences, factor, *[absent] * 4, *per_head],
            {"window": 2},
        ),
        "paged_attention_lse": (
            [query, *codes, *sequences, factor, absent, absent, *scale_caches],
            {},
        ),
        "qk_norm_rope_reshape_and_cache": (
            [query, key, value, *angles, *caches, slots, *norm],
            {"weight_plus_one": True},
        ),
        "reshape_and_cache": ([key, value, *caches, slots, *scales], {}),
        "reshape_and_cache_dynamic": ([key, value, *codes, *scale_caches, slots], {}),
        "reshape_and_cache_head_major": ([key, value, *head_major, slots], {}),
        "reshape_and_cache_packed": ([key, value, randn(2, N, P, H, D, heads=3), slots], {}),
        "rope_reshape_and_cache": ([query, key, value, *angles, *caches, slots], {}),
        "rotary_embedding": ([query, key, *angles], {}),
    }


def check_operator(stem: str, mesh: DeviceMesh) -> None:
    """Run an operator on whole tensors and on split ones; compare outputs and caches."""
    arguments, options = operators()[stem]
    op = getattr(torch.ops.tkv, stem).default
    parts = [argument.shared(mesh) for argument in arguments]
    got = op(*parts, **options)
    expected = op(*(argument.value for argument in arguments), **options)
    if expected is not None:
        pairs = (
            [(got, expected)] if isinstance(expected, Tensor) else zip(got, expected, strict=True)
        )
        for part, value in pairs:
            assert part.placements == (Shard(1),)
            torch.testing.assert_close(part.full_tensor(), value)
    for part, argument in zip(parts, arguments, strict=True):
        if isinstance(part, DTensor):
            assert torch.equal(part.full_tensor(), argument.value)


def check_replicated_cache(mesh: DeviceMesh) -> None:
    """A cache that every rank has whole is written whole, also from split rows."""
    (key, value, *caches, slots, _, _), _ = operators()["reshape_and_cache"]
    on_ranks = [cache._replace(heads=None).shared(mesh) for cache in caches]
    rows = key.shared(mesh), value.shared(mesh)
    torch.ops.tkv.reshape_and_cache(*rows, *on_ranks, slots.shared(mesh))
    torch.ops.tkv.reshape_and_cache(*(x.value for x in (key, value, *caches, slots)))
    for part, cache in zip(on_ranks, caches, strict=True):
        assert torch.equal(part.to_local(), cache.value)


def check_refusals(mesh: DeviceMesh) -> None:
    """A cache that is split otherwise is refused, not redistributed into a copy."""
    (key, value, *caches, slots, _, _), _ = operators()["reshape_and_cache"]
    uneven = [Argument(x.value[..., :3, :].contiguous(), x.heads) for x in (key, value, *caches)]
    blocks = [key, value, *(Argument(cache.value, 0) for cache in caches)]
    for arguments in (blocks, uneven):
        shared = [argument.shared(mesh) for argument in (*arguments, slots)]
        before = [part.to_local().clone() for part in shared]
        with pytest.raises(
            RuntimeError, match="reshape_and_cache: caches must be replicated, or s"
        ):
            torch.ops.tkv.reshape_and_cache(*shared)
        for part, was in zip(shared, before, strict=True):
            assert torch.equal(part.to_local(), was)


def check_meshes(mesh: DeviceMesh) -> None:
    """A mesh of two dimensions is refused: the rules would not know along which to split."""
    plane = init_device_mesh("cpu", (RANKS, 1))
    (key, value, *caches, slots, _, _), _ = operators()["reshape_and_cache"]
    shared = [
        distribute_tensor(argument.value, plane, [Replicate(), Replicate()])
        for argument in (key, value, *caches, slots)
    ]
    with pytest.raises(RuntimeError, match="reshape_and_cache: key must be on a mesh of one dim"):
        torch.ops.tkv.reshape_and_cache(*shared)
    with pytest.raises(ValueError, match="distribute_cache: mesh must be of one dimension"):
        distribute_cache(Step(1).cache, plane)


def check_model(
    mesh: DeviceMesh, *, dtensors: bool, backend: str | None, eager_writes: bool, layout: str
) -> None:
    """Serve sequences with a whole model and a parallel one; compare outputs and caches.

    Args:
        dtensors: the modules hand each other DTensors instead of plain tensors.
    """
    alone = Step(64, layout=layout, eager_writes=eager_writes)
    model = Step(64, layout=layout, eager_writes=eager_writes, num_kv_heads=HKV // RANKS)
    model.load_state_dict(alone.state_dict())
    columns = ColwiseParallel(use_local_output=not dtensors)
    plan = {f"layers.*.{name}": columns for name in ("query", "key", "value")}
    parallelize_module(model, mesh, plan | {"layers.*.out": RowwiseParallel()})
    # The last block takes the padding of eager writes.
    batch = PagedBatch(32, 8, 12, alone.cache.block_size, padding_slot=alone.cache.num_slots - 1)
    traffic = Traffic(batch, 63, longest=20)
    cache, indices = model.cache, batch.indices()
    if dtensors:
        model.cache = distribute_cache(cache, mesh)
        model.cos, model.sin, *shared = (
            DTensor.from_local(tensor, mesh, [Replicate()])
            for tensor in (model.cos, model.sin, *indices)
        )
        indices = BatchIndices(*shared)
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(12):
        pairs = traffic.advance()
        alone.cache.copy_blocks(pairs)
        cache.copy_blocks(pairs)
        x = torch.randn(32, DIM)
        torch.testing.assert_close(run(x, indices), alone(x, batch.indices()))
        for part, expected in zip(cache.buffers(), alone.cache.buffers(), strict=True):
            own = expected.chunk(RANKS, dim=2)[mesh.get_local_rank()]
            torch.testing.assert_close(part[:-1], own[:-1])


CHECKS: dict[str, Callable[[DeviceMesh], None]] = {
    **{stem: partial(check_operator, stem) for stem in operators()},
    "a replicated cache": check_replicated_cache,
    "refusals": check_refusals,
    "meshes": check_meshes,
    **{
        f"a model, {'DTensors' if dtensors else 'local tensors'}, {backend}, {layout}": partial(
            check_model, dtensors=dtensors, backend=backend, eager_writes=eager, layout=layout
        )
        for dtensors, backend, eager, layout in (
            (False, None, False, "HND"),
            (True, None, False, "HND"),
            (False, "tkv", True, "NHD"),
            (True, "tkv", False, "NHD"),
        )
    },
}


def run_checks(folder: Path) -> dict[str, str]:
    """Run every check in `RANKS` processes on CPU; return the tracebacks of those that fail."""
    torch.multiprocessing.spawn(_run_checks, (folder,), nprocs=RANKS)
    failures: dict[str, str] = {}
    for rank in range(RANKS):
        failures |= json.loads((folder / f"{rank}.json").read_text())
    return failures


def _run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    failures = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                check(mesh)
        except Exception:
            failures[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()
