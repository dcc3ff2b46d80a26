from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_tkv


def arguments() -> dict[str, Tensor]:
    return {
        "kv_c": torch.randn(6, 16),
        "k_pe": torch.randn(6, 4),
        "kv_cache": torch.randn(5, 4, 20),
        "slot_mapping": torch.tensor([7, -1, 0, 19, 4]),
        "scale": torch.tensor(0.3),
    }


def test_both_parts_land_side_by_side_divided_by_the_scale() -> None:
    args = arguments()
    before = args["kv_cache"].clone()
    torch_tkv.concat_and_cache_mla(**args)
    slots, tokens = [7, 0, 19, 4], [0, 2, 3, 4]
    rows = torch.cat((args["kv_c"], args["k_pe"]), -1)[tokens] / 0.3
    assert torch.equal(args["kv_cache"].flatten(0, 1)[slots], rows)
    others = [slot for slot in range(20) if slot not in slots]
    written, before = (cache.flatten(0, 1)[others] for cache in (args["kv_cache"], before))
    assert torch.equal(written, before)


BAD = [
    ("kv_cache", lambda t: t[..., :19], ValueError, "R + Pe = 20] like kv_c and k_pe"),
    ("k_pe", lambda t: t[:5], ValueError, "k_pe must be [T = 6, Pe] like kv_c"),
    ("scale", lambda t: t[None], ValueError, "scale must be float32 [], got float32 (1,)"),
    ("slot_mapping", lambda t: t + 15, IndexError, "within 20 slots, got 22 for token 0"),
]


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
def test_bad_input_is_named(argument, spoil, error, says) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        torch_tkv.concat_and_cache_mla(**kwargs)
    assert str(caught.value).startswith("concat_and_cache_mla: ")
    assert says in str(caught.value)
