from __future__ import annotations

import pytest
import torch
from rope import make_rotation

from torch_tkv import reference
from torch_tkv.kernels import rotary_embedding as kernel
from torch_tkv.kernels.launcher import run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def assert_kernel_equals_reference(kwargs, **options) -> None:
    expected = reference.rotary_embedding(**kwargs, **options)
    outs = run(kernel.prepare(**kwargs, **options))
    for out, exact in zip(outs, expected, strict=True):
        assert out.is_contiguous()
        torch.testing.assert_close(out, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("max_positions", [None, 40])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_size", "rotary_dim"),
    [(0, (4, 2), 16, None), (1, (32, 8), 128, 64), (9, (7, 3), 46, None), (5, (1, 5), 80, 2)],
)
def test_the_kernel_rotates_as_the_reference_rotates(
    device: str, interleaved, full_width, max_positions, tokens, heads, head_size, rotary_dim
) -> None:
    kwargs = make_rotation(
        tokens,
        heads,
        head_size,
        rotary_dim=rotary_dim,
        full_width=full_width,
        max_positions=max_positions,
        device=device,
    )
    assert_kernel_equals_reference(kwargs, interleaved=interleaved, rotary_dim=rotary_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_size", "rotary_dim"),
    [(16, None), (46, 46), (80, 32), (96, 96), (112, 56), (128, None), (192, 64), (256, None)],
)
def test_the_kernel_is_bit_equal_to_the_reference_on_a_gpu(
    interleaved, dtype, angle_dtype, head_size, rotary_dim
) -> None:
    kwargs = make_rotation(
        1000,
        (14, 2),
        head_size,
        rotary_dim=rotary_dim,
        dtype=dtype,
        angle_dtype=angle_dtype,
        device="cuda",
    )
    assert_kernel_equals_reference(kwargs, interleaved=interleaved, rotary_dim=rotary_dim)


def test_strides_and_index_dtypes_are_followed(device: str) -> None:
    kwargs = make_rotation(9, device=device)
    kwargs["query"] = kwargs["query"].transpose(0, 1).contiguous().transpose(0, 1)
    cos_sin = torch.stack((kwargs["cos"], kwargs["sin"]), -1)  # as real views of complex numbers
    kwargs["cos"], kwargs["sin"] = cos_sin.unbind(-1)
    positions = kwargs["positions"].int()
    kwargs["positions"] = torch.stack((positions, positions + 40), 1)[:, 0]
    for interleaved in (False, True):
        assert_kernel_equals_reference(kwargs, interleaved=interleaved)


def test_positions_outside_the_tables_read_nothing_outside(device: str) -> None:
    kwargs = make_rotation(5, device=device)
    guarded = torch.full((2, 60, 8), torch.nan, device=device)
    guarded[:, 10:50] = torch.stack((kwargs["cos"], kwargs["sin"]))
    kwargs["cos"], kwargs["sin"] = guarded[:, 10:50]
    positions = torch.tensor([40, -1, 2**40, -(2**62), 7], device=device)
    query, key = run(kernel.prepare(**kwargs | {"positions": positions}))
    for out, x in ((query, kwargs["query"]), (key, kwargs["key"])):
        assert (out[:4] == 0).all()
        assert (out[4] != 0).all()
        assert out[4].isfinite().all()
        assert not torch.equal(out[4], x[4])


def test_special_values_stay_in_their_heads(device: str) -> None:
    kwargs = make_rotation(3, device=device)
    kwargs["query"][0, 1, 3] = torch.nan
    kwargs["query"][1, 2, 5] = torch.inf
    kwargs["key"][2, 0, 0] = -torch.inf
    assert_kernel_equals_reference(kwargs)
