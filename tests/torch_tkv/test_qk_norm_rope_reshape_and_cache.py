from __future__ import annotations

import pytest
import torch
from paged import clone_storages
from rope import make_rotation, make_write
from torch import Tensor
from torch.nn.functional import rms_norm

import torch_tkv

ARGUMENTS = (
    "query", "key", "value", "cos", "sin", "positions", "key_cache", "value_cache", "slot_mapping",
    "q_weight", "k_weight", "eps",
)  # fmt: skip


def arguments(tokens: int = 6, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the positional arguments of the operator, in order."""
    kwargs = make_rotation(tokens, dtype=dtype) | make_write(tokens, dtype=dtype, cache_dtype=dtype)
    q_weight, k_weight = torch.randn(2, 16).to(dtype)
    kwargs |= {"q_weight": q_weight, "k_weight": k_weight, "eps": 1e-3}
    return {name: kwargs[name] for name in ARGUMENTS}


def rotate(x: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
    tables = [kwargs[name] for name in ("cos", "sin", "positions")]
    return torch_tkv.rotary_embedding(x, x, *tables).query


def spread(x: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
    """Return |x cos| + |y sin| of every element: what its rotation can do to a relative error."""
    cos, sin = (kwargs[name][kwargs["positions"]].abs()[:, None] for name in ("cos", "sin"))
    first, second = x.abs().chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("weight_plus_one", [False, True])
def test_it_is_a_norm_and_then_a_rotation_and_a_write(weight_plus_one: bool) -> None:
    kwargs = arguments()
    caches = clone_storages(kwargs["key_cache"], kwargs["value_cache"])
    out = torch_tkv.qk_norm_rope_reshape_and_cache(**kwargs, weight_plus_one=weight_plus_one)
    eps = kwargs.pop("eps")
    for name in ("query", "key"):
        weight = kwargs.pop(f"{name[0]}_weight") + weight_plus_one
        kwargs[name] = rms_norm(kwargs[name], (16,), weight, eps)
    got = kwargs["key_cache"], kwargs["value_cache"]
    kwargs |= {"key_cache": caches[0], "value_cache": caches[1]}
    torch.testing.assert_close(out, torch_tkv.rope_reshape_and_cache(**kwargs))
    torch.testing.assert_close(got, caches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_that_round_after_the_norm_differ_by_the_documented_bound(
    dtype: torch.dtype,
) -> None:
    kwargs = arguments(300, dtype=dtype)
    out = torch_tkv.qk_norm_rope_reshape_and_cache(**kwargs).double()
    x, weight = kwargs["query"].float(), kwargs["q_weight"]
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + kwargs["eps"])
    exact = rotate(normed * weight.float(), kwargs).double()
    u = torch.finfo(dtype).eps / 2
    spread_error = u * spread(normed * weight.float(), kwargs).double()
    tiny = 1e-5  # subnormals of float16, float32's own error
    assert ((out - exact).abs() <= u * exact.abs() + tiny).all()
    once = (normed * weight.float()).to(dtype)
    twice = normed.to(dtype) * weight
    for roundings, rounded in ((1, once), (2, twice)):
        other = rotate(rounded.float(), kwargs).to(dtype).double()
        bound = (roundings + u) * spread_error + 2 * u * exact.abs() * (1 + 4 * u) + tiny
        assert ((out - other).abs() <= bound).all()
        assert (out != other).any()


# fmt: off
BAD = [
    ("q_weight", lambda t: t.double(), TypeError, "float32 or float16 or bfloat16 [D], got float64 (16,)"),
    ("q_weight", lambda t: t[:8], ValueError, "[D = 16] like query, got float32 (8,)"),
    ("k_weight", lambda t: t[None], ValueError, "float32 or float16 or bfloat16 [D], got float32 (1, 16)"),
    ("k_weight", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("value", lambda t: t[:, :2], ValueError, "[T = 6, Hkv = 3, Dv] like key, got float32 (6, 2, 16)"),
    ("slot_mapping", lambda t: t.fill_(24), IndexError, "within 24 slots, got 24 for token 0"),
    ("positions", lambda t: t.fill_(40), IndexError, "within the 40 rows of cos, got 40 for token 0"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named_before_anything_is_written(argument, spoil, error, says) -> None:
    kwargs = arguments()
    before = kwargs["key_cache"].clone()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.qk_norm_rope_reshape_and_cache(**kwargs)
    assert str(caught.value) == f"qk_norm_rope_reshape_and_cache: {argument} must be {says}"
    assert torch.equal(kwargs["key_cache"], before)
