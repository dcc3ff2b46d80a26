from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, make_caches, storage
from torch import Tensor

import torch_tkv
from torch_tkv.ops import library


def write_by_loop(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: list[int]
) -> None:
    """Write token by token: the meaning of the operator, spelled out."""
    block_size = key_cache.shape[1]
    for token, slot in enumerate(slots):
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = key[token]
            value_cache[slot // block_size, slot % block_size] = value[token]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_tokens_land_in_their_slots_and_nothing_else_changes(
    layout: str, index_dtype: torch.dtype
) -> None:
    caches = make_caches(layout, 5, 4, 3, 8)
    expected = clone_storages(*caches)
    key, value = torch.randn(2, 6, 3, 8)
    slots = [7, -1, 0, 19, -100, 4]
    write_by_loop(key, value, *expected, slots)
    torch_tkv.reshape_and_cache(key, value, *caches, torch.tensor(slots, dtype=index_dtype))
    for cache, written in zip(caches, expected, strict=True):
        assert torch.equal(storage(cache), storage(written))


def test_wrap_counts_negative_slots_from_the_end_as_eager_indexing_does() -> None:
    key_cache, value_cache = make_caches("NHD", 5, 4, 3, 8)
    key, value = torch.randn(2, 3, 3, 8)
    slots = torch.tensor([-1, -20, 5])
    expected_key, expected_value = key_cache.clone(), value_cache.clone()
    expected_key.view(-1, 3, 8)[slots] = key
    expected_value.view(-1, 3, 8)[slots] = value
    torch_tkv.reshape_and_cache(key, value, key_cache, value_cache, slots, wrap=True)
    assert torch.equal(key_cache, expected_key)
    assert torch.equal(value_cache, expected_value)


def test_a_short_slot_mapping_leaves_the_last_tokens_unwritten() -> None:
    key_cache, value_cache = make_caches("NHD", 5, 4, 3, 8, 6)
    before = key_cache.clone()
    key, value = torch.randn(4, 3, 8), torch.randn(4, 3, 6)
    torch_tkv.reshape_and_cache(key, value, key_cache, value_cache, torch.tensor([2, 9]))
    assert torch.equal(key_cache.flatten(0, 1)[[2, 9]], key[:2])
    assert torch.equal(value_cache.flatten(0, 1)[[2, 9]], value[:2])
    assert (key_cache != before).flatten(0, 1).any(-1).any(-1).sum() == 2


def test_keys_are_rounded_once_to_the_dtype_of_their_cache() -> None:
    key_cache, _ = make_caches("NHD", 2, 4, 3, 8, dtype=torch.bfloat16)
    _, value_cache = make_caches("NHD", 2, 4, 3, 8, dtype=torch.float16)
    key, value = torch.randn(2, 2, 3, 8)
    torch_tkv.reshape_and_cache(key, value, key_cache, value_cache, torch.tensor([3, 4]))
    assert torch.equal(key_cache.flatten(0, 1)[3:5], key.bfloat16())
    assert torch.equal(value_cache.flatten(0, 1)[3:5], value.half())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_caches_saturate_keep_nan_and_divide_by_the_scales(dtype: torch.dtype) -> None:
    key_cache, value_cache = make_caches("HND", 2, 4, 3, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 3, 8)
    key[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e9])
    scale = torch.tensor([0.5, 2.0, 1.0])
    slots = torch.tensor([3, 4])
    torch_tkv.reshape_and_cache(
        key, value, key_cache, value_cache, slots, scale, torch.tensor(0.25)
    )
    limit = torch.finfo(dtype).max
    written = key_cache.flatten(0, 1)[3:5].float()
    assert written[0, 0, 0].isnan()
    assert written[0, 0, 1:4].tolist() == [limit, -limit, limit]
    assert torch.equal(written[:, 1], (key[:, 1] / 2).to(dtype).float())
    assert torch.equal(value_cache.flatten(0, 1)[3:5].float(), (value * 4).to(dtype).float())


def arguments() -> dict[str, Tensor]:
    key_cache, value_cache = make_caches("NHD", 5, 4, 3, 8)
    key, value = torch.randn(2, 6, 3, 8)
    slots = torch.tensor([0, 1, 2, 3, 4, 5])
    names = ("key", "value", "key_cache", "value_cache", "slot_mapping")
    return dict(zip(names, (key, value, key_cache, value_cache, slots), strict=True))


# fmt: off
BAD = [
    ("key", lambda t: t.double(), TypeError, "float32 or float16 or bfloat16 [T, Hkv, D], got float64 (6, 3, 8)"),
    ("key", lambda t: t[0], ValueError, "float32 or float16 or bfloat16 [T, Hkv, D], got float32 (3, 8)"),
    ("key", lambda t: t.repeat_interleave(2, -1)[..., ::2], ValueError, "of last stride 1, got strides (48, 16, 2)"),
    ("value", lambda t: t.half(), TypeError, "float32 [T, Hkv, Dv], got float16 (6, 3, 8)"),
    ("value", lambda t: t[:5], ValueError, "[T = 6, Hkv = 3, Dv] like key, got float32 (5, 3, 8)"),
    ("key_cache", lambda t: t[:, :, :2], ValueError, "[N = 5, P = 4, Hkv = 2, Dv] like key_cache, got float32 (5, 4, 3, 8)"),
    ("key_cache", lambda t: t[..., :4], ValueError, "[N, P, Hkv = 3, D = 8] like key, got float32 (5, 4, 3, 4)"),
    ("value_cache", lambda t: t[..., :4], ValueError, "[N, P, Hkv, Dv = 8] like value, got float32 (5, 4, 3, 4)"),
    ("value_cache", lambda t: t.to("meta"), ValueError, "on cpu like the first, got one on meta"),
    ("slot_mapping", lambda t: t.float(), TypeError, "int32 or int64 [T], got float32 (6,)"),
    ("slot_mapping", lambda t: t[None], ValueError, "int32 or int64 [T], got int64 (1, 6)"),
    ("slot_mapping", lambda t: torch.cat((t, t)), ValueError, "no longer than the 6 tokens of key, got int64 (12,)"),
    ("slot_mapping", lambda t: t + 15, IndexError, "within 20 slots, got 20 for token 5"),
]
# fmt: on


@pytest.mark.parametrize(("argument", "spoil", "error", "says"), BAD)
@pytest.mark.parametrize("function", [torch_tkv.reshape_and_cache, torch.ops.tkv.reshape_and_cache])
def test_bad_input_is_named_before_anything_is_written(
    function, argument, spoil, error, says
) -> None:
    kwargs = arguments()
    caches = kwargs["key_cache"], kwargs["value_cache"]
    before = [cache.clone() for cache in caches]
    kwargs[argument] = spoil(kwargs[argument])
    with pytest.raises(error) as caught:
        function(**kwargs)
    if argument == "key_cache" and "like key_cache" in says:
        argument = "value_cache"  # the second of two that disagree is the one named
    assert str(caught.value) == f"reshape_and_cache: {argument} must be {says}"
    assert all(torch.equal(cache, was) for cache, was in zip(caches, before, strict=True))


def test_autograd_is_refused_with_the_way_out() -> None:
    kwargs = arguments()
    kwargs["key"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"reshape_and_cache: there is no backward.*no_gra"
    ):
        torch_tkv.reshape_and_cache(**kwargs)
    with torch.no_grad():
        torch_tkv.reshape_and_cache(**kwargs)


@pytest.mark.gpu
def test_autograd_is_refused_on_a_gpu_after_calls_that_it_does_not_record() -> None:
    kwargs = {name: tensor.cuda() for name, tensor in arguments().items()}
    kwargs["key"].requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):
                torch_tkv.reshape_and_cache(**kwargs)
        with pytest.raises(NotImplementedError, match="there is no backward"):
            torch_tkv.reshape_and_cache(**kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_accepts_contiguous_sliced_and_permuted_inputs(layout: str) -> None:
    key_cache, value_cache = make_caches(layout, 5, 4, 3, 8)
    slots = torch.tensor([7, -1, 0])
    qkv = torch.randn(3, 2, 3, 16)
    permuted = torch.randn(3, 3, 8).transpose(0, 1)
    for key, value in [
        torch.randn(2, 3, 3, 8),
        (qkv[:, 0, :, :8], qkv[:, 1, :, 8:]),
        [permuted] * 2,
    ]:
        torch.library.opcheck(
            torch.ops.tkv.reshape_and_cache, (key, value, key_cache, value_cache, slots)
        )


def test_a_compiled_call_on_two_views_of_one_storage_is_warned_of_once(
    recwarn: pytest.WarningsRecorder,
) -> None:
    library._warn_of_shared_storage.cache_clear()
    kv, x = torch.zeros(2, 5, 4, 3, 8), torch.randn(2, 3, 8)

    def write(kv: Tensor, x: Tensor, slots: Tensor) -> None:
        torch_tkv.reshape_and_cache(x, x, kv[0], kv[1], slots)

    compiled = torch.compile(write, backend="aot_eager")
    for tokens in (1, 2):
        compiled(kv, x[:tokens], torch.arange(tokens))
    said = [str(w.message) for w in recwarn if "share a storage" in str(w.message)]
    assert len(said) == 1
    assert "tkv::reshape_and_cache_packed" in said[0]


def test_a_compiled_call_on_two_storages_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    library._warn_of_shared_storage.cache_clear()
    caches, x = make_caches("NHD", 5, 4, 3, 8), torch.randn(2, 3, 8)
    torch.compile(torch_tkv.reshape_and_cache, backend="aot_eager")(x, x, *caches, torch.arange(2))
    assert not [w for w in recwarn if "share a storage" in str(w.message)]
