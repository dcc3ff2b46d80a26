from __future__ import annotations

import pytest
import torch
from paged import MODIFIERS, assert_as_accurate, make_batch, make_modifiers, options_on

from torch_tkv import reference
from torch_tkv.kernels import merge_attention_states
from torch_tkv.kernels import paged_attention_lse as kernel
from torch_tkv.kernels.launcher import run

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Lengths and query lengths of batches with few new tokens, with few and many, with many only.
FORMS = [
    ([5, 33, 20, 0, 70, 9, 2], [1, 4, 0, 1, 12, 1, 3]),
    ([5, 33, 0, 70, 2], [1, 4, 1, 75, 3]),
    ([50], [40]),
]


@pytest.mark.parametrize(("names", "window"), [((), None), (("sinks",), 13), (MODIFIERS, None)])
@pytest.mark.parametrize("form", FORMS)
def test_out_and_lse_are_as_accurate_as_the_reference(
    device: str, form, names: tuple[str, ...], window: int | None
) -> None:
    batch = make_batch(*form, block_size=8, padding=3, window=window)
    options = make_modifiers(batch, names) | {"window": window}
    batch, options = batch.to(device), options_on(device, options)
    out, lse = run(kernel.prepare(*batch, 0.2, **options))
    expected = reference.paged_attention_lse(*batch, 0.2, **options)
    exact = reference.paged_attention_lse(*batch.double(), 0.2, **options)
    assert_as_accurate(out, expected[0], exact[0])
    assert lse.dtype == torch.float32
    seen = exact[1] > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert_as_accurate(lse[seen], expected[1][seen], exact[1][seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_halves_of_a_context_merge_to_the_whole(device: str, dtype: torch.dtype) -> None:
    batch = make_batch([90, 64, 70, 33], [1, 16, 20, 1], dtype=dtype)
    expected = reference.paged_attention(*batch, 0.2)
    exact = reference.paged_attention(*batch.double(), 0.2)
    query, *caches, table, seq_lens, starts = batch.to(device)
    prefix = (query, *caches, table[:, :2], seq_lens.clamp(max=32), starts, 0.2)
    rest = (query, *caches, table[:, 2:], seq_lens - seq_lens.clamp(max=32), starts, 0.2)
    states = (
        *run(kernel.prepare(*prefix, causal=False)),
        *run(kernel.prepare(*rest)),
    )
    out, _ = run(merge_attention_states.prepare(*states))
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    bound = 2 * (expected - exact).abs().max() + 2 * rounding  # the halves are rounded too
    assert (out.double().cpu() - exact).abs().max() <= bound
