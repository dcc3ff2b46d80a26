from __future__ import annotations

import pytest
import torch
from paged import assert_as_accurate, clone_storages, storage
from rope import make_rotation, make_write
from torch import Tensor

from torch_tkv import reference
from torch_tkv.kernels import qk_norm_rope_reshape_and_cache as kernel
from torch_tkv.kernels.launcher import run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Squares are added in another order, so that a rounding to 16 bits may go the other way.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def arguments(
    tokens: int,
    heads: tuple[int, int] = (6, 3),
    head_size: int = 16,
    *,
    device: str,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    **options,
) -> dict[str, Tensor | None]:
    weights = torch.randn(2, head_size, device=device).to(weight_dtype)
    return (
        make_rotation(tokens, heads, head_size, dtype=dtype, device=device, **options)
        | make_write(tokens, heads[1], head_size, dtype=dtype, cache_dtype=dtype, device=device)
        | {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-3}
    )


def run_both(kwargs, **options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the output and the caches of the kernel, and those of the reference."""
    caches = clone_storages(kwargs["key_cache"], kwargs["value_cache"])
    expected = kwargs | dict(zip(("key_cache", "value_cache"), caches, strict=True))
    out = run(kernel.prepare(**kwargs, **options))
    exact = reference.qk_norm_rope_reshape_and_cache(**expected, **options)
    return (out, kwargs["key_cache"], kwargs["value_cache"]), (exact, *caches)


def assert_kernel_equals_reference(kwargs, **options) -> None:
    for got, want in zip(*run_both(kwargs, **options), strict=True):
        tolerance = TOLERANCE[got.dtype]
        torch.testing.assert_close(storage(got), storage(want), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("weight_plus_one", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_size", "rotary_dim"),
    [(0, (4, 2), 16, None), (1, (32, 8), 128, 64), (9, (7, 3), 46, None), (5, (1, 5), 80, 2)],
)
def test_the_kernel_does_what_the_reference_does(
    device: str, interleaved, weight_plus_one, tokens, heads, head_size, rotary_dim
) -> None:
    kwargs = arguments(tokens, heads, head_size, rotary_dim=rotary_dim, device=device)
    assert_kernel_equals_reference(
        kwargs, interleaved=interleaved, weight_plus_one=weight_plus_one, rotary_dim=rotary_dim
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_size", "rotary_dim"),
    [
        ((1, 1), 46, None),
        ((26, 13), 80, 40),
        ((14, 2), 96, 32),
        ((32, 8), 128, None),
        ((5, 3), 192, 64),
        ((16, 1), 256, None),
    ],
)
def test_the_kernel_does_what_the_reference_does_on_a_gpu(
    dtype, weight_dtype, interleaved, heads, head_size, rotary_dim
) -> None:
    for tokens in (1, 33, 1000):
        kwargs = arguments(
            tokens,
            heads,
            head_size,
            rotary_dim=rotary_dim,
            dtype=dtype,
            weight_dtype=weight_dtype,
            device="cuda",
        )
        assert_kernel_equals_reference(kwargs, interleaved=interleaved, rotary_dim=rotary_dim)


def test_the_kernel_is_as_accurate_as_the_reference(device: str) -> None:
    kwargs = arguments(33, (4, 2), 64, device=device)
    exact = {n: t.double() if isinstance(t, Tensor) else t for n, t in kwargs.items()}
    exact |= {name: kwargs[name] for name in ("positions", "slot_mapping")}
    exact_out = reference.qk_norm_rope_reshape_and_cache(**exact)
    got, reference_got = run_both(kwargs)
    assert_as_accurate(got[0], reference_got[0], exact_out)
    assert_as_accurate(got[1], reference_got[1], exact["key_cache"])


def test_a_head_of_zeros_stays_zero_and_a_nan_stays_in_its_head(device: str) -> None:
    kwargs = arguments(2, device=device)
    kwargs["query"][0, 1] = 0.0
    kwargs["query"][1, 2, 3] = torch.nan
    out = run(kernel.prepare(**kwargs))
    assert (out[0, 1] == 0).all()
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 16
