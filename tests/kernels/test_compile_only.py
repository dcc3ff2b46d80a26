"""The kernels compile for every supported target, with wide stores and modest shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_tkv.ops

PROGRAM = Path(__file__).parents[1] / "support" / "compile_only.py"
WIDE_STORE = {"sm": r"st\.global\.v4\.b32", "gfx": r"_store_dwordx[24]"}
# What one program may take: sm_86 and sm_89 have 99 KiB, gfx942 has 64 KiB.
SHARED_MEMORY = {"sm": 99 * 1024, "gfx": 64 * 1024}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_a_gpu(target: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), target], env=env, capture_output=True, text=True, check=True
    )
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    launched = {report["name"].split()[0] for report in reports}
    assert launched == set(torch_tkv.ops.__all__)
    family = target.rstrip("0123456789_")
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[family], report["name"]
        if re.match(r"reshape_and_cache torch.(float32|bfloat16) (?!13 x 46)", report["name"]):
            assert re.search(WIDE_STORE[family], report["assembly"]), report["name"]
