"""Random chains of views, writes and reads of shared caches mean what they mean uncompiled."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from compiled import run_compiled
from hypothesis import given, settings
from torch import Tensor

N, P, H, D, T = 5, 4, 2, 8, 3


def write_hnd(cache: Tensor, x: Tensor, s: Tensor) -> None:
    cache.transpose(1, 2)[s // P, :, s % P] = x


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
)
cache = st.sampled_from(range(len(CACHES)))
how = st.sampled_from([0, 0, 0, 1, 2, 3, 3, 4, 5, 6])
# The caches of K and V, how they are written, and whether K depends on what was read before.
pair = st.tuples(cache, cache, how, st.booleans())
# The cache, and whether all of it or one element is read.
read = st.tuples(cache, st.booleans())
programs = st.lists(pair | pair | read, min_size=1, max_size=5)

fused = 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(programs)
@pytest.mark.filterwarnings("ignore:torch_tkv")
def check(statements: list[tuple[int, ...]]) -> None:
    def program(*args: Tensor) -> Tensor:
        *caches, k, v, s = args
        seen = torch.zeros(())
        for first, *rest in statements:
            if len(rest) == 1:
                contents = CACHES[first](*caches)
                seen = seen + (contents.amax() if rest[0] else contents[1, 2, 0, 3])
            else:
                second, way, dependent = rest
                WRITES[way](CACHES[first](*caches), k + seen if dependent else k, s)
                WRITES[way](CACHES[second](*caches), v, s)
        return seen

    torch._dynamo.reset()
    shapes = ((2, N, P, H, D), (N, P, H, 2 * D), (N, P, H, D), (N, H, P, D))
    # Small integers: sums of them are exact in any order.
    caches = [torch.randint(-99, 99, shape).float() for shape in shapes]
    k, v = torch.randint(-99, 99, (2, T, H, D)).float()
    global fused
    fused += run_compiled(program, caches, k, v, torch.tensor([3, 17, 8]), generate=False).matched


@pytest.mark.filterwarnings("ignore:torch_tkv")
def test_random_programs_mean_the_same_and_many_are_fused() -> None:
    check()
    assert fused > 50
