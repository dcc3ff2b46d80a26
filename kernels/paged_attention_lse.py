"""Attention with the logarithm of the softmax's denominator: the kernels are paged_attention's."""

from __future__ import annotations

import functools

from torch_tkv.kernels import paged_attention

prepare = functools.partial(paged_attention.prepare, with_lse=True)
