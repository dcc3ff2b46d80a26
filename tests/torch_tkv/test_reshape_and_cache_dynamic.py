from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_tkv


def arguments() -> dict[str, Tensor]:
    key, value = torch.randn(2, 6, 3, 8)
    return {
        "key": key,
        "value": value,
        "key_cache": torch.zeros(5, 4, 3, 8, dtype=torch.int8),
        "value_cache": torch.zeros(5, 4, 3, 8, dtype=torch.int8),
        "k_scale_cache": torch.zeros(5, 4, 3),
        "v_scale_cache": torch.zeros(5, 4, 3),
        "slot_mapping": torch.tensor([7, -1, 0, 19, 4]),
    }


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16), (torch.float8_e5m2, 1 / 8)],
)
def test_codes_times_scales_give_the_rows_back(dtype: torch.dtype, bound: float) -> None:
    args = arguments()
    args["key_cache"] = args["key_cache"].to(dtype)
    torch_tkv.reshape_and_cache_dynamic(**args)
    read = args["key_cache"].float() * args["k_scale_cache"][..., None]
    rows = args["key"][[0, 2, 3, 4]]
    error = (read.flatten(0, 1)[[7, 0, 19, 4]] - rows).abs()
    assert (error <= bound * 1.001 * rows.abs().amax(-1, keepdim=True)).all()
    assert (read.flatten(0, 1)[1] == 0).all()


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    args = arguments()
    args["key"][0] = 0.0
    args["key"][2, 0, 3] = torch.nan
    args["key"][3, 1, 3] = -torch.inf
    torch_tkv.reshape_and_cache_dynamic(**args)
    codes, scales = (args[name].flatten(0, 1) for name in ("key_cache", "k_scale_cache"))
    assert (scales[7] == 1).all()
    assert scales[[0, 19]].isnan().tolist() == [[True, False, False], [False, True, False]]
    assert not codes[0, 0].any()
    assert codes[0, 1].any()
    assert not codes[19, 1].any()


BAD = [
    (
        "key_cache",
        lambda t: t.float(),
        TypeError,
        "int8 or float8_e4m3fn or float8_e5m2 [N, P, Hkv",
    ),
    ("k_scale_cache", lambda t: t[..., :2], ValueError, "= (5, 4, 3) like key_cache, got"),
    ("v_scale_cache", lambda t: t.half(), TypeError, "v_scale_cache must be float32 [N, P, Hkv]"),
    ("slot_mapping", lambda t: t + 15, IndexError, "within 20 slots, got 22 for token 0"),
]


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.reshape_and_cache_dynamic(**kwargs)
    assert str(caught.value).startswith("reshape_and_cache_dynamic: ")
    assert says in str(caught.value)
