from __future__ import annotations

import itertools
import random

import pytest
import torch
import triton

from torch_tkv.kernels.attention_geometry import Batch, Plan, complete
from torch_tkv.kernels.tile_list import FIELDS, list_tiles

BLOCK_N = 128


def expected_list(
    starts: list[int], seq_lens: list[int], tokens: int, plan: Plan
) -> list[tuple[int, ...]]:
    """Return sequence, start, count, length and number of all tiles, those of most keys first.

    The first 4 bits of the number of tiles of keys count. The padded rows behind the last sequence
    are one more, of no keys.
    """
    tiles = []
    for b, length in enumerate([*seq_lens, 0]):
        count = [*starts, tokens][b + 1] - starts[b]
        if plan.max_queries is not None and (count <= plan.max_queries or length == 0):
            continue
        rows = range(count * plan.group)
        for tile, first in enumerate(rows[:: plan.tile_rows]):
            last_token = rows[first:][: plan.tile_rows][-1] // plan.group
            keys = length - count + last_token + 1 if plan.causal else length
            tiles_of_keys = -(-max(keys, 0) // BLOCK_N)
            width = 2 ** max(tiles_of_keys.bit_length() - 4, 0)
            tiles.append((-(tiles_of_keys // width * width), b, -tile, starts[b], count, length))
    return [(b, start, n, length, -tile) for _, b, tile, start, n, length in sorted(tiles)]


@pytest.mark.parametrize("group", [3, 4, 5, 71])
@pytest.mark.parametrize("seed", range(4))
def test_every_tile_is_listed_once_those_of_most_keys_first(
    device: str, seed: int, group: int
) -> None:
    rng = random.Random(seed)
    seqs = rng.choice([1, 2, 5, 17, 40] if group < 8 else [1, 2, 5])
    counts = [rng.choice([0, 1, 5, 16, 17, 32, 33, 100, 300]) for _ in range(seqs)]
    behind = [0, 0, 1, 100, 1000, 9000]
    lengths = [n + rng.choice(behind) if rng.random() < 0.9 else 0 for n in counts]
    starts = [0, *itertools.accumulate(counts)]
    tokens = starts[-1] + rng.choice([0, 70])
    plan = Plan(
        page=16,
        group=group,
        size=128,
        value_size=128,
        key_strides=(),
        value_strides=(),
        causal=rng.random() < 0.8,
        window=None,
        softcap=None,
        block_d=128,
        block_dv=128,
        tile_rows=rng.choice([64, 128, 192]),
        block_n=BLOCK_N,
        block_b=min(triton.next_power_of_2(seqs + 1), 16),
        max_queries=rng.choice([None, 16]),
    )
    indices = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, starts)]
    table = torch.zeros(seqs, 600, dtype=torch.int32, device=device)
    batch = Batch(table, table.stride(0), 1, indices[0], 1, indices[1], 1)
    room = tokens * group // plan.tile_rows + seqs + 1
    tiles = torch.full((room + 1, FIELDS.value), -7, dtype=torch.int32, device=device)
    list_tiles[(room,)](tiles, batch, seqs, tokens, table.shape[1], complete(plan))
    listed = [tuple(entry[:5]) for entry in tiles[: int(tiles[room, 0])].tolist()]
    assert listed == expected_list(starts, lengths, tokens, plan)
