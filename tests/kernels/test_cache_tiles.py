from __future__ import annotations

import pytest
import torch
from triton.language import constexpr

from torch_tkv.kernels.cache_tiles import row_strides


@pytest.mark.parametrize(
    ("shape", "strides", "fixed", "arguments"),
    [
        ((33, 8, 128), (1024, 128, 1), [1024, 128], []),
        ((33, 8, 128), (9999, 200, 1), [9999, 200], []),  # a part of a row of all projections
        ((33, 8, 128), (128, 33 * 128, 1), [128], [33 * 128]),  # [Hkv, T, D]
        ((1, 8, 128), (128, 128, 1), [0, 128], []),
        ((1, 8, 128), (10**6, 128, 1), [0, 128], []),
        ((1, 8, 128), (128, 33 * 128, 1), [0], [33 * 128]),  # the only token of 33 that is taken
        ((33, 1, 128), (128, 128, 1), [128, 0], []),
        ((33, 1, 128), (128, 33 * 128, 1), [128], [0]),
        ((33, 64), (128, 2), [128, 2], []),  # angles
        ((64, 33), (1, 64), [1], [64]),
    ],
)
def test_strides_are_constants_unless_they_grow_with_the_number_of_tokens(
    shape: tuple[int, ...], strides: tuple[int, ...], fixed: list[int], arguments: list[int]
) -> None:
    found = row_strides(torch.empty(0, device="meta").as_strided(shape, strides))
    assert [x.value for x in found if isinstance(x, constexpr)] == fixed
    assert [x for x in found if not isinstance(x, constexpr)] == arguments
