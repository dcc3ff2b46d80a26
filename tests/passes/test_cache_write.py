"""Eager cache writes become one operator, in place and bit-equal, in all their spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import cache_sized, run_compiled
from torch import Tensor

N, P, H, D, DV, T = 7, 4, 2, 16, 12, 3
LAYERS = 2


def block_offset(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // P, s % P] = k
    vc[s // P, s % P] = v
    return kc.sum((0, 1))


def shift_and_mask(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s >> 2, s & 3] = k
    vc[s >> 2, s & 3] = v
    return vc.sum((0, 1))


def block_size_of_the_cache(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // kc.shape[1], s % kc.shape[1]] = k
    vc[s // vc.shape[1], s % vc.shape[1]] = v
    return kc[1]


def free_blocks_and_offsets(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s % 5, s // 10] = k
    vc[s % 5, s // 10] = v
    return kc


def flat_view(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc.view(-1, H, D)[s] = k
    vc.view(N * P, H, -1)[s] = v
    return kc.view(-1, H, D)[s]


def index_copy(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc.flatten(0, 1).index_copy_(0, s, k)
    vc.reshape(-1, H, v.shape[-1]).index_put_((s,), v)
    return vc.amax((0, 1))


def slots_of_two_dimensions(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc.flatten(0, 1)[s[None]] = k[None]
    vc.flatten(0, 1)[s[None]] = v[None]
    return kc.sum((0, 1))


def token_cache(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s], vc[s] = k, v
    return kc[s] + 1


def hnd(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // P, :, s % P] = k
    vc.transpose(1, 2)[s // P, s % P] = v
    return vc[0]


def stacked(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[0].view(-1, H, D)[s] = k
    kv[1].view(-1, H, D)[s] = v
    return kv[0]


def stacked_index(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[0, s // P, s % P] = k
    kv[1, s // P, s % P] = v
    return kv.sum((1, 2))


def unbound(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc, vc = kv.unbind(0)
    kc[s // P, s % P] = k
    vc[s // P, s % P] = v
    return kc.sum((0, 1))


def interleaved(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[:, 0][s // P, s % P] = k
    kv[s // P, 1, s % P] = v
    return kv[:, 0].sum((0, 1))


def token_interleaved(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[s // P, s % P, 0] = k
    kv[s // P, s % P, 1] = v
    return kv[1]


def packed(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc, vc = kv.split((D, DV), dim=-1)
    kc[s // P, s % P] = k
    vc[s // P, s % P] = v
    return kv.sum((0, 1))


def packed_slices(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[s // P, s % P, :, :D] = k
    kv[s // P, s % P, :, D:] = v
    return kv[..., :D].sum((0, 1))


def packed_heads(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kv[:, 0].view(N, P, H, D)[s // P, s % P] = k
    kv[:, 1].view(N, P, H, D)[s // P, s % P] = v
    return kv.sum((0, 1))


def all_layers(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    for layer in range(LAYERS):
        kv[layer, 0, s // P, s % P] = k
        kv[layer, 1, s // P, s % P] = v
        k = k + kv[layer, 0, 1, 2]
    return k


def old_read_first(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    old = kc.sum((0, 1))
    kc[s // P, s % P] = k
    vc[s // P, s % P] = v
    return old + kc[0, 0]


def values_of_any_stride(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // P, s % P] = k.transpose(1, 2).contiguous().transpose(1, 2)
    vc[s // P, s % P] = v[:, :1].expand(-1, H, -1)
    return k


def written_twice(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // P, s % P], vc[s // P, s % P] = k, v
    first = kc.sum((0, 1))
    t = s + 1
    kc[t // P, t % P], vc[t // P, t % P] = v[..., :1] + k, v
    return first + kc.sum((0, 1))


SEPARATE = ((N, P, H, D), (N, P, H, DV))
STACKED = ((2, N, P, H, D),)
# What writes, the shapes of its caches, and how many pairs it writes.
FORMS: dict[Callable[..., Any], tuple[tuple[tuple[int, ...], ...], int]] = {
    block_offset: (SEPARATE, 1),
    shift_and_mask: (SEPARATE, 1),
    block_size_of_the_cache: (SEPARATE, 1),
    free_blocks_and_offsets: (SEPARATE, 1),
    flat_view: (SEPARATE, 1),
    index_copy: (SEPARATE, 1),
    slots_of_two_dimensions: (SEPARATE, 1),
    token_cache: (((N * P, H, D), (N * P, H, DV)), 1),
    hnd: (((N, H, P, D), (N, H, P, DV)), 1),
    stacked: (STACKED, 1),
    stacked_index: (STACKED, 1),
    unbound: (STACKED, 1),
    interleaved: (((N, 2, P, H, D),), 1),
    token_interleaved: (((N, P, 2, H, D),), 1),
    packed: (((N, P, H, D + DV),), 1),
    packed_slices: (((N, P, H, D + DV),), 1),
    packed_heads: (((N, 2, P, H * D),), 1),
    all_layers: (((LAYERS, 2, N, P, H, D),), LAYERS),
    old_read_first: (SEPARATE, 1),
    values_of_any_stride: (SEPARATE, 1),
    written_twice: (SEPARATE, 2),
}
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def make_caches(form: Callable[..., Any], *, offset: bool = False) -> list[Tensor]:
    """Return random caches; with `offset`, each starts in the middle of its storage."""
    shapes, _ = FORMS[form]
    return [torch.randn(3, *shape)[1] if offset else torch.randn(shape) for shape in shapes]


def make_tokens(form: Callable[..., Any], tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    shapes, _ = FORMS[form]
    value_size = D if len(shapes) == 1 and shapes[0][-1] != D + DV else DV
    slots = torch.randperm(N * P - 1)[:tokens]
    return torch.randn(tokens, H, D), torch.randn(tokens, H, value_size), slots


def mark_dynamic(
    form: Callable[..., Any], caches: list[Tensor], tokens: tuple[Tensor, ...]
) -> None:
    """Make the number of tokens symbolic, and that of blocks or slots of a cache."""
    for tensor in tokens:
        torch._dynamo.mark_dynamic(tensor, 0)
    if form in (flat_view, packed_heads, unbound):
        return  # their source, or stock torch.compile for unbind, fixes the number of blocks
    for cache in caches:
        blocks = [dim for dim, size in enumerate(cache.shape) if size in (N, N * P)]
        torch._dynamo.mark_dynamic(cache, blocks[0])


@forms
@pytest.mark.parametrize("dynamic", [None, "blocks", "all"])
def test_a_pair_of_writes_is_one_operator_without_a_copy(
    form: Callable[..., Any], dynamic: str | None
) -> None:
    caches, tokens = make_caches(form), make_tokens(form)
    if dynamic == "blocks":
        mark_dynamic(form, caches, tokens)
    result = run_compiled(form, caches, *tokens, dynamic=True if dynamic == "all" else None)
    _, pairs = FORMS[form]
    assert result.matched == pairs
    assert result.code.count("torch.ops.tkv.reshape_and_cache.default(") == pairs
    assert not cache_sized(result.code, N * P * H * DV, N)


@forms
@pytest.mark.parametrize("buffers", [False, True], ids=["inputs", "buffers"])
@pytest.mark.parametrize("offset", [False, True], ids=["whole", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_inputs_buffers_and_views_with_an_offset_are_written_alike(
    form: Callable[..., Any], buffers: bool, offset: bool, dtype: torch.dtype
) -> None:
    caches = [cache.to(dtype) for cache in make_caches(form, offset=offset)]
    k, v, s = make_tokens(form)
    tokens = (k.to(dtype), v.to(dtype), s if form is index_copy else s.int())
    result = run_compiled(form, caches, *tokens, buffers=buffers, generate=False)
    assert result.matched == FORMS[form][1]


@forms
def test_negative_slots_wrap_as_in_eager_indexing(form: Callable[..., Any]) -> None:
    k, v, _ = make_tokens(form)
    slots = torch.tensor([-1, 2, -5])
    if form is free_blocks_and_offsets:
        slots = torch.tensor([-1, 2, 18])
    if form is index_copy:
        pytest.skip("eager index_copy_ takes no negative index")
    assert run_compiled(form, make_caches(form), k, v, slots, generate=False).matched
