"""The kernels compile for every supported target, with wide stores and modest shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import torch_tkv.ops

PROGRAM = Path(__file__).parents[1] / "support" / "compile_only.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
WIDE_STORE = {"sm": r"st\.global\.v4\.b32", "gfx": r"_store_dwordx[24]"}
# What one program may take. Only attention asks what GPU it is on; others fit sm_86 and sm_89.
SHARED_MEMORY = {"sm": 99 * 1024, "gfx": 64 * 1024}
SHARED_MEMORY_OF_ATTENTION = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}


def compile_for(target: str) -> list[dict[str, Any]]:
    """Return what the compiler says of every launch."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), target], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[list[dict[str, Any]]]]]:
    """Compile for all targets, as many at a time as there are cores: half a minute each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(compile_for, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_a_gpu(compiled, target: str) -> None:
    reports = compiled[target].result()
    launched = {report["name"].split()[0] for report in reports}
    assert launched == set(torch_tkv.ops.__all__)
    family = target.rstrip("0123456789_")
    for report in reports:
        attends = report["name"].startswith("paged_attention")
        limit = SHARED_MEMORY_OF_ATTENTION[target] if attends else SHARED_MEMORY[family]
        assert report["shared"] <= limit, report["name"]
        if re.match(r"reshape_and_cache torch.(float32|bfloat16) (?!13 x 46)", report["name"]):
            assert re.search(WIDE_STORE[family], report["assembly"]), report["name"]
    specialised = [report["name"] for report in reports if report["kernel"] == "hopper_prefill"]
    assert bool(specialised) == (target == "sm_90")
    assert any("int8" in name for name in specialised) == (target == "sm_90")
