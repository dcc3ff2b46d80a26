from __future__ import annotations

import pytest
import torch
from rope import make_rotation
from torch import Tensor

import torch_tkv


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Multiply pairs, as complex numbers, with cos + i sin: the meaning of the operator."""
    half = cos.shape[-1]
    head, rest = x.double().split((2 * half, x.shape[-1] - 2 * half), -1)
    pairs = head.unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    pairs = torch.stack((turned.real, turned.imag), -1 if interleaved else -2)
    return torch.cat((pairs.flatten(-2), rest), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 16, 10, 2])
def test_pairs_turn_as_complex_numbers_do(interleaved: bool, rotary_dim: int | None) -> None:
    kwargs = make_rotation(7, rotary_dim=rotary_dim)
    cos, sin = kwargs["cos"][kwargs["positions"]], kwargs["sin"][kwargs["positions"]]
    rotated = torch_tkv.rotary_embedding(**kwargs, interleaved=interleaved, rotary_dim=rotary_dim)
    for x, got in zip((kwargs["query"], kwargs["key"]), (rotated.query, rotated.key), strict=True):
        torch.testing.assert_close(got, rotate_complex(x, cos, sin, interleaved).float())
        assert got.is_contiguous()
        if rotary_dim is not None:
            assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_full_width_is_rotate_half_in_float32_rounded_once(dtype: torch.dtype) -> None:
    kwargs = make_rotation(7, full_width=True, max_positions=None, dtype=dtype, angle_dtype=dtype)
    cos, sin = (kwargs[name].float()[:, None] for name in ("cos", "sin"))
    rotated = torch_tkv.rotary_embedding(**kwargs)
    for x, got in zip((kwargs["query"], kwargs["key"]), rotated, strict=True):
        first, second = x.float().chunk(2, -1)
        rotate_half = torch.cat((-second, first), -1)
        assert torch.equal(got, (x.float() * cos + rotate_half * sin).to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_width_is_full_width_with_every_column_twice(interleaved: bool) -> None:
    kwargs = make_rotation(7, rotary_dim=12)
    half = torch_tkv.rotary_embedding(**kwargs, interleaved=interleaved, rotary_dim=12)
    for name in ("cos", "sin"):
        table = kwargs[name]
        doubled = torch.stack((table, table), -1 if interleaved else -2)
        kwargs[name] = doubled.flatten(-2)
    full = torch_tkv.rotary_embedding(**kwargs, interleaved=interleaved, rotary_dim=12)
    assert torch.equal(half.query, full.query)
    assert torch.equal(half.key, full.key)


def test_positions_pick_rows_of_the_tables() -> None:
    kwargs = make_rotation(7)
    picked = torch_tkv.rotary_embedding(**kwargs)
    positions = kwargs.pop("positions")
    given = torch_tkv.rotary_embedding(
        kwargs["query"], kwargs["key"], kwargs["cos"][positions], kwargs["sin"][positions]
    )
    assert torch.equal(picked.query, given.query)
    assert torch.equal(picked.key, given.key)


# fmt: off
BAD = [
    ("query", lambda t: t.double(), TypeError, "float32 or float16 or bfloat16 [T, Hq, D], got float64 (7, 6, 16)"),
    ("query", lambda t: t[..., ::2], ValueError, "of last stride 1, got strides (144, 16, 2)"),
    ("key", lambda t: t.half(), TypeError, "float32 [T, Hkv, D], got float16 (7, 3, 16)"),
    ("key", lambda t: t[:6], ValueError, "[T = 7, Hkv > 0, D = 16] like query, got float32 (6, 3, 16)"),
    ("key", lambda t: t[..., :8], ValueError, "[T = 7, Hkv > 0, D = 16] like query, got float32 (7, 3, 8)"),
    ("cos", lambda t: t.long(), TypeError, "float32 or float16 or bfloat16 [M, R], got int64 (40, 8)"),
    ("cos", lambda t: t[:, :6], ValueError, "[M, R = 16] or [M, R / 2 = 8], got float32 (40, 6)"),
    ("sin", lambda t: t.half(), TypeError, "float32 [M, R], got float16 (40, 8)"),
    ("sin", lambda t: t[:39], ValueError, "(40, 8) like cos, got float32 (39, 8)"),
    ("sin", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("positions", lambda t: None, ValueError, "[T = 7, R] like query where there are no positions, got float32 (40, 8)"),
    ("positions", lambda t: t.float(), TypeError, "int32 or int64 [T], got float32 (7,)"),
    ("positions", lambda t: t[:6], ValueError, "[T = 7] like query, got int64 (6,)"),
    ("positions", lambda t: t.fill_(40), IndexError, "within the 40 rows of cos, got 40 for token 0"),
    ("positions", lambda t: t.fill_(-1), IndexError, "within the 40 rows of cos, got -1 for token 0"),
    ("rotary_dim", lambda _: 15, ValueError, "even, positive and at most D = 16, got 15"),
    ("rotary_dim", lambda _: 18, ValueError, "even, positive and at most D = 16, got 18"),
    ("rotary_dim", lambda _: 0, ValueError, "even, positive and at most D = 16, got 0"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
@pytest.mark.parametrize("function", [torch_tkv.rotary_embedding, torch.ops.tkv.rotary_embedding])
def test_bad_input_is_named(function, argument, spoil, error, says) -> None:
    kwargs = make_rotation(7)
    kwargs[argument] = spoil(kwargs.get(argument))
    with pytest.raises(error) as caught:
        function(**kwargs)
    if "no positions" in says:
        argument = "cos"  # what then has the wrong number of rows
    assert str(caught.value) == f"rotary_embedding: {argument} must be {says}"


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = make_rotation(7)
    kwargs["key"] = kwargs["key"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="rotary_embedding: there is no backward"):
        torch_tkv.rotary_embedding(**kwargs)


@pytest.mark.parametrize("max_positions", [None, 40])
def test_opcheck_accepts_contiguous_sliced_and_permuted_inputs(max_positions: int | None) -> None:
    sliced = make_rotation(7, max_positions=max_positions)
    contiguous = {n: t if t is None else t.contiguous() for n, t in sliced.items()}
    permuted = contiguous | {
        "query": torch.randn(6, 7, 16).transpose(0, 1),
        "cos": contiguous["cos"].T.contiguous().T,
    }
    for kwargs in (sliced, contiguous, permuted):
        options = {"interleaved": True, "rotary_dim": 16}
        torch.library.opcheck(torch.ops.tkv.rotary_embedding, tuple(kwargs.values()), options)


def test_the_operator_compiles_without_a_graph_break_and_with_dynamic_shapes() -> None:
    compiled = torch.compile(torch_tkv.rotary_embedding, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        kwargs = make_rotation(tokens)
        expected, got = torch_tkv.rotary_embedding(**kwargs), compiled(**kwargs)
        assert torch.equal(got.query, expected.query)
        assert torch.equal(got.key, expected.key)
