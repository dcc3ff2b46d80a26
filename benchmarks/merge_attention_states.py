"""tkv::merge_attention_states against Inductor's code, plain copies, FlashInfer and vLLM.

`python benchmarks/merge_attention_states.py --csv merge.csv --plot merge.png`
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import DEVICE, HQ, Call, Case, D, optional
from inputs import copy_calls, randn
from torch import Tensor

import torch_tkv
from torch_tkv import reference


def count_bytes(tokens: int, dtype: torch.dtype) -> int:
    """Return what a merge reads, two states, and writes, one."""
    return 3 * tokens * HQ * (D * dtype.itemsize + 4)


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield all ways to merge two states of `tokens`."""
    lse = torch.randn(sets, 2, tokens, HQ, device=DEVICE)
    states = [(randn(tokens, HQ, D), a, randn(tokens, HQ, D), b) for a, b in lse]

    def tkv(i: int) -> Sequence[Tensor]:
        return torch_tkv.merge_attention_states(*states[i])

    @torch.compile(fullgraph=True, dynamic=False)
    def eager(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        a, b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
        return (a * out_a + b * out_b).to(out_a.dtype), lse

    def inductor(i: int) -> Sequence[Tensor]:
        return eager(*states[i])

    expected = reference.merge_attention_states(*states[0])
    calls = {"tkv": tkv, "inductor": inductor}
    calls |= flashinfer_calls(states, expected[1]) | vllm_calls(states)
    size = count_bytes(tokens, torch.bfloat16)
    # A copy writes as much as it reads: half of three outputs.
    copies = copy_calls([[randn(tokens, HQ, 3 * D // 2)] for _ in states], torch.bfloat16)
    yield Case("bf16", tokens, size, lambda: None, expected, calls, copies, tolerance=0.02)


def flashinfer_calls(states: Sequence[tuple[Tensor, ...]], lse: Tensor) -> dict[str, Call]:
    """Return FlashInfer's function, if it is installed."""
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return {}
    base_2 = [(a, x / math.log(2), b, y / math.log(2)) for a, x, b, y in states]

    def call(i: int) -> Sequence[Tensor]:
        out, _ = flashinfer.merge_state(*base_2[i])
        return out, lse  # its own is to base 2: converting it would be timed

    return {"flashinfer": call}


def vllm_calls(states: Sequence[tuple[Tensor, ...]]) -> dict[str, Call]:
    """Return vLLM's own kernel, if vLLM is installed."""
    ops = optional("vllm._custom_ops")
    if ops is None:
        return {}
    transposed = [(a, x.T.contiguous(), b, y.T.contiguous()) for a, x, b, y in states]
    out, lse = torch.empty_like(transposed[0][0]), torch.empty_like(transposed[0][1])

    def call(i: int) -> Sequence[Tensor]:
        ops.merge_attn_states(out, *transposed[i], lse)
        return out, lse.T

    return {"vllm": call}


if __name__ == "__main__":
    harness.run("merge_attention_states", make_cases, harness.parser(__doc__).parse_args())
