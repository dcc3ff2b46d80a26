"""Indices that several operators take are computed once."""

from __future__ import annotations

import torch
from compiled import Recorder
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from torch_tkv import paged_attention

LAYERS, B, N, P, H, D = 4, 3, 6, 4, 2, 16


Layer = tuple[Tensor, Tensor, Tensor]


def make_layers() -> list[Layer]:
    return [
        (torch.randn(B, H, D), *(torch.randn(N, P, H, D) for _ in range(2))) for _ in range(LAYERS)
    ]


def attend(layers: list[Layer], length: Tensor, *, grow: bool) -> list[Tensor]:
    """Attend in every layer, with indices that each takes out of one matrix, computed anew."""
    outs = []
    for layer in layers:
        row = torch.arange(B + 1, dtype=torch.int32)
        blocks = row[:, None] * 2 + torch.arange(2, dtype=torch.int32)
        indices = torch.cat((row[:, None], (length + row % 2)[:, None], blocks % N), 1)
        outs.append(paged_attention(*layer, indices[:-1, 2:], indices[:-1, 1], indices[:, 0]))
        if grow:
            length += 1
    return outs


def compile_and_check(*, grow: bool) -> tuple[str, str]:
    """Compile, require the results of eager code, and return the code and the graph."""
    layers, length = make_layers(), torch.tensor(3, dtype=torch.int32)
    expected = attend(layers, length.clone(), grow=grow)
    recorder = Recorder()
    # On a GPU, Inductor computes concatenations where they are used.
    with config.patch(post_grad_custom_post_pass=recorder, force_pointwise_cat=True):
        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        got, codes = run_and_get_code(compiled, layers, length, grow=grow)
    torch.testing.assert_close(got, expected)
    return codes[0], recorder.text


def test_equal_indices_are_computed_once() -> None:
    code, graph = compile_and_check(grow=False)
    assert code.count("torch.ops.tkv.paged_attention.default(") == LAYERS
    assert graph.count("= cat(") == 1
    body = code[code.index("def call(") :]
    assert body.count("cpp_fused_") == 1


def test_indices_of_other_lengths_stay_apart() -> None:
    _, graph = compile_and_check(grow=True)
    assert graph.count("= cat(") == LAYERS
