from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_tkv


def arguments() -> dict[str, Tensor]:
    return {
        "key": torch.randn(6, 3, 8),
        "value": torch.randn(6, 3, 10),
        "key_cache": torch.randn(5, 3, 2, 4, 4),
        "value_cache": torch.randn(5, 3, 10, 4),
        "slot_mapping": torch.tensor([7, -1, 0, 19, 4]),
    }


def test_elements_land_where_the_layout_says() -> None:
    args = arguments()
    keys, values = args["key_cache"].clone(), args["value_cache"].clone()
    for token, slot in enumerate(args["slot_mapping"].tolist()):
        if slot >= 0:
            for d in range(8):
                keys[slot // 4, :, d // 4, slot % 4, d % 4] = args["key"][token, :, d]
            values[slot // 4, :, :, slot % 4] = args["value"][token]
    torch_tkv.reshape_and_cache_head_major(**args)
    assert torch.equal(args["key_cache"], keys)
    assert torch.equal(args["value_cache"], values)


BAD = [
    ("key_cache", lambda t: t[:, :, :1], ValueError, "with D = 8 > 0 like key, got"),
    ("value_cache", lambda t: t[:4], ValueError, "= (5, 3, 10, 4) like key_cache and value"),
    ("value_cache", lambda t: t.int(), TypeError, "float8_e5m2 [N, Hkv, Dv, P], got int32"),
    ("slot_mapping", lambda t: t + 15, IndexError, "within 20 slots, got 22 for token 0"),
]


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.reshape_and_cache_head_major(**kwargs)
    assert str(caught.value).startswith("reshape_and_cache_head_major: ")
    assert says in str(caught.value)
