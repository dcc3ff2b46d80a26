from __future__ import annotations

import pytest
import torch
from paged import LAYOUTS, clone_storages, storage
from rope import make_rotation, make_write

from torch_tkv import reference
from torch_tkv.kernels import rope_reshape_and_cache as kernel
from torch_tkv.kernels.launcher import run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def arguments(tokens, heads=(6, 3), head_size=16, value_size=None, *, device, **options):
    """Return the arguments of the operator; `options` are those of make_rotation and make_write."""
    write = {n: options.pop(n) for n in ("layout", "cache_dtype", "block_size") if n in options}
    dtype = options.get("dtype", torch.float32)
    return make_rotation(tokens, heads, head_size, device=device, **options) | make_write(
        tokens, heads[1], head_size, value_size, dtype=dtype, device=device, **write
    )


def assert_kernel_equals_reference(kwargs, **options) -> None:
    """Run both and compare outputs and whole storages, bit by bit but for the payload of a NaN."""
    caches = clone_storages(kwargs["key_cache"], kwargs["value_cache"])
    expected = kwargs | dict(zip(("key_cache", "value_cache"), caches, strict=True))
    out = run(kernel.prepare(**kwargs, **options))
    exact = reference.rope_reshape_and_cache(**expected, **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=0, equal_nan=True)
    for name in ("key_cache", "value_cache"):
        got, want = storage(kwargs[name]).float(), storage(expected[name]).float()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "rotary_dim"),
    [((1, 1), 16, 16, None), ((26, 13), 46, 46, 46), ((7, 3), 80, 24, 32), ((32, 8), 128, 128, 64)],
)
def test_the_kernel_writes_what_the_reference_writes(
    device: str, layout, tokens, heads, head_size, value_size, rotary_dim
) -> None:
    if layout.startswith("[") and head_size != value_size:
        pytest.skip("one tensor of K and V has one head size")
    kwargs = arguments(
        tokens, heads, head_size, value_size, layout=layout, rotary_dim=rotary_dim, device=device
    )
    assert_kernel_equals_reference(kwargs, rotary_dim=rotary_dim)
    assert_kernel_equals_reference(kwargs, rotary_dim=rotary_dim, interleaved=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_size", "rotary_dim"),
    [((32, 8), 128, None), ((29, 3), 80, 64), ((15, 8), 256, None)],
)
def test_groups_of_query_heads_are_rotated_as_the_reference_rotates(
    device: str, monkeypatch: pytest.MonkeyPatch, heads, head_size, rotary_dim, interleaved
) -> None:
    monkeypatch.setattr(kernel, "_LADDER", kernel._LADDER[-1:])
    kwargs = arguments(7, heads, head_size, rotary_dim=rotary_dim, device=device)
    launch = kernel.prepare(**kwargs, rotary_dim=rotary_dim)
    args = (*launch.tensors, *launch.scalars, *launch.constexprs)
    assert args[launch.kernel.arg_names.index("GROUPS")] == 2
    assert_kernel_equals_reference(kwargs, interleaved=interleaved, rotary_dim=rotary_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_size", "rotary_dim", "block_size"),
    [
        ((1, 1), 16, None, 1),
        ((14, 2), 46, 46, 8),
        ((71, 1), 64, 64, 16),
        ((26, 13), 80, 32, 32),
        ((32, 32), 96, 96, 64),
        ((32, 8), 112, 56, 256),
        ((32, 8), 128, None, 16),
        ((5, 3), 192, 64, 8),
        ((16, 1), 256, 256, 16),
    ],
)
def test_the_kernel_is_bit_equal_to_the_reference_on_a_gpu(
    dtype, interleaved, heads, head_size, rotary_dim, block_size
) -> None:
    options = {"dtype": dtype, "cache_dtype": dtype, "angle_dtype": dtype, "device": "cuda"}
    for tokens in (1, 33, 1000, 5000):
        kwargs = arguments(
            tokens, heads, head_size, rotary_dim=rotary_dim, block_size=block_size, **options
        )
        assert_kernel_equals_reference(kwargs, rotary_dim=rotary_dim, interleaved=interleaved)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *FP8])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_pair_of_dtypes_is_rounded_as_the_reference_rounds(
    dtype: torch.dtype, cache_dtype: torch.dtype, per_head: bool
) -> None:
    # On a GPU only: Triton's interpreter truncates to bfloat16 and rounds float8 wrongly.
    kwargs = arguments(200, (8, 4), 64, dtype=dtype, cache_dtype=cache_dtype, device="cuda")
    kwargs["value"] = kwargs["value"] * 500  # beyond float8_e4m3fn
    assert_kernel_equals_reference(kwargs)
    scales = torch.rand(2, 4, device="cuda") + 0.01
    k_scale, v_scale = scales if per_head else scales[:, 0]
    assert_kernel_equals_reference(kwargs | {"k_scale": k_scale, "v_scale": v_scale})


@pytest.mark.parametrize("per_head", [False, True])
def test_keys_are_rounded_before_they_are_divided(device: str, per_head: bool) -> None:
    kwargs = arguments(9, dtype=torch.float16, device=device)
    scales = torch.rand(2, 3, device=device) + 0.01
    k_scale, v_scale = scales if per_head else scales[:, 0]
    assert_kernel_equals_reference(kwargs | {"k_scale": k_scale, "v_scale": v_scale})


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_negative_slots_are_skipped_or_wrapped(
    device: str, wrap: bool, index_dtype: torch.dtype
) -> None:
    kwargs = arguments(5, layout="HND", device=device)
    slots = torch.tensor([-1, 3, -24, 7, -5], dtype=index_dtype, device=device)
    assert_kernel_equals_reference(kwargs | {"slot_mapping": slots}, wrap=wrap)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_short_slot_mapping_rotates_every_query(device: str, wrap: bool) -> None:
    kwargs = arguments(9, device=device)
    kwargs["slot_mapping"] = torch.stack((torch.arange(7), torch.arange(7)), 1).to(device)[:, 0]
    assert_kernel_equals_reference(kwargs, wrap=wrap)
    assert_kernel_equals_reference(kwargs | {"slot_mapping": kwargs["slot_mapping"][:0]}, wrap=wrap)


@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "rotary_dim"),
    [((32, 8), 128, 128, 128), ((7, 1), 46, 24, 46), ((71, 1), 64, 64, 32), ((2, 5), 96, 0, 96)],
)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 1000, 70000])
def test_the_plan_covers_every_head_and_element(
    tokens: int, heads, head_size, value_size, rotary_dim
) -> None:
    plan = kernel.plan(tokens, *heads, head_size, value_size, rotary_dim)
    assert plan.grid == (tokens * plan.PIECES,)
    assert heads[0] <= plan.PIECES * plan.GROUPS * plan.BLOCK_HQ
    assert heads[1] <= plan.PIECES * plan.BLOCK_HKV
    assert rotary_dim <= 2 * plan.BLOCK_R
    assert head_size - rotary_dim <= plan.BLOCK_REST
    assert value_size <= plan.BLOCK_DV
    for block in (*plan[2:8], plan.num_warps):
        assert block & (block - 1) == 0


def test_few_tokens_are_spread_over_more_programs() -> None:
    sizes = (32, 8, 128, 128, 128)
    assert kernel.plan(1, *sizes) == kernel.Plan((4,), 4, 1, 8, 2, 64, 0, 128, "", 4)
    assert kernel.plan(64, *sizes) == kernel.Plan((256,), 4, 1, 8, 2, 64, 0, 128, "", 4)
    assert kernel.plan(1000, *sizes) == kernel.Plan((2000,), 2, 1, 16, 4, 64, 0, 128, "", 2)
    assert kernel.plan(1, 2, 1, 16, 16, 16).num_warps == 1


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ((32, 8, 128, 128, 128), (2, 8, 4)),
        ((32, 8, 64, 64, 64), (2, 16, 8)),
        ((16, 8, 256, 256, 256), (2, 4, 4)),
        ((28, 4, 128, 128, 128), (2, 8, 2)),
        ((32, 32, 128, 128, 128), (1, 8, 8)),
        ((8, 1, 128, 128, 128), (1, 8, 1)),
        ((32, 8, 128, 128, 64), (1, 16, 4)),
        ((1, 1, 64, 64, 64), (1, 1, 1)),
    ],
)
def test_many_tokens_share_angles_among_groups_of_query_heads_of_wide_loads(
    sizes: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    plan = kernel.plan(70000, *sizes)
    assert groups == (plan.GROUPS, plan.BLOCK_HQ, plan.BLOCK_HKV)
    assert (plan.num_warps, plan.EVICTION) == (2, "evict_last")


@pytest.mark.parametrize("tokens", [1, 64, 1000, 70000])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_that_are_no_power_of_two_do_not_make_larger_programs(tokens, normed) -> None:
    even, uneven = (
        kernel.plan(tokens, heads, 8, 128, 128, 128, normed=normed) for heads in (32, 40)
    )
    assert uneven.GROUPS * uneven.BLOCK_HQ <= even.GROUPS * even.BLOCK_HQ
    assert uneven.PIECES <= 2 * even.PIECES


def test_after_a_norm_many_tokens_take_more_programs_of_fewer_registers() -> None:
    sizes = (32, 8, 128, 128, 128)
    few, more = (kernel.plan(tokens, *sizes, normed=True) for tokens in (8, 9))
    assert few == kernel.Plan((64,), 8, 1, 4, 1, 64, 0, 128, "", 4)
    assert more == kernel.Plan((36,), 4, 1, 8, 2, 64, 0, 128, "", 2)
    normed = kernel.plan(1000, *sizes, normed=True)
    assert normed == kernel.Plan((4000,), 4, 1, 8, 2, 64, 0, 128, "evict_last", 2, 64)
