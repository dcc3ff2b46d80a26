"""Generate Python source with a compiled model: one ragged prefill, then batched greedy decode.

Try `python examples/generate.py --prompt "def read_lines(path):"`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from llama import Batch, load_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import torch_tkv

PROMPTS = [
    "def read_lines(path):\n",
    "import os\nimport sys\n\nclass FileCache:\n    def __init__(self, ",
    "for name in sorted(",
    'def parse_header(line):\n    """Split a header line into its name and its value."""\n    if ',
]
WARMUP_RUNS = 3  # CUDA graph trees compile and run, then record, then replay

Model = Callable[[Tensor, Batch], Tensor]


class Generation(NamedTuple):
    """Generated tokens [B, max_new_tokens] and where the time went."""

    tokens: Tensor
    warmup_seconds: float
    prefill_seconds: float
    decode_seconds: float


def allocate_blocks(seq_lens: Tensor, block_size: int) -> Tensor:
    """Hand out the blocks of a cache in random order: [B, max_blocks] int32, rows padded with 0."""
    counts = (seq_lens + block_size - 1) // block_size
    blocks = torch.randperm(int(counts.sum()), dtype=torch.int32)
    return pad_sequence(list(blocks.split(counts.tolist())), batch_first=True)


def next_tokens(model: Model, tokens: Tensor, batch: Batch) -> Tensor:
    """Return the likeliest next token of every sequence, [B]."""
    logits = model(tokens, batch)
    return logits[batch.query_start_loc[1:] - 1].argmax(-1)


def advance(batch: Batch, block_size: int) -> None:
    """Move a decode batch one token on, in place: CUDA graphs read the same addresses again."""
    batch.positions.add_(1)
    batch.seq_lens.add_(1)
    block = batch.block_table.gather(1, (batch.positions // block_size).unsqueeze(1)).squeeze(1)
    batch.slot_mapping.copy_(block.long() * block_size + batch.positions % block_size)


def clock(device: torch.device) -> float:
    """Read the time once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def warm_up(model: Model, prompt_tokens: Tensor, prefill: Batch, decode: Batch) -> None:
    """Compile both steps; repeated, each writes the same keys into the same slots."""
    for _ in range(WARMUP_RUNS):
        tokens = next_tokens(model, prompt_tokens, prefill)
    for _ in range(WARMUP_RUNS):
        next_tokens(model, tokens, decode)


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[bytes],
    max_new_tokens: int,
    block_table: Tensor,
    block_size: int,
    device: torch.device,
) -> Generation:
    """Continue every prompt greedily by `max_new_tokens` tokens."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    zeros, ones = torch.zeros_like(lengths), torch.ones_like(lengths)
    prefill = Batch.ragged(zeros, lengths, block_table, block_size).to(device)
    decode = Batch.ragged(lengths, ones, block_table, block_size).to(device)
    prompt_tokens = torch.tensor(list(b"".join(prompts)), device=device)
    generated = torch.empty(len(prompts), max_new_tokens, dtype=torch.int64, device=device)

    start = clock(device)
    warm_up(model, prompt_tokens, prefill, decode)
    warm = clock(device)
    tokens = next_tokens(model, prompt_tokens, prefill)
    generated[:, 0] = tokens
    prefilled = clock(device)
    for step in range(1, max_new_tokens):
        tokens.copy_(next_tokens(model, tokens, decode))
        generated[:, step] = tokens
        advance(decode, block_size)
    done = clock(device)
    return Generation(generated, warm - start, prefilled - warm, done - prefilled)


def print_texts(prompts: list[bytes], tokens: Tensor) -> None:
    for number, (prompt, continuation) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        text = (prompt + bytes(continuation)).decode(errors="replace")
        print(f"--- {number}: {len(prompt)} + {len(continuation)} bytes ---\n{text}\n")


def print_speed(name: str, generation: Generation, prompts: list[bytes]) -> None:
    batch_size, max_new_tokens = generation.tokens.shape
    prefill_rate = sum(map(len, prompts)) / generation.prefill_seconds
    decode_rate = batch_size * (max_new_tokens - 1) / generation.decode_seconds
    print(
        f"{name}: warm-up {generation.warmup_seconds:.2f} s, "
        f"prefill {prefill_rate:,.0f} tokens/s, decode {decode_rate:,.0f} tokens/s"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", help="may be repeated: one batch of them all")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--mode", help="of torch.compile; on cuda reduce-overhead if not given")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "stdlib-bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the block numbers")
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not compare with the uncompiled model, whose rounding a 16-bit dtype may tell",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    mode = args.mode or ("reduce-overhead" if device.type == "cuda" else None)
    prompts = [prompt.encode() for prompt in args.prompt or PROMPTS]
    if not all(prompts):
        raise SystemExit("a prompt needs at least one byte")
    seq_lens = torch.tensor([len(prompt) + args.max_new_tokens for prompt in prompts])
    model = load_model(args.weights, device, dtype)
    if seq_lens.max() > model.config.max_positions:
        raise SystemExit(f"prompt and continuation exceed {model.config.max_positions} bytes")

    torch.manual_seed(args.seed)
    block_table = allocate_blocks(seq_lens, args.block_size)
    num_blocks = int(block_table.max()) + 1
    run = (prompts, args.max_new_tokens, block_table, args.block_size, device)

    model.allocate_cache(num_blocks, args.block_size)
    # Prefill and decode are two graphs of fixed shapes, not one of a dynamic T.
    compiled = torch.compile(model, backend="tkv", mode=mode, dynamic=False)
    generation = generate(compiled, *run)
    print_texts(prompts, generation.tokens)
    print(torch_tkv.report())
    print_speed("compiled", generation, prompts)
    if args.check:
        model.allocate_cache(num_blocks, args.block_size)
        expected = generate(model, *run)
        print_speed("uncompiled", expected, prompts)
        if not torch.equal(generation.tokens, expected.tokens):
            raise SystemExit("the compiled model's tokens differ from the uncompiled model's")
        print(f"all {expected.tokens.numel()} tokens equal the uncompiled model's")


if __name__ == "__main__":
    main()
