"""Random chains of views, writes, calls and reads of caches mean what they mean uncompiled."""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from compiled import run_compiled
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from torch_tkv import reshape_and_cache

N, P, H, D, T = 5, 4, 2, 8, 3


def write_hnd(cache: Tensor, x: Tensor, s: Tensor) -> None:
    cache.transpose(1, 2)[s // P, :, s % P] = x


def scatter(cache: Tensor, x: Tensor, s: Tensor) -> None:
    index = (s % P).view(1, T, 1, 1).expand(N, T, H, D)
    cache.scatter_(1, index, x.expand(N, T, H, D).contiguous())


# Every way to a cache [N, P, H, D] of a stacked, a packed and two separate tensors.
CACHES: tuple[Callable[..., Tensor], ...] = (
    lambda kv, packed, kc, vc: kv[0],
    lambda kv, packed, kc, vc: kv[1],
    lambda kv, packed, kc, vc: kv.unbind(0)[1],
    lambda kv, packed, kc, vc: kv.flatten(1, 2)[0].view(N, P, H, D),
    lambda kv, packed, kc, vc: packed[..., :D],
    lambda kv, packed, kc, vc: packed.split(D, dim=-1)[1],
    lambda kv, packed, kc, vc: kc,
    lambda kv, packed, kc, vc: vc.transpose(1, 2),
)
WRITES: tuple[Callable[[Tensor, Tensor, Tensor], object], ...] = (
    lambda cache, x, s: cache.index_put_((s // P, s % P), x),
    lambda cache, x, s: cache.index_put_((s >> 2, s & 3), x),
    lambda cache, x, s: cache.index_put_((s % N, s // N), x),
    lambda cache, x, s: write_hnd(cache, x, s),
    lambda cache, x, s: cache[1:].index_put_((s % 3, s % P), x),
    lambda cache, x, s: cache.index_put_((s // P, s % P), x, accumulate=True),
    lambda cache, x, s: cache[2].copy_(x.sum(0)),
    lambda cache, x, s: cache.index_copy_(1, s % P, x.expand(N, T, H, D)),
    lambda cache, x, s: cache[1:3, 1:].copy_(x.expand(2, T, H, D)),
    lambda cache, x, s: cache[3, 2].copy_(x[1]),
    lambda cache, x, s: cache[:, 3].copy_(x[:1].expand(N, H, D)),
    lambda cache, x, s: scatter(cache, x, s),
    lambda cache, x, s: cache.index_put_((s // P,), x[:, None].expand(T, P, H, D)),
    lambda cache, x, s: cache.view(torch.int32).index_put_((s // P, s % P), x.view(torch.int32)),
)
READS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda cache: cache.amax(),
    lambda cache: cache[1, 2, 0, 3],
    lambda cache: cache[2] * 2,
    lambda cache: cache[:, 1].expand(P, N, H, D)[2, 3],
)
cache = st.sampled_from(range(len(CACHES)))
how = st.sampled_from([0, 0, 0, *range(len(WRITES)), 3])
# The caches of K and V, how they are written, and whether K depends on what was read before.
pair = st.tuples(cache, cache, how, st.booleans())
# A call by hand on the caches of K and V.
call = st.tuples(cache, cache, st.booleans())
read = st.tuples(cache, st.sampled_from(range(len(READS))))
programs = st.lists(pair | pair | read | call, min_size=1, max_size=5)

fused = 0


def check(statements: list[tuple[int, ...]], *, generate: bool = False) -> None:
    def program(*args: Tensor) -> Tensor:
        *caches, k, v, s = args
        seen = torch.zeros(P, H, D)
        for first, second, *rest in statements:
            key = k + seen[0, 0, 0] if rest and rest[-1] else k
            if len(rest) == 2:
                WRITES[rest[0]](CACHES[first](*caches), key, s)
                WRITES[rest[0]](CACHES[second](*caches), v, s)
            elif len(rest) == 1:
                reshape_and_cache(key, v, CACHES[first](*caches), CACHES[second](*caches), s)
            else:
                seen = seen + READS[second](CACHES[first](*caches))
        return seen

    torch._dynamo.reset()
    shapes = ((2, N, P, H, D), (N, P, H, 2 * D), (N, P, H, D), (N, H, P, D))
    # Small integers: sums of them are exact in any order.
    caches = [torch.randint(-99, 99, shape).float() for shape in shapes]
    k, v = torch.randint(-99, 99, (2, T, H, D)).float()
    slots = torch.tensor([3, 17, 8])
    global fused
    try:
        fused += run_compiled(program, caches, k, v, slots, generate=generate).matched
    except BackendCompilerFailed as error:
        if "would write to the wrong rows" not in str(error):
            raise


pytestmark = pytest.mark.filterwarnings("ignore:torch_tkv", "ignore:.*share a storage")
EXAMPLES = int(os.environ.get("TKV_EXAMPLES", "100"))


def test_random_programs_mean_the_same_and_many_are_fused() -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100, database=None)
    @given(programs)
    def checked(statements: list[tuple[int, ...]]) -> None:
        check(statements)

    checked()
    assert fused > 50


def test_their_generated_code_means_the_same() -> None:
    @settings(
        max_examples=EXAMPLES // 20, deadline=None, derandomize=EXAMPLES == 100, database=None
    )
    @given(programs)
    def checked(statements: list[tuple[int, ...]]) -> None:
        check(statements, generate=True)

    checked()
