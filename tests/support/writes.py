"""Compare a cache-writing kernel with its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from paged import clone_storages, storage
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8S = (torch.float8_e4m3fn, torch.float8_e5m2)
MODEL_DTYPE = torch.bfloat16 if HAS_GPU else torch.float32


def assert_writes_as_reference(
    kernel: Any,
    reference: Callable[..., None],
    rows: Sequence[Tensor],
    caches: Sequence[Tensor],
    *rest: Tensor | None,
    **options: Any,
) -> None:
    """Assert that `kernel` leaves whole storages as `reference` does, bit for bit but NaNs."""
    # Triton sees no GPU and no interpreter where this file is imported first.
    from torch_tkv.kernels.launcher import run

    expected = clone_storages(*caches)
    args = (*rows, *caches, *rest)
    launch = kernel.prepare(*args, **options)
    # The launcher repeats a launch with new arguments by where each of its pointers came from.
    assert all(any(tensor is arg for arg in (*args, None)) for tensor in launch.tensors)
    run(launch)
    reference(*rows, *expected, *rest, **options)
    for cache, written in zip(caches, expected, strict=True):
        written = storage(written).float()
        torch.testing.assert_close(storage(cache).float(), written, rtol=0, atol=0, equal_nan=True)


def skip_inexact_casts(dtype: torch.dtype) -> None:
    """Skip where what runs the kernels does not round to `dtype` as hardware does."""
    if not HAS_GPU and dtype in (torch.bfloat16, *FP8S):
        pytest.skip("Triton's interpreter truncates to bfloat16 and converts to float8 wrongly")


def shuffled_slots(tokens: int, num_slots: int, device: str, *, wrap: bool = False) -> Tensor:
    """Return distinct random slots [T]; every fifth is -1, or with `wrap` counted back."""
    slots = torch.randperm(num_slots, device=device)[:tokens]
    slots[1::5] = slots[1::5] - num_slots if wrap else -1
    return slots
