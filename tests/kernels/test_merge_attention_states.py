from __future__ import annotations

import pytest
import torch
from paged import HAS_BF16_DOT, assert_as_accurate
from torch import Tensor

from torch_tkv import reference
from torch_tkv.kernels import merge_attention_states as kernel
from torch_tkv.kernels.launcher import run

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Triton's interpreter truncates to bfloat16.
FLOATS = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_BF16_DOT else ()))


def make_state(
    tokens: int, heads: int, value_size: int, *, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Return a state in strides of its own; a third of its rows saw no key and holds NaN."""
    out = torch.randn(heads, tokens, value_size + 8).to(dtype)[..., 8:].transpose(0, 1)
    lse = 5 * torch.randn(heads, tokens).T
    blind = torch.rand(tokens, heads) < 1 / 3
    out[blind], lse[blind] = torch.nan, -torch.inf
    return out.to(device), lse.to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "heads", "value_size"), [(0, 4, 16), (1, 1, 1), (33, 71, 46), (127, 8, 128)]
)
def test_the_kernel_merges_as_the_reference_merges(
    device: str, tokens: int, heads: int, value_size: int, dtype: torch.dtype
) -> None:
    sizes = tokens, heads, value_size
    out_a, lse_a = make_state(*sizes, dtype=dtype, device=device)
    out_b, lse_b = make_state(*sizes, dtype=dtype, device=device)
    out, lse = run(kernel.prepare(out_a, lse_a, out_b, lse_b))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.shape, lse.shape) == (sizes, sizes[:2])
    expected = reference.merge_attention_states(out_a, lse_a, out_b, lse_b)
    exact = reference.merge_attention_states(
        *(tensor.double() for tensor in (out_a, lse_a, out_b, lse_b))
    )
    if tokens > 0:
        assert_as_accurate(out, expected[0], exact[0])
    torch.testing.assert_close(lse, expected[1])
    for side, other, rows in ((lse_a, lse_b, out_b), (lse_b, lse_a, out_a)):
        alone = (side == -torch.inf) & (other > -torch.inf)
        assert torch.equal(out[alone], rows[alone])
        assert torch.equal(lse[alone], other[alone])
    nothing = lse == -torch.inf
    assert torch.equal(nothing, (lse_a == -torch.inf) & (lse_b == -torch.inf))
    assert (out[nothing] == 0).all()


def test_far_apart_and_large_denominators_do_not_overflow(device: str) -> None:
    out_a, out_b = torch.randn(2, 3, 2, 8, device=device)
    lse = torch.full((3, 2), 3e38, device=device)
    out, _ = run(kernel.prepare(out_a, lse, out_b, -lse))
    assert torch.equal(out, out_a)
    out, _ = run(kernel.prepare(out_a, lse, out_b, lse))
    torch.testing.assert_close(out, (out_a + out_b) / 2)


def test_a_denominator_of_nan_is_not_hidden(device: str) -> None:
    rows, lse = torch.randn(2, 1, 8, device=device), torch.zeros(2, 1, device=device)
    nan = torch.full_like(lse, torch.nan)
    for out, merged in (
        run(kernel.prepare(rows, lse, rows, nan)),
        run(kernel.prepare(rows, nan, rows, lse)),
    ):
        assert out.isnan().all()
        assert merged.isnan().all()


def test_the_plan_covers_every_row_with_tiles_of_powers_of_two() -> None:
    plan = kernel.plan(1000 * 13, 46)
    assert plan.BLOCK_D == 64
    assert plan.grid[0] * plan.BLOCK_R >= 1000 * 13 > (plan.grid[0] - 1) * plan.BLOCK_R
    assert kernel.plan(0, 128).grid == (0,)
