"""backend="tkv" is Inductor with the passes, modes and options included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_tkv.backend import inductor_options
from torch_tkv.passes.report import report

N, P, H, D = 7, 4, 2, 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield


def step(kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kc[s // P, s % P] = k
    vc[s // P, s % P] = v
    return kc[s // P, s % P]


def make_inputs(tokens: int = 3) -> tuple[Tensor, ...]:
    k, v = torch.randn(2, tokens, H, D)
    return (*torch.zeros(2, N, P, H, D), k, v, torch.arange(tokens))


def check(compiled: Any, tokens: int = 3) -> None:
    inputs = make_inputs(tokens)
    assert torch.equal(compiled(*inputs), inputs[2])
    assert torch.equal(inputs[0].flatten(0, 1)[:tokens], inputs[2])
    assert torch.equal(inputs[1].flatten(0, 1)[:tokens], inputs[3])
    assert inputs[0].count_nonzero() == inputs[2].count_nonzero()


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_every_mode_of_inductor_works(mode: str | None) -> None:
    check(torch.compile(step, backend="tkv", mode=mode, fullgraph=True))
    assert report().as_dict()["fused"] == 1


def test_options_reach_inductor() -> None:
    seen = []

    def see(graph: torch.fx.Graph) -> None:
        seen.append(config.max_autotune)

    options = {"max_autotune": True, "post_grad_custom_pre_pass": see}
    check(torch.compile(step, backend="tkv", options=options))
    assert seen == [True]


def test_unknown_options_and_modes_are_refused_in_the_words_of_inductor() -> None:
    with pytest.raises(Exception, match="Unexpected optimization option no_such_option"):
        torch.compile(step, backend="tkv", options={"no_such_option": 1})(*make_inputs())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Unrecognized mode=fastest"):
        torch.compile(step, backend="tkv", mode="fastest")(*make_inputs())


def test_the_inductor_backend_takes_the_options() -> None:
    options = inductor_options({"max_autotune": False}, mode="max-autotune-no-cudagraphs")
    assert options["coordinate_descent_tuning"] is True
    assert options["max_autotune"] is False
    check(torch.compile(step, options=options))
    assert report().as_dict()["fused"] == 1


def test_it_compiles_again_after_a_reset_and_for_other_sizes() -> None:
    compiled = torch.compile(step, backend="tkv")
    for tokens in (3, 5, 6):
        check(compiled, tokens)
    torch._dynamo.reset()
    counters.clear()
    check(compiled)
    assert report().as_dict()["fused"] == 1


class Counted(CustomGraphPass):
    """A pass of the user: counts the writes that are still functional."""

    def __init__(self, key: str | None = "counted") -> None:
        self.key, self.writes = key, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.writes += len(graph.find_nodes(op="call_function", target=INDEX_PUT))

    def uuid(self) -> str | None:
        return self.key


INDEX_PUT = torch.ops.aten.index_put.default


def test_a_configured_pass_runs_first() -> None:
    user = Counted()
    with config.patch(post_grad_custom_post_pass=user):
        check(torch.compile(step, backend="tkv"))
    torch._dynamo.reset()
    check(torch.compile(step, backend="tkv", options={"post_grad_custom_post_pass": user}))
    assert user.writes == 4


def test_the_key_holds_that_of_the_configured_pass() -> None:
    def key(user: Any) -> Any:
        return inductor_options({"post_grad_custom_post_pass": user})[
            "post_grad_custom_post_pass"
        ].uuid()

    assert key(Counted("a")) == key(Counted("a"))
    assert key(Counted("a")) != key(Counted("b"))
    assert key(Counted(None)) is None
    assert key(lambda graph: None) is None
