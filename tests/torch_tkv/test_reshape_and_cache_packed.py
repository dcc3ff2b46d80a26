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
        "kv_cache": torch.randn(2, 5, 4, 3, 8),
        "slot_mapping": torch.tensor([7, -1, 0, 19, 4]),
    }


@pytest.mark.parametrize("kv_dim", [0, 1, -1])
def test_keys_and_values_land_where_the_two_views_say(kv_dim: int) -> None:
    args = arguments()
    kv_cache = args.pop("kv_cache")
    packed = torch.cat(tuple(kv_cache), -1) if kv_dim == -1 else kv_cache.movedim(0, kv_dim).clone()
    key_cache, value_cache = kv_cache.clone()
    scale = torch.rand(3) + 0.1
    torch_tkv.reshape_and_cache_packed(
        **args, kv_cache=packed, k_scale=scale, v_scale=scale[0], kv_dim=kv_dim
    )
    torch_tkv.reshape_and_cache(
        **args, key_cache=key_cache, value_cache=value_cache, k_scale=scale, v_scale=scale[0]
    )
    views = packed.split((8, 8), -1) if kv_dim == -1 else packed.unbind(kv_dim)
    assert torch.equal(views[0], key_cache)
    assert torch.equal(views[1], value_cache)


BAD = [
    ("value", lambda t: t[..., :7], ValueError, "value must be [T, Hkv, D = 8] like key"),
    ("kv_cache", lambda t: t[:1], ValueError, "kv_cache must be [2, N, P, Hkv, D], got"),
    ("kv_cache", lambda t: t[..., :7], ValueError, "that ends in (3, 8) like key and value"),
    ("kv_cache", lambda t: t.double(), TypeError, "float8_e5m2 [2, N, P, Hkv, D], got float64"),
    ("slot_mapping", lambda t: t + 15, IndexError, "within 20 slots, got 22 for token 0"),
]


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.reshape_and_cache_packed(**kwargs)
    assert str(caught.value).startswith("reshape_and_cache_packed: ")
    assert says in str(caught.value)
