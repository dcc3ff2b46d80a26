"""Train the byte-level Llama on the source text of the Python standard library.

`python examples/train.py` writes weights, config and model card into examples/stdlib-bytes.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import sys
import sysconfig
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llama import Llama, LlamaConfig, load_model, save_model
from torch import Tensor
from tqdm import tqdm

STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VALIDATION_STRIDE = 20
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1


class Corpus(NamedTuple):
    """Source text, files separated by a zero byte; validation holds files training never saw."""

    train: Tensor  # [bytes] uint8
    validation: Tensor  # [bytes] uint8
    num_files: int

    def to(self, device: torch.device) -> Corpus:
        return Corpus(self.train.to(device), self.validation.to(device), self.num_files)


def read_corpus(source: Path, min_bytes: int) -> Corpus:
    """Read every .py file below `source`; every 20th, by a hash of its path, is for validation."""
    train, validation = bytearray(), bytearray()
    paths = sorted(path.relative_to(source) for path in source.rglob("*.py"))
    paths = [path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    for path in paths:
        held_out = zlib.crc32(path.as_posix().encode()) % VALIDATION_STRIDE == 0
        part = validation if held_out else train
        part += (source / path).read_bytes() + b"\0"
    if min(len(train), len(validation)) < min_bytes:
        raise SystemExit(
            f"{source}: {len(train)} bytes to train on and {len(validation)} to validate with, "
            f"of each at least {min_bytes} are needed"
        )
    return Corpus(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(validation, dtype=torch.uint8),
        len(paths),
    )


def random_windows(text: Tensor, batch_size: int, length: int) -> Tensor:
    """Return `batch_size` pieces of `text`, each [length], from anywhere in it."""
    starts = torch.randint(len(text) - length + 1, (batch_size, 1), device=text.device)
    return text[starts + torch.arange(length, device=text.device)]


def next_byte_loss(model: Llama, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of every byte but the first of each window."""
    tokens = windows.long()
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Llama, text: Tensor, seq_len: int, batch_size: int = 64) -> float:
    """Return the loss over `text`, cut into windows that predict every byte once."""
    windows = text.unfold(0, seq_len + 1, seq_len)
    losses = [next_byte_loss(model, part) * len(part) for part in windows.split(batch_size)]
    return float(sum(losses)) / len(windows)


def learning_rate_scale(step: int, steps: int) -> float:
    """Rise linearly over the warm-up, then fall along a cosine to zero."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(model: Llama, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(
    model: Llama, text: Tensor, *, steps: int, batch_size: int, seq_len: int, lr: float
) -> None:
    """Train in place, in bfloat16 autocast; compiled where there is a GPU."""
    device = text.device
    optimizer = make_optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(step, steps)
    )
    loss_function = torch.compile(next_byte_loss) if device.type == "cuda" else next_byte_loss
    progress = tqdm(range(steps), desc="training", mininterval=1.0)
    for step in progress:
        windows = random_windows(text, batch_size, seq_len + 1)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_function(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:  # reading the loss waits for the device
            progress.set_postfix(nats_per_byte=f"{loss.item():.3f}", refresh=False)


MODEL_CARD = """\
---
license: bsd-3-clause
---

# A small Llama over the bytes of Python source

`examples/train.py` trained it so that the examples and the tests have real text to generate.
It is no coding assistant.

| | |
|---|---|
| parameters | {parameters:,} |
| file | `model.safetensors`, bfloat16, {file_size:,} bytes |
| text | {text} |
| size of the text | {num_files:,} files, {num_bytes:,} bytes |
| licence of the text | {text_licence} |
| licence of the weights and the code | BSD-3-Clause |
| hardware | {hardware} |
| torch | {torch_version} |
| wall time of training | {seconds:.0f} s |

The loss of these weights, computed in float32. Validation files are held out of training by a
hash of their path.

| | nats/byte | bits/byte |
|---|---|---|
| training text, its first {train_bytes:,} bytes | {train_loss} |
| validation text, {validation_bytes:,} bytes | {validation_loss} |

The command:

```
{command}
```
"""


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def loss_cells(model: Llama, text: Tensor, seq_len: int) -> str:
    nats = evaluate(model, text, seq_len)
    return f"{nats:.4f} | {nats / math.log(2):.4f}"


def model_card(model: Llama, corpus: Corpus, args: argparse.Namespace, **facts: object) -> str:
    """Measure the saved model and describe it."""
    is_stdlib = args.source == STDLIB
    python = f"{platform.python_implementation()} {platform.python_version()}"
    train_text = corpus.train[: len(corpus.validation)]
    return MODEL_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        file_size=(args.out / "model.safetensors").stat().st_size,
        text=f"{python}'s standard library without its tests" if is_stdlib else args.source.name,
        text_licence="PSF-2.0" if is_stdlib else "as its files say",
        num_files=corpus.num_files,
        num_bytes=len(corpus.train) + len(corpus.validation),
        hardware=describe_device(corpus.train.device),
        torch_version=torch.__version__,
        train_bytes=len(train_text),
        train_loss=loss_cells(model, train_text, args.seq_len),
        validation_bytes=len(corpus.validation),
        validation_loss=loss_cells(model, corpus.validation, args.seq_len),
        **facts,
    )


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--source", type=Path, default=STDLIB, help="folder of .py files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stdlib-bytes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    corpus = read_corpus(args.source, args.seq_len + 1).to(device)
    model = Llama(LlamaConfig(max_positions=args.seq_len)).to(device)

    start = time.perf_counter()
    train(
        model,
        corpus.train,
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        lr=args.lr,
    )
    seconds = time.perf_counter() - start

    save_model(model, args.out)
    card = model_card(
        load_model(args.out, device),  # the losses stated are those of the rounded weights
        corpus,
        args,
        seconds=seconds,
        command=shlex.join(["python", "examples/train.py", *argv]),
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
