from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, storage
from rope import make_rotation, make_write
from torch import Tensor

import torch_tkv

ARGUMENTS = (
    "query", "key", "value", "cos", "sin", "positions", "key_cache", "value_cache", "slot_mapping",
)  # fmt: skip


def arguments(tokens: int = 6, *, max_positions: int | None = 40, **options) -> dict[str, Tensor]:
    """Return the positional arguments of the operator, in order."""
    dtype = options.get("dtype", torch.float32)
    kwargs = make_rotation(tokens, max_positions=max_positions, dtype=dtype)
    kwargs |= make_write(tokens, **options)
    return {name: kwargs[name] for name in ARGUMENTS}


def copy(kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments with caches of their own."""
    caches = clone_storages(kwargs["key_cache"], kwargs["value_cache"])
    return kwargs | dict(zip(("key_cache", "value_cache"), caches, strict=True))


def assert_same_caches(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ("key_cache", "value_cache"):
        assert torch.equal(storage(got[name]).float(), storage(expected[name]).float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_a_rotation_and_then_a_write(
    layout: str, dtype: torch.dtype, interleaved: bool
) -> None:
    kwargs = arguments(layout=layout, dtype=dtype)
    expected = copy(kwargs)
    out = torch_tkv.rope_reshape_and_cache(**kwargs, interleaved=interleaved)
    rotation = [expected[name] for name in ("query", "key", "cos", "sin", "positions")]
    query, key = torch_tkv.rotary_embedding(*rotation, interleaved=interleaved)
    write = [expected[name] for name in ("value", "key_cache", "value_cache", "slot_mapping")]
    torch_tkv.reshape_and_cache(key, *write)
    assert torch.equal(out, query)
    assert_same_caches(kwargs, expected)


def test_keys_are_rounded_to_their_dtype_before_they_are_scaled() -> None:
    kwargs = arguments(dtype=torch.bfloat16, cache_dtype=torch.float32)
    kwargs["slot_mapping"] = torch.arange(6)
    k_scale, v_scale = torch.tensor([0.3, 1.7, 5.0]), torch.tensor(0.7)
    torch_tkv.rope_reshape_and_cache(**kwargs, k_scale=k_scale, v_scale=v_scale)
    _, key = torch_tkv.rotary_embedding(*list(kwargs.values())[:2], *list(kwargs.values())[3:6])
    written = kwargs["key_cache"].flatten(0, 1)[:6]
    assert torch.equal(written, key.float() / k_scale[:, None])
    written = kwargs["value_cache"].flatten(0, 1)[:6]
    assert torch.equal(written, kwargs["value"].float() / v_scale)


def test_the_query_of_every_token_is_rotated_whatever_its_slot() -> None:
    kwargs = arguments()
    full = torch_tkv.rope_reshape_and_cache(**copy(kwargs))
    for slots in (torch.full((6,), -1), kwargs["slot_mapping"][:0], kwargs["slot_mapping"][:2]):
        out = torch_tkv.rope_reshape_and_cache(**copy(kwargs) | {"slot_mapping": slots})
        assert torch.equal(out, full)
    assert not torch.equal(full, kwargs["query"])


def test_wrap_counts_negative_slots_from_the_end() -> None:
    kwargs = arguments()
    expected = copy(kwargs)
    num_slots = kwargs["key_cache"].shape[:2].numel()
    kwargs["slot_mapping"] = torch.arange(-6, 0)
    expected["slot_mapping"] = torch.arange(num_slots - 6, num_slots)
    torch_tkv.rope_reshape_and_cache(**kwargs, wrap=True)
    torch_tkv.rope_reshape_and_cache(**expected)
    assert_same_caches(kwargs, expected)


# fmt: off
BAD = [
    ("query", lambda t: t[0], ValueError, "float32 or float16 or bfloat16 [T, Hq, D], got float32 (6, 16)"),
    ("key", lambda t: t.half(), TypeError, "float32 [T, Hkv, D], got float16 (6, 3, 16)"),
    ("value", lambda t: t.half(), TypeError, "float32 [T, Hkv, Dv], got float16 (6, 3, 16)"),
    ("value", lambda t: t[:, :2], ValueError, "[T = 6, Hkv = 3, Dv] like key, got float32 (6, 2, 16)"),
    ("key_cache", lambda t: t.double(), TypeError, "float32 or float16 or bfloat16 or float8_e4m3fn or float8_e5m2 [N, P, Hkv, D], got float64 (3, 8, 3, 16)"),
    ("key_cache", lambda t: t[..., :8], ValueError, "[N, P, Hkv = 3, D = 16] like key, got float32 (3, 8, 3, 8)"),
    ("value_cache", lambda t: t[..., :8], ValueError, "[N, P, Hkv, Dv = 16] like value, got float32 (3, 8, 3, 8)"),
    ("value_cache", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("slot_mapping", lambda t: torch.cat((t, t)), ValueError, "no longer than the 6 tokens of key, got int64 (12,)"),
    ("slot_mapping", lambda t: t.fill_(24), IndexError, "within 24 slots, got 24 for token 0"),
    ("positions", lambda t: t.fill_(40), IndexError, "within the 40 rows of cos, got 40 for token 0"),
    ("k_scale", lambda _: torch.ones(2), ValueError, "float32 [] or [Hkv = 3], got float32 (2,)"),
    ("rotary_dim", lambda _: 7, ValueError, "even, positive and at most D = 16, got 7"),
]
# fmt: on
FUNCTIONS = [torch_tkv.rope_reshape_and_cache, torch.ops.tkv.rope_reshape_and_cache]


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input_is_named_before_anything_is_written(
    function, argument, spoil, error, says
) -> None:
    kwargs = arguments()
    kwargs[argument] = spoil(kwargs.get(argument))
    caches = kwargs["key_cache"], kwargs["value_cache"]
    before = [cache if cache.is_meta else cache.clone() for cache in caches]
    with pytest.raises(error) as caught:
        function(**kwargs)
    assert str(caught.value) == f"rope_reshape_and_cache: {argument} must be {says}"
    for cache, was in zip(caches, before, strict=True):
        assert cache.is_meta or torch.equal(cache, was)


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = arguments()
    kwargs["value"].requires_grad_()
    with pytest.raises(NotImplementedError, match="rope_reshape_and_cache: there is no backward"):
        torch_tkv.rope_reshape_and_cache(**kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_positions", [None, 40])
def test_opcheck_accepts_every_layout(layout: str, max_positions: int | None) -> None:
    kwargs = arguments(layout=layout, max_positions=max_positions)
    permuted = torch.randn(6, 6, 16).transpose(0, 1)
    for query in (kwargs["query"], kwargs["query"].contiguous(), permuted):
        args = tuple((kwargs | {"query": query}).values())
        scales = (torch.tensor(2.0), torch.rand(3) + 1)
        torch.library.opcheck(torch.ops.tkv.rope_reshape_and_cache, (*args, *scales))
