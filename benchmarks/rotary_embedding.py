"""tkv::rotary_embedding against Inductor's code for the eager form, copies, FlashInfer and vLLM.

`python benchmarks/rotary_embedding.py --csv rope.csv --plot rope.png`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import harness
import torch
from harness import HKV, HQ, Call, Case, D, optional
from inputs import copy_calls, make_positions, make_rows, make_tables, rotate
from torch import Tensor

import torch_tkv
from torch_tkv import reference


def count_bytes(tokens: int, dtype: torch.dtype) -> int:
    """Return what a rotation reads and writes, tables of cosines and sines apart."""
    return 2 * tokens * (HQ + HKV) * D * dtype.itemsize


def make_cases(tokens: int, sets: int, options: argparse.Namespace) -> Iterator[Case]:
    """Yield all ways to rotate the queries and keys of `tokens`."""
    qk = make_rows(tokens, sets, HQ, HKV)
    positions = make_positions(tokens, sets)
    cos, sin = make_tables()
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def tkv(i: int) -> Sequence[Tensor]:
        return torch_tkv.rotary_embedding(*qk[i], cos, sin, positions[i])

    @torch.compile(fullgraph=True, dynamic=False)
    def eager(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        return rotate(query, cos, sin), rotate(key, cos, sin)

    def inductor(i: int) -> Sequence[Tensor]:
        return eager(*qk[i], *wide, positions[i])

    calls = {"tkv": tkv, "inductor": inductor}
    table = torch.cat((cos, sin), -1)
    calls |= flashinfer_calls(qk, positions, table) | vllm_calls(qk, positions, table)
    expected = reference.rotary_embedding(*qk[0], cos, sin, positions[0])
    size = count_bytes(tokens, torch.bfloat16)
    copies = copy_calls(qk, torch.bfloat16)
    # Eager models and vLLM round where the operator does not.
    yield Case("bf16", tokens, size, lambda: None, expected, calls, copies, tolerance=0.05)


def flashinfer_calls(
    qk: Sequence[Sequence[Tensor]], positions: Sequence[Tensor], table: Tensor
) -> dict[str, Call]:
    """Return FlashInfer's function, if it is installed; its table is float32."""
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return {}
    flat = [[x.flatten(1) for x in rows] for rows in qk]
    table = table.float()

    def call(i: int) -> Sequence[Tensor]:
        rotated = flashinfer.apply_rope_with_cos_sin_cache(positions[i], *flat[i], D, table)
        return [x.unflatten(1, (-1, D)) for x in rotated]

    return {"flashinfer": call}


def vllm_calls(
    qk: Sequence[Sequence[Tensor]], positions: Sequence[Tensor], table: Tensor
) -> dict[str, Call]:
    """Return vLLM's own kernel, if vLLM is installed; it rotates in place, here copies."""
    ops = optional("vllm._custom_ops")
    if ops is None:
        return {}
    flat = [[x.flatten(1).clone() for x in rows] for rows in qk]

    def call(i: int) -> Sequence[Tensor]:
        ops.rotary_embedding(positions[i], *flat[i], D, table, True)
        return [x.unflatten(1, (-1, D)) for x in flat[i]]

    return {"vllm, in place": call}


if __name__ == "__main__":
    harness.run("rotary_embedding", make_cases, harness.parser(__doc__).parse_args())
