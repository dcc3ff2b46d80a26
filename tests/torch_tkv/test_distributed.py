"""Two processes that share the heads compute together what one computes alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from torch_tkv import ops


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run_checks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ranks.CHECKS)
def test_ranks_that_share_the_heads_agree_with_one_that_has_all(
    check: str, failures: dict[str, str]
) -> None:
    assert check not in failures, failures[check]


def test_every_operator_is_checked() -> None:
    assert sorted(ranks.operators()) == sorted(ops.__all__)


def test_importing_the_package_does_not_load_dtensor(tmp_path: Path) -> None:
    code = "import sys, torch_tkv; print('torch.distributed.tensor' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.strip() == "False"
