"""Near misses: what looks like a pair of cache writes, but is none, stays, and is told why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import run_compiled
from paged import clone_storages
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report

N, P, H, D, T = 7, 4, 2, 16, 3


def accumulated(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc.index_put_((s // P, s % P), k, accumulate=True)
    vc.index_put_((s // P, s % P), v, accumulate=True)


def broadcast(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P] = k[0]
    vc[s // P, s % P] = v[:, :1]


def masked(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    mask = torch.arange(N * P).view(N, P) % 5 == s[0] % 5
    kc.index_put_((mask,), k[0])
    vc.index_put_((mask,), v[0])


def scattered_elements(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    index = (s.view(T, 1, 1) + torch.arange(D)) % (N * P)
    kc.view(-1, H, D).scatter_(0, index.expand(T, H, D), k)
    vc.view(-1, H, D).scatter_(0, index.expand(T, H, D), v)


def scattered_into_one_slot(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    index = s[:1].view(1, 1, 1).expand(T, H, D)
    kc.view(-1, H, D).scatter_(0, index, k[:1].expand(T, H, D))
    vc.view(-1, H, D).scatter_(0, index, v[:1].expand(T, H, D))


def scattered_into_some_heads(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    index = s.view(T, 1, 1).expand(T, 1, D)
    kc.view(-1, H, D).scatter_(0, index, k)
    vc.view(-1, H, D).scatter_(0, index, v)


def added(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    index = s.view(T, 1, 1).expand(T, H, D)
    kc.view(-1, H, D).scatter_add_(0, index, k)
    vc.view(-1, H, D).scatter_add_(0, index, v)


def rolled(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    for cache, x in ((kc, k), (vc, v)):
        new = cache.roll(-1, 1)
        new[s // P, -1] = x
        cache.copy_(new)


def scaled(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P], vc[s // P, s % P] = k, v
    kc.mul_(0.5)


def one_of_three(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P], vc[s // P, s % P] = k, v
    vc.index_put_((s % N, s % P), v, accumulate=True)


def head_size_in_front(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc.view(N, D, H, P)[s // P, :, :, s % P] = k.transpose(1, 2)
    vc.view(N, D, H, P)[s // P, :, :, s % P] = v.transpose(1, 2)


def one_number_for_each_token(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P, 0, 0] = k[:, 0, 0]


def value_of_a_cache(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P] = vc[0, :1].expand(T, H, D)
    vc.mul_(v[0, 0])


REASONS: dict[Callable[..., Any], str] = {
    accumulated: "accumulate=True adds",
    broadcast: "the value is broadcast: expand it",
    masked: "the index is a mask",
    scattered_elements: "scatter_ with an index for each element",
    scattered_into_one_slot: "scatter_ of several tokens into one slot",
    scattered_into_some_heads: "scatter_ into a part of the cache",
    added: "aten.scatter_add.default is no write by index",
    rolled: "its new contents come from aten.",
    scaled: "its new contents come from aten.mul.Tensor",
    one_of_three: "another write of the same tensor is left alone",
    head_size_in_front: "expected cache[slots] of [slots, Hkv, D]",
    one_number_for_each_token: "2 indices into 2 dimensions",
    value_of_a_cache: "itself a view of a mutated tensor",
}


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    caches = [torch.randn(N, P, H, D).to(dtype) for _ in range(2)]
    k, v = torch.randn(2, T, H, D).to(dtype)
    return caches, (k, v, torch.tensor([1, 9, 22]))


@pytest.mark.filterwarnings("ignore:torch_tkv")
@pytest.mark.parametrize("program", REASONS, ids=lambda program: program.__name__)
def test_a_near_miss_is_left_alone_and_the_reason_is_told(program: Callable[..., Any]) -> None:
    caches, tokens = make_inputs()
    result = run_compiled(program, caches, *tokens, generate=False)
    assert result.matched == 0
    assert "tkv" not in result.text
    assert REASONS[program] in str(report())
    layers = 2 if program is one_of_three else 1
    assert str(report()).endswith(f"\n0 of {layers} layers: cache write fused")


def pair(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    kc[s // P, s % P], vc[s // P, s % P] = k, v


def old_contents_used_with_new(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    index = [s // P, s % P]
    new_keys, new_values = kc.index_put(index, k), vc.index_put(index, v)
    out = kc * new_keys[0, 0]
    kc.copy_(new_keys)
    vc.copy_(new_values)
    return out


def written_with_a_view_of_a_cache(
    kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor
) -> Tensor:
    index = [s // P, s % P]
    new_keys, new_values = kc.index_put(index, vc[0, :T]), vc.index_put(index, v)
    kc.copy_(new_keys)
    return vc.copy_(new_values)


@pytest.mark.filterwarnings("ignore:torch_tkv")
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (old_contents_used_with_new, "the old contents of the cache are read after the write"),
        (written_with_a_view_of_a_cache, "itself a view of a mutated tensor"),
    ],
)
def test_old_contents_that_are_needed_later_are_left(
    program: Callable[..., Any], reason: str
) -> None:
    # Eager code takes a clone first, which some versions of Inductor remove.
    caches, tokens = make_inputs()
    traced = make_fx(program, tracing_mode="fake")(*caches, *tokens)
    Pipeline()(traced.graph)
    traced.recompile()
    copies = clone_storages(*caches)
    assert torch.equal(traced(*caches, *tokens), program(*copies, *tokens))
    assert torch.equal(caches[0], copies[0])
    assert reason in str(report())


@pytest.mark.filterwarnings("ignore:torch_tkv")
def test_a_dtype_that_the_operator_does_not_write_is_left_alone() -> None:
    caches, tokens = make_inputs(torch.float64)
    assert run_compiled(pair, caches, *tokens, generate=False).matched == 0
    assert "does not write torch.float64 into torch.float64" in str(report())


def test_an_index_put_that_mutates_no_input_is_no_cache_write() -> None:
    def functional(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Any:
        index = (s // P, s % P)
        return kc.index_put(index, k), vc.index_put(index, v)

    caches, tokens = make_inputs()
    assert run_compiled(functional, caches, *tokens, generate=False).matched == 0
    assert report().graphs == ()


def test_a_functional_copy_beside_the_write_keeps_both_right() -> None:
    def both(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        index = (s // P, s % P)
        other = kc.index_put(index, v)
        kc[index], vc[index] = k, v
        return other

    caches, tokens = make_inputs()
    run_compiled(both, caches, *tokens, generate=False)


@pytest.mark.filterwarnings("ignore:torch_tkv")
def test_two_views_that_interleave_in_one_storage_are_left_alone() -> None:
    _, tokens = make_inputs()
    caches = torch.randn(N, 2, P, H, D).unbind(1)
    assert run_compiled(pair, caches, *tokens, generate=False).matched == 0
    assert "interleave in one storage" in str(report())


@pytest.mark.filterwarnings("ignore:torch_tkv")
def test_a_training_graph_is_left_alone() -> None:
    caches, (k, v, s) = make_inputs()
    with torch.enable_grad():
        weight = torch.ones(D, requires_grad=True)

        def train(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
            pair(kc, vc, k, v, s)
            return (weight * k).sum()

        assert run_compiled(train, caches, k, v, s).matched == 0
    assert "compiled for training" in str(report())


def test_nothing_fused_in_a_graph_that_writes_to_caches_warns() -> None:
    caches, tokens = make_inputs()
    with pytest.warns(UserWarning, match="no write was fused"):
        run_compiled(accumulated, caches, *tokens, generate=False)
