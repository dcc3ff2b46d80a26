"""What holds for every kernel that writes to a cache."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operators import WRITES, make_arguments, mutated, with_own_caches
from paged import storage
from torch import Tensor
from triton.language import constexpr

from torch_tkv import reference
from torch_tkv.kernels.launcher import Launch, run

# Only of many tokens does a kernel write runs whole, into the layout that gains by it.
TOKENS = [(stem, 80 if stem == "reshape_and_cache_head_major" else 9) for stem in WRITES]
# The squares of a head are added in another order than the reference adds them.
TOLERANCE = {"qk_norm_rope_reshape_and_cache": 1e-5}


def prepare(stem: str, kwargs: dict[str, Any]) -> Launch:
    return importlib.import_module(f"torch_tkv.kernels.{stem}").prepare(**kwargs)


def run_kernel(stem: str, kwargs: dict[str, Any]) -> Tensor | None:
    return run(prepare(stem, kwargs))


def flatten(args: tuple[Any, ...]) -> Iterator[Any]:
    """Yield nested arguments."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from flatten(arg)
        else:
            yield arg


def compiled_for(launch: Launch) -> list[Any]:
    """Return what a kernel is compiled for: values of constants, kinds of other arguments."""
    kinds = [
        x.value if isinstance(x, constexpr) else (type(x), x == 1, x and x % 16 == 0)
        for x in flatten(launch.scalars)
    ]
    return [*kinds, launch.constexprs, launch.options]


def guard(cache: Tensor) -> Tensor:
    """Return a copy of `cache` in the middle of a storage of noise."""
    margin = 4096
    noise = torch.randn(cache.numel() + 2 * margin, device=cache.device).to(cache.dtype)
    guarded = noise.as_strided(cache.shape, cache.contiguous().stride(), margin)
    return guarded.copy_(cache)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("stem", "tokens"), [*TOKENS, *((stem, 0) for stem in WRITES)])
def test_slots_outside_the_cache_write_nothing_anywhere(
    device: str, stem: str, tokens: int, wrap: bool
) -> None:
    kwargs = make_arguments(stem, tokens, block_size=16, device=device) | {"wrap": wrap}
    kwargs |= {name: guard(kwargs[name]) for name in mutated(stem)}
    num_slots = 16 * (tokens // 16 + 3)
    outside = torch.tensor([num_slots, -num_slots - 1, 2**40, -(2**62), 2**63 - 1, num_slots + 7])
    slots = torch.arange(tokens, device=device)
    slots[3:9] = outside.to(device)[: len(slots[3:9])]
    kwargs["slot_mapping"] = slots
    expected = with_own_caches(stem, kwargs)
    inside = (slots >= 0) & (slots < num_slots)
    expected |= {"slot_mapping": slots.where(inside, -1), "wrap": False}
    outs = run_kernel(stem, kwargs), getattr(reference, stem)(**expected)
    tolerance = TOLERANCE.get(stem, 0.0)
    torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
    for name in mutated(stem):
        got, right = storage(kwargs[name]), storage(expected[name])
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("stem", "tokens"), TOKENS)
def test_a_slot_mapping_of_padding_writes_nothing(device: str, stem: str, tokens: int) -> None:
    kwargs = make_arguments(stem, tokens, block_size=16, device=device)
    before = with_own_caches(stem, kwargs)
    kwargs["slot_mapping"].fill_(-1)
    run_kernel(stem, kwargs)
    for name in mutated(stem):
        assert torch.equal(storage(kwargs[name]), storage(before[name]))


@pytest.mark.parametrize(("stem", "tokens"), TOKENS)
def test_tokens_that_share_a_slot_leave_elements_of_their_own(
    device: str, stem: str, tokens: int
) -> None:
    kwargs = make_arguments(stem, tokens, block_size=16, device=device)
    sharing = torch.tensor([0, 1, tokens - 1], device=device)
    alone = []
    for token in sharing:
        kwargs["slot_mapping"] = torch.full((tokens,), -1, device=device)
        kwargs["slot_mapping"][token] = 21
        alone.append(with_own_caches(stem, kwargs))
        run_kernel(stem, alone[-1])
    kwargs["slot_mapping"][sharing] = 21
    run_kernel(stem, kwargs)
    for name in mutated(stem):
        candidates = torch.stack([storage(one[name]) for one in alone])
        assert (storage(kwargs[name]) == candidates).any(0).all()


@pytest.mark.parametrize("stem", WRITES)
def test_kernels_are_compiled_for_strides_of_rows_and_caches(device: str, stem: str) -> None:
    launch = prepare(stem, make_arguments(stem, 144, device=device))
    args = (*launch.tensors, *launch.scalars, *launch.constexprs)
    named = zip(launch.kernel.arg_names, args, strict=True)
    strides = [arg for name, arg in named if name.endswith("_strides")]
    assert len(strides) >= 4
    assert all(isinstance(stride, constexpr) for stride in flatten(tuple(strides)))


@pytest.mark.parametrize("stem", [stem for stem in WRITES if stem != "concat_and_cache_mla"])
def test_no_kernel_is_compiled_for_a_number_of_tokens(device: str, stem: str) -> None:
    few, many = (make_arguments(stem, tokens, device=device) for tokens in (144, 160))
    assert compiled_for(prepare(stem, few)) == compiled_for(prepare(stem, many))
    for kwargs in (few, many):
        for name in {"query", "key", "value"} & kwargs.keys():
            kwargs[name] = kwargs[name].transpose(0, 1).contiguous().transpose(0, 1)  # [H, T, D]
    launches = [prepare(stem, kwargs) for kwargs in (few, many)]
    for kwargs, launch in zip((few, many), launches, strict=True):
        assert kwargs["key"].stride(1) in flatten(launch.scalars)
    assert compiled_for(launches[0]) == compiled_for(launches[1])
