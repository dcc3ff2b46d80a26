"""The report tells every layer and survives the caches of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import post_grad_only
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config

from torch_tkv import explain
from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report

P, H, D = 4, 2, 16


class Attention(torch.nn.Module):
    def __init__(self, *, add: bool) -> None:
        super().__init__()
        self.add = add
        self.register_buffer("key_cache", torch.zeros(7, P, H, D))
        self.register_buffer("value_cache", torch.zeros(7, P, H, D))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        index = (slots // P, slots % P)
        self.key_cache.index_put_(index, x, accumulate=self.add)
        self.value_cache.index_put_(index, x, accumulate=self.add)
        return x + self.key_cache[index]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention(add=add) for add in (False, True, False))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, slots)
        return x


def compile_model() -> None:
    inputs = (torch.randn(3, H, D), torch.tensor([1, 9, 22]))
    with config.patch(post_grad_custom_post_pass=Pipeline()):
        torch.compile(Model(), backend=post_grad_only)(*inputs)


def test_the_report_tells_module_source_and_reason_of_every_layer() -> None:
    compile_model()
    line = Attention.forward.__code__.co_firstlineno + 2
    text = str(report()).replace(f"{line}", "K").replace(f"{line + 1}", "V")
    assert_expected_inline(
        text,
        """\
graph 0, compiled 1x
  padding="wrap" (slot -1 is the last slot, as in eager PyTorch)
  layers.0  test_report.py:K, test_report.py:V  fused: cache write
  layers.1  test_report.py:K, test_report.py:V  not fused: accumulate=True adds to the cache
  layers.2  test_report.py:K, test_report.py:V  fused: cache write
2 of 3 layers: cache write fused""",
    )


def test_the_same_graph_compiled_twice_is_listed_once() -> None:
    for _ in range(2):
        torch._dynamo.reset()
        compile_model()
    found = report().as_dict()
    assert (found["fused"], found["layers"]) == (2, 3)
    assert [graph["count"] for graph in found["graphs"]] == [2]


PROGRAM = """
import torch, torch_tkv
from torch._dynamo.utils import counters
from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report

runs, call = 0, Pipeline.__call__
def counted(self, graph):
    global runs
    runs += 1
    call(self, graph)
Pipeline.__call__ = counted

def step(kc, vc, k, v, s):
    kc[s // 4, s % 4] = k
    vc[s // 4, s % 4] = v  # no other node: nothing for a C++ compiler to do

caches = [torch.zeros(7, 4, 2, 16) for _ in range(2)]
k, v = torch.ones(2, 3, 2, 16)
with torch.no_grad():
    torch.compile(step, backend="tkv")(*caches, k, v, torch.tensor([1, 9, 22]))
assert caches[1].sum() == 3 * 2 * 16
print(runs, report().as_dict())
"""


@pytest.mark.parametrize("autograd_cache", ["0", "1"], ids=["fx graph", "AOTAutograd"])
def test_the_report_is_the_same_where_a_cached_graph_is_loaded(
    autograd_cache: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {
        "PATH": "/usr/bin:/bin",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_AUTOGRAD_CACHE": autograd_cache,
    }
    first, second = (
        subprocess.run(
            [sys.executable, "-W", "ignore", "program.py"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    )
    assert first.startswith("1 {")
    assert "'fused': 1" in first
    assert second == first.replace("1", "0", 1)


def step(kc: Tensor, vc: Tensor, x: Tensor, slots: Tensor) -> None:
    kc[slots // P, slots % P] = x
    vc[slots // P, slots % P] = x


def make_inputs() -> tuple[Tensor, ...]:
    return *torch.zeros(2, 7, P, H, D), torch.ones(3, H, D), torch.tensor([1, 9, 22])


def test_explain_reports_on_what_it_compiles_and_on_nothing_else() -> None:
    compile_model()
    compiled = torch.compile(step, backend="tkv")
    compiled(*make_inputs())
    for function in (step, compiled):
        inputs = make_inputs()
        found = explain(function, *inputs)
        assert (found.as_dict()["layers"], found.as_dict()["fused"]) == (1, 1)
        assert inputs[1].count_nonzero() == 3 * H * D
    assert str(explain(torch.nn.Identity(), inputs[0])) == "no compiled graph writes to a cache"


def test_each_layer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "torch_tkv.passes"):
        compile_model()
    ours = [record for record in caplog.records if record.name == "torch_tkv.passes"]
    *outcomes, graph = [record.getMessage() for record in ours]
    assert [line.split()[0] for line in outcomes] == ["layers.0", "layers.1", "layers.2"]
    assert outcomes[1].endswith("not fused: accumulate=True adds to the cache")
    assert "reshape_and_cache" in graph
