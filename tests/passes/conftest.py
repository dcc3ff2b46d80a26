"""Every test starts with an empty compiler, and compiles for inference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield
