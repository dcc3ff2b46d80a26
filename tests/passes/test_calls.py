"""Hand-written calls of operators that mutate write in place, where torch.compile would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import cache_sized, run_compiled
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import torch_tkv
from torch_tkv import (
    concat_and_cache_mla,
    copy_blocks,
    qk_norm_rope_reshape_and_cache,
    reshape_and_cache,
    reshape_and_cache_dynamic,
    reshape_and_cache_head_major,
    reshape_and_cache_packed,
    rope_reshape_and_cache,
)
from torch_tkv.ops import library
from torch_tkv.passes.report import report

N, P, H, D, T = 7, 4, 2, 16, 3

Program = Callable[..., Any]


def whole(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kc, vc, s)
    return kc.amax() + vc.amax()


def stacked(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kv[0], kv[1], s)
    return kv.amax()


def interleaved(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kv[:, 0], kv[:, 1], s)
    return kv.amax()


def packed(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, *kv.split(D, -1), s)
    return kv.amax()


def head_major(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kc.transpose(1, 2), vc.transpose(1, 2), s)
    return kc.amax()


def flattened(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc, vc = kv.view(2, -1, P, H, D).unbind(0)
    reshape_and_cache(k, v, kc, vc, s)
    return kv.amax()


def sliced(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kc[1:], vc[1:], s)
    return kc.amax()


def old_read_first(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    old = kc[s // P, s % P] * 2  # Inductor must not inline it into what follows the call
    reshape_and_cache(k, v, kc, vc, s)
    return old + kc[0, 0]


def layers(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    for layer in range(3):
        reshape_and_cache(k, v, kv[layer, 0], kv[layer, 1], s)
        k = k + kv[layer, 0].amax()
    return k


def beside_eager_writes(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kv[0], kv[1], s)
    kv[0].view(-1, H, D)[s + 1] = v
    kv[1].view(-1, H, D)[s + 1] = k + kv[0, 0, 0, 0, 0]
    return kv.amax()


def one_packed_tensor(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache_packed(k, v, kv, s)
    return kv[0].amax()


def blocks_copied(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    copy_blocks(kv[:, 0], kv[:, 1], torch.stack([s // P, s // P + 1], 1)[:1])
    return kv.amax()


def read_and_written(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(kv[1, 2, :T], v, kv[0], kv[1], s)
    return kv.amax()


def rotated(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    cos, sin = torch.stack([k[:, 0], v[:, 0]])
    old = kv[0, s // P, s % P] * 2
    q = rope_reshape_and_cache(k * 2, k, v, cos, sin, None, kv[0], kv[1], s)
    return q + kv[0, 0, 0] + old


def rotated_twice(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    cos, sin = torch.stack([k[:, 0], v[:, 0]])
    q = rope_reshape_and_cache(k * 2, k, v, cos, sin, None, kv[0], kv[1], s)
    q = rope_reshape_and_cache(q, q, v, cos, sin, None, kv[0], kv[1], s + 1)
    kv[0, s // P, s % P] = q
    return q


def normed(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    args = k * 2, k, v, k[:, 0], v[:, 0], None, kv[0], kv[1], s, k[0, 0], v[0, 0]
    return qk_norm_rope_reshape_and_cache(*args, 1e-6)


def latent(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    concat_and_cache_mla(k[:, 0, :12], v[:, 0, :4], kv[0, :, :, 0], s)
    return kv[0, 0, 0]


def x_packed(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache_head_major(k, v, kc[1], vc[1], s)
    return kc[1, 0]


def scaled_each(
    kv: Tensor, scales: Tensor, k: Tensor, v: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    reshape_and_cache_dynamic(k, v, *kv.view(torch.int8).unbind(0), *scales.unbind(1), s)
    return kv[0, 0], scales[0]


SEPARATE = ((N, P, H, D), (N, P, H, D))
STACKED = ((2, N, P, H, D),)
CALLS: dict[Program, tuple[tuple[int, ...], ...]] = {
    whole: SEPARATE,
    stacked: STACKED,
    interleaved: ((N, 2, P, H, D),),
    packed: ((N, P, H, 2 * D),),
    head_major: ((N, H, P, D), (N, H, P, D)),
    flattened: ((2 * N, P * H * D),),
    sliced: SEPARATE,
    old_read_first: SEPARATE,
    layers: ((3, 2, N, P, H, D),),
    beside_eager_writes: STACKED,
    one_packed_tensor: STACKED,
    blocks_copied: ((3, 2, N, P, H, D),),
    read_and_written: STACKED,
    rotated: STACKED,
    rotated_twice: STACKED,
    normed: STACKED,
    latent: STACKED,
    x_packed: ((2, N, H, D // 4, P, 4), (2, N, H, D, P)),
    scaled_each: ((2, N, P, H, D), (N, 2, P, H)),
}
# Where Inductor generates code too, which takes a second or two.
GENERATED = (stacked, interleaved, packed, old_read_first, layers, rotated, scaled_each)
calls = pytest.mark.parametrize("program", CALLS, ids=lambda program: program.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:.*share a storage")


def make_inputs(program: Program, *, offset: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Return random caches, which with `offset` start in the middle of their storage."""
    shapes = CALLS[program]
    caches = [torch.randn(3, *shape)[1] if offset else torch.randn(shape) for shape in shapes]
    if program is scaled_each:  # a cache of bytes
        caches[0] = (caches[0] * 9).to(torch.uint8)
    return caches, [*torch.randn(2, T, H, D), torch.tensor([1, 9, 22])]


def mark_blocks(program: Program, caches: list[Tensor]) -> None:
    """Make the number of blocks of each cache symbolic."""
    for cache in caches:
        torch._dynamo.mark_dynamic(cache, [*cache.shape].index(N))


@calls
@pytest.mark.parametrize("dynamic", [None, "blocks", "all"])
def test_a_call_writes_what_it_writes_uncompiled(program: Program, dynamic: str | None) -> None:
    caches, tokens = make_inputs(program, offset=program is not packed)
    if dynamic == "blocks" and program is not flattened:
        mark_blocks(program, caches)
    options = {"dynamic": True if dynamic == "all" else None, "generate": program in GENERATED}
    result = run_compiled(program, caches, *tokens, **options)
    assert "auto_functionalized" not in result.text
    assert "as_strided" not in result.text
    assert program not in GENERATED or not cache_sized(result.code, N * P * H * D, N)


@calls
@pytest.mark.parametrize("buffers", [False, True], ids=["inputs", "buffers"])
def test_whole_storages_and_buffers_are_written_alike(program: Program, buffers: bool) -> None:
    caches, tokens = make_inputs(program)
    result = run_compiled(program, caches, *tokens, buffers=buffers, generate=False)
    assert "auto_functionalized" not in result.text


@pytest.mark.parametrize("program", [whole, stacked, interleaved, packed], ids=lambda p: p.__name__)
def test_another_number_of_blocks_is_compiled_rightly(program: Program) -> None:
    # Here stock torch.compile writes V over K, up to torch 2.15: storage offsets become symbolic.
    compiled = torch.compile(program, backend="tkv")
    for blocks in (7, 9, 12):
        shapes = [[blocks if n == N else n for n in shape] for shape in CALLS[program]]
        caches = [torch.randn(2, *shape) for shape in shapes]
        expected = [cache.clone() for cache in caches]
        _, tokens = make_inputs(program)
        program(*(cache[1] for cache in expected), *tokens)
        compiled(*(cache[1] for cache in caches), *tokens)
        for cache, copy in zip(caches, expected, strict=True):
            assert torch.equal(cache, copy)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_views_of_one_storage_may_be_two_inputs(dynamic: bool) -> None:
    for caches in (torch.randn(2, N, P, H, D), torch.randn(N, 2, P, H, D).transpose(0, 1)):
        _, tokens = make_inputs(whole)
        result = run_compiled(whole, caches.unbind(0), *tokens, dynamic=dynamic)
        assert "auto_functionalized" not in result.text


def test_a_call_reads_the_inputs_themselves() -> None:
    caches, tokens = make_inputs(interleaved)
    assert_expected_inline(
        run_compiled(interleaved, caches, *tokens, generate=False).text,
        """\
%0 = select(input0, 1, 0)
%1 = select(input0, 1, 1)
%2 = tkv.reshape_and_cache(input1, input2, %0, %1, input3, None, None, wrap=False)
%3 = amax(input0)""",
    )
    assert "called in place: tkv::reshape_and_cache" in str(report())


def every_third(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kv[0, ::3], kv[1, ::3], s % 8)
    return kv.amax()


def added(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    reshape_and_cache(k, v, kv[0], kv[1], s)
    kv.mul_(2.0)
    return kv.amax()


def made_inside(kv: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    new = torch.zeros_like(kv)
    reshape_and_cache(k, v, new[0], new[1], s)
    return new.amax()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (every_third, "a view that no select, slice, permute and reshape lead to"),
        (added, "its new contents come from aten.mul.Tensor"),
        (made_inside, "a tensor that is made in the compiled graph"),
    ],
)
def test_a_call_that_would_go_wrong_is_refused(program: Program, reason: str) -> None:
    caches, tokens = make_inputs(stacked)
    place = r"tkv::reshape_and_cache \(test_calls.py:\d+\)"
    text = rf"{place}.*{reason}.*use tkv::reshape_and_cache_packed"
    with pytest.raises(Exception, match=text):
        run_compiled(program, caches, *tokens, dynamic=True)


@pytest.mark.parametrize("program", [added, made_inside], ids=lambda p: p.__name__)
def test_a_call_that_inductor_gets_right_is_left_to_it(program: Program) -> None:
    caches, tokens = make_inputs(stacked)
    assert "auto_functionalized" in run_compiled(program, caches, *tokens).text


def scatter(values: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Write in a way whose functional form lays out its result anew."""
    index = (s % P).view(1, T, 1, 1).expand(len(values), T, H, D)
    return values.scatter_(1, index, v.expand_as(index).contiguous())


def viewed_before(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    reshape_and_cache(k, v, kc.transpose(1, 2), scatter(vc.transpose(1, 2), v, s), s)


def viewed_behind(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> None:
    scatter(vc.transpose(1, 2), v, s)
    reshape_and_cache(k, v, kc.transpose(1, 2), vc.transpose(1, 2), s)


@pytest.mark.parametrize("program", [viewed_before, viewed_behind], ids=lambda p: p.__name__)
@pytest.mark.parametrize("offset", [False, True])
def test_a_call_on_what_a_write_laid_out_anew_is_right_or_refused(
    program: Program, offset: bool
) -> None:
    caches, tokens = make_inputs(head_major, offset=offset)
    try:
        run_compiled(program, caches, *tokens, generate=False)
    except BackendCompilerFailed as error:
        if "a view of what a write before it laid out anew" not in str(error):
            raise


@pytest.mark.filterwarnings("error:.*share a storage")
def test_a_call_that_is_made_right_warns_of_nothing() -> None:
    library._warn_of_shared_storage.cache_clear()
    caches, tokens = make_inputs(stacked)
    torch.compile(stacked, backend="tkv")(*caches, *tokens)
    torch.compile(stacked, options=torch_tkv.inductor_options())(*caches, *tokens)
