"""tkv::paged_attention against SDPA over gathered keys, FlexAttention, FlashInfer and FA3.

`python benchmarks/paged_attention.py --csv attention.csv --plot attention.png`

Every variant is checked against the reference in float32 first. Calls take turns over blocks of
their own, so that keys and values come from memory and not from the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from harness import HKV, HQ, D, P
from inputs import bits
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import torch_tkv
from torch_tkv import reference

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
# Families of cases that are drawn: TB/s over the context, TFLOP/s over the length of a prompt.
DECODE, PREFILL = "decode over context", "prefill over length"
# FlexAttention skips whole blocks of its mask, at their best from this size on; a power of two.
FLEX_PAGE = 128
MAX_SETS = 24
# Query heads, KV heads and head sizes of the cases that vary these.
HEADS = ((32, 8, 128), (28, 4, 128), (64, 8, 64), (16, 16, 80), (16, 16, 256), (71, 1, 64))
TOLERANCE = 0.02  # of the norm of a row


class Case(NamedTuple):
    """One batch: lengths and numbers of new tokens of its sequences, and what is special."""

    family: str
    name: str
    seq_lens: Sequence[int]
    query_lens: Sequence[int]
    heads: tuple[int, int] = (HQ, HKV)
    head_size: int = D
    cache_dtype: torch.dtype = BF16
    window: int | None = None
    padding: int = 0  # query rows behind the last sequence

    @property
    def label(self) -> str:
        return f"{self.family}: {self.name}"

    @property
    def tokens(self) -> int:
        """How many queries belong to sequences."""
        return sum(self.query_lens)

    @property
    def bytes(self) -> int:
        """Keys and values that some query sees, each read once."""
        keys = sum(length - self.first_key(b) for b, length in enumerate(self.seq_lens))
        return 2 * keys * self.heads[1] * self.head_size * self.cache_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of both products, over the pairs of a query and a key that it sees."""
        pairs = 0
        for length, count in zip(self.seq_lens, self.query_lens, strict=True):
            seen = range(length - count + 1, length + 1)
            pairs += sum(min(n, self.window or n) for n in seen)
        return 4 * pairs * self.heads[0] * self.head_size

    def first_key(self, b: int) -> int:
        """Return the first key that a query of sequence `b` sees."""
        if self.window is None:
            return 0
        return max(0, self.seq_lens[b] - self.query_lens[b] + 1 - self.window)


def even(
    family: str, batch: int, context: int, new: int = 1, what: str = "", **options: Any
) -> Case:
    """Return a case of `batch` sequences of `context` keys, of which `new` are new."""
    name = f"{batch} x {context}{what and f' {what}'}"
    return Case(family, name, [context] * batch, [new] * batch, **options)


def make_cases() -> list[Case]:
    """Return all cases, those of one family side by side."""
    cases = [even(DECODE, 8, 2**k) for k in range(9, 17)]
    for batch, context in ((1, 1024), (4, 1024), (1, 65536), (32, 4096), (128, 1024)):
        cases.append(even("decode", batch, context))
    cases.append(Case("ragged", "1 x 65536, 31 x 512", [65536] + [512] * 31, [1] * 32))
    for seed in range(3):
        rng = random.Random(seed)
        lengths = [round(math.exp(rng.uniform(math.log(16), math.log(65536)))) for _ in range(32)]
        cases.append(Case("ragged", f"32 log-uniform, seed {seed}", lengths, [1] * 32))
        mean = sum(lengths) // 32
        cases.append(even("ragged", 32, mean, what=f"like seed {seed}"))
    for batch, context in ((32, 4096), (32, 8192), (1, 65536), (8, 8192), (128, 1024)):
        cases.append(even("float8 cache", batch, context, cache_dtype=FP8))
    for batch, context, new in ((1, 8192, 8192), (1, 32768 + 1024, 1024), (16, 1024, 1024)):
        cases.append(even("float8 cache", batch, context, new, f"{new} new", cache_dtype=FP8))
    cases.append(even("window", 8, 4096, what="without"))
    cases.append(even("window", 8, 65536, what="of 4096", window=4096))
    cases.append(even("window", 8, 4096, 1024, "without, 1024 new"))
    cases.append(even("window", 8, 65536, 1024, "of 4096, 1024 new", window=4096))
    cases.append(even("padded rows", 32, 4096, what="without"))
    cases.append(even("padded rows", 32, 4096, what="and 256 rows", padding=256))
    cases += [even("drafts", 32, 8192, new, f"{new} new") for new in (2, 4, 8, 16)]
    lengths, new = [65536] + [128] * 8, [1] + [128] * 8
    cases.append(Case("mixed", "decode 1 x 65536, prefill 8 x 128", lengths, new))
    for q, kv, size in HEADS:
        layout, options = f"{q}/{kv} x {size}", {"heads": (q, kv), "head_size": size}
        cases.append(even("heads", 32, 4096, what=f"decode {layout}", **options))
        cases.append(even("heads", 1, 8192, 8192, f"prefill {layout}", **options))
    cases += [even(PREFILL, 1, 2**k, 2**k) for k in range(10, 16)]
    cases.append(even("prefill", 1, 32768 + 1024, 1024, "1024 new"))
    cases.append(even("prefill", 4, 16384 + 1024, 1024, "1024 new"))
    cases.append(even("prefill", 4, 4096, 4096, "from empty"))
    cases.append(even("prefill", 16, 1024, 1024, "from empty"))
    return cases


class Inputs(NamedTuple):
    """Random inputs of a case; each set has blocks of its own."""

    query: Tensor  # [T, Hq, D]
    caches: tuple[Tensor, Tensor]
    tables: Sequence[Tensor]  # [B, max_blocks] of each set
    seq_lens: Tensor
    starts: Tensor
    scales: dict[str, Tensor]  # of caches of 8 bits


def make_inputs(case: Case, sets: int, device: str = "cuda") -> Inputs:
    """Return `sets` sets of inputs, whose blocks are in random order."""
    pages = [-(-length // P) for length in case.seq_lens]
    order = torch.randperm(sets * sum(pages), dtype=torch.int32, device=device)
    tables = [
        torch.nn.utils.rnn.pad_sequence(part.split(pages), batch_first=True)
        for part in order.split(sum(pages))
    ]
    shape = (len(order), P, case.heads[1], case.head_size)
    caches = [torch.randn(shape, dtype=BF16, device=device).to(case.cache_dtype) for _ in "kv"]
    rows = case.tokens + case.padding
    query = torch.randn(rows, case.heads[0], case.head_size, dtype=BF16, device=device)
    indices = (case.seq_lens, [0, *itertools.accumulate(case.query_lens)])
    indices = [torch.tensor(index, dtype=torch.int32, device=device) for index in indices]
    scales = {}
    if case.cache_dtype != BF16:
        k_scale, v_scale = torch.tensor([0.7, 1.3], device=device)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    return Inputs(query, (caches[0], caches[1]), tables, *indices, scales)


def make_expected(case: Case, inputs: Inputs, chunk: int = 256) -> Tensor:
    """Return what a call on set 0 gives: the reference in float32, a chunk of queries at a time."""
    sequence, lengths, counts = [], [], []
    for b, (length, new) in enumerate(zip(case.seq_lens, case.query_lens, strict=True)):
        for first in range(0, new, chunk):
            count = min(chunk, new - first)
            sequence.append(b)
            lengths.append(length - new + first + count)
            counts.append(count)
    return reference.paged_attention(
        inputs.query[: case.tokens].float(),
        *inputs.caches,
        inputs.tables[0][sequence],
        torch.tensor(lengths),
        torch.tensor([0, *itertools.accumulate(counts)]),
        case.head_size**-0.5,
        **inputs.scales,
        window=case.window,
    )


# A call on the inputs of one set, by the set's number; returns the outputs of all sequences.
Call = Callable[[int], Tensor]


def tkv(case: Case, inputs: Inputs) -> Call:
    """Return the operator."""
    query, caches, tables, seq_lens, starts, scales = inputs

    def call(i: int) -> Tensor:
        out = torch_tkv.paged_attention(
            query, *caches, tables[i], seq_lens, starts, window=case.window, **scales
        )
        return out[: case.tokens]

    return call


def sdpa(case: Case, inputs: Inputs) -> Call | None:
    """Return PyTorch's attention over gathered keys and values, a call for all equal sequences."""
    if case.window is not None and max(case.query_lens) > 1:
        return None  # SDPA takes a window as a mask of all pairs only
    groups, b, row = [], 0, 0
    for (length, new), same in itertools.groupby(zip(case.seq_lens, case.query_lens, strict=True)):
        count = len(list(same))
        seqs, rows = slice(b, b + count), slice(row, row + count * new)
        groups.append((seqs, rows, length, new, case.first_key(b)))
        b, row = seqs.stop, rows.stop

    def call(i: int) -> Tensor:
        outs = []
        for seqs, rows, length, new, first in groups:
            blocks = inputs.tables[i][seqs, first // P : -(-length // P)]
            keys = slice(first % P, first % P + length - first)
            k, v = (rows_of(cache, blocks)[:, keys].transpose(1, 2) for cache in inputs.caches)
            if inputs.scales:
                k, v = k * inputs.scales["k_scale"], v * inputs.scales["v_scale"]
            q = inputs.query[rows].unflatten(0, (-1, new)).transpose(1, 2)  # [B, Hq, n, D]
            whole = new == length and new > 1
            mask = None if whole or new == 1 else causal_lower_right(new, length)
            gqa = case.heads[0] != case.heads[1]
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=whole, enable_gqa=gqa)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return call


def rows_of(cache: Tensor, blocks: Tensor) -> Tensor:
    """Return the rows [B, L, Hkv, D] of the blocks of each sequence, in bfloat16."""
    return bits(cache)[blocks].view(cache.dtype).flatten(1, 2).to(BF16)


def flex(case: Case, inputs: Inputs) -> Call | None:
    """Return compiled FlexAttention over pages of its own size, for decode of even lengths."""
    whole = all(length % FLEX_PAGE == 0 for length in case.seq_lens)
    plain = case.window is None and case.padding == 0 and case.cache_dtype == BF16
    power = case.heads[0] // case.heads[1] in (1, 2, 4, 8, 16)
    if max(case.query_lens) > 1 or not (whole and plain and power):
        return None
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    counts = inputs.seq_lens // FLEX_PAGE
    total = int(counts.sum())
    sets = [flex_set(case, inputs, table, counts.tolist()) for table in inputs.tables]
    nothing, full = torch.zeros_like(counts)[:, None, None], counts[:, None, None]
    masks = []
    for _, table in sets:
        blocks = torch.nn.functional.pad(table, (0, total - table.shape[1]))[:, None, None]
        partial = nothing, torch.zeros_like(blocks)  # every block is seen as a whole
        sizes = {"BLOCK_SIZE": FLEX_PAGE, "seq_lengths": (1, total * FLEX_PAGE)}
        masks.append(
            BlockMask.from_kv_blocks(*partial, full, blocks, **sizes, compute_q_blocks=False)
        )
    query = inputs.query[:, :, None]  # [B, Hq, 1, D]
    gqa = case.heads[0] != case.heads[1]

    def call(i: int) -> Tensor:
        return attend(query, *sets[i][0], block_mask=masks[i], enable_gqa=gqa)[:, :, 0]

    return call


def flex_set(
    case: Case, inputs: Inputs, table: Tensor, counts: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Return a set's keys and values [1, Hkv, L, D] in pages of FLEX_PAGE, and their table."""
    order = torch.randperm(sum(counts), device=table.device).int()
    pages = torch.nn.utils.rnn.pad_sequence(order.split(list(counts)), batch_first=True)
    caches = []
    for cache in inputs.caches:
        heads, size = cache.shape[2:]
        paged = cache.new_empty(heads, len(order), FLEX_PAGE, size)
        for b, count in enumerate(counts):
            rows = cache[table[b, : count * FLEX_PAGE // P]].view(count, FLEX_PAGE, heads, size)
            paged[:, pages[b, :count]] = rows.permute(2, 0, 1, 3)
        caches.append(paged.view(1, heads, -1, size))
    return caches, pages


def flashinfer(case: Case, inputs: Inputs) -> Call | None:
    """Return FlashInfer's wrapper, planned ahead for every set."""
    module = harness.optional("flashinfer")
    if module is None:
        return None
    pages = -(-inputs.seq_lens // P)
    kv_starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    last = (inputs.seq_lens - 1) % P + 1
    sizes = (*case.heads, case.head_size)
    options = {
        "q_data_type": BF16,
        "kv_data_type": case.cache_dtype,
        "window_left": -1 if case.window is None else case.window - 1,
    }
    decode = max(case.query_lens) == 1
    wrappers = []
    for table in inputs.tables:
        blocks = torch.cat([row[:n] for row, n in zip(table, pages.tolist(), strict=True)])
        workspace = torch.empty(2**27, dtype=torch.uint8, device="cuda")
        if decode:
            wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True
            )
            wrapper.plan(kv_starts, blocks, last, *sizes, P, **options)
        else:
            wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            indices = (inputs.starts, kv_starts, blocks, last)
            wrapper.plan(*indices, *sizes, P, causal=True, **options)
        wrappers.append(wrapper)
    scales = {name: float(scale) for name, scale in inputs.scales.items()}
    query = inputs.query[: case.tokens]

    def call(i: int) -> Tensor:
        return wrappers[i].run(query, inputs.caches, **scales)

    return call


def fa3(case: Case, inputs: Inputs) -> Call | None:
    """Return FlashAttention 3."""
    module = harness.optional("flash_attn_interface")
    if module is None or case.cache_dtype != BF16:
        return None
    query = inputs.query[: case.tokens]
    options = {
        "cache_seqlens": inputs.seq_lens,
        "cu_seqlens_q": inputs.starts,
        "max_seqlen_q": max(case.query_lens),
        "causal": True,
        "window_size": (-1, -1) if case.window is None else (case.window - 1, 0),
    }

    def call(i: int) -> Tensor:
        return module.flash_attn_with_kvcache(
            query, *inputs.caches, page_table=inputs.tables[i], **options
        )

    return call


VARIANTS = {
    "tkv": tkv,
    "gather + sdpa": sdpa,
    "flex_attention": flex,
    "flashinfer": flashinfer,
    "fa3": fa3,
}


class Ceilings(NamedTuple):
    """What the GPU can do, measured in the same run."""

    read_tb_per_s: float
    matmul_tflop_per_s: float


class Row(NamedTuple):
    """A measurement, as in a CSV file."""

    operator: str
    family: str
    case: str
    variant: str
    context: int  # of the longest sequence
    us: float
    tb_per_s: float  # keys and values, read once
    tflop_per_s: float
    of_ceiling: float  # of the bandwidth or of the products, whichever is nearer
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def measure(case: Case, ceilings: Ceilings, options: argparse.Namespace) -> Iterator[Row]:
    """Check and time every way to do a case."""
    sets, count = rotation(case)
    inputs = make_inputs(case, sets)
    expected = make_expected(case, inputs)
    graphs = {}
    for name, make in VARIANTS.items():
        if not harness.chosen(name, options.variants):
            continue
        call = make(case, inputs)
        if call is not None:
            check(name, case, call(0), expected)
            graphs[name] = harness.capture(call, count, sets)
    for name, time in harness.replay(graphs, options.repeats).items():
        us = time / count
        speed, flops = case.bytes / us / 1e6, case.flops / us / 1e6
        share = max(speed / ceilings.read_tb_per_s, flops / ceilings.matmul_tflop_per_s)
        context = max(case.seq_lens)
        row = ("paged_attention", case.family, case.name, name, context, us, speed, flops, share)
        yield Row(*row, *harness.describe_machine())


def rotation(case: Case) -> tuple[int, int]:
    """Return how many sets of blocks the calls of a graph take turns over, and how many calls.

    The sets are four times as large as the L2 cache, or as many as there are calls.
    """
    l2 = torch.cuda.get_device_properties().L2_cache_size if torch.cuda.is_available() else 2**26
    sets = min(max(-(-4 * l2 // case.bytes), 1), MAX_SETS)
    least_us = max(case.bytes / 4e6, case.flops / 6e8)
    return sets, max(sets, min(int(1000 / least_us), MAX_SETS), 2)


def check(name: str, case: Case, out: Tensor, expected: Tensor) -> None:
    """Exit where a variant does not compute what is expected."""
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not (error <= TOLERANCE).all():
        sys.exit(f"{name} is wrong for {case.label}: off by {float(error.max()):.3f} of a row")


def draw(rows: Sequence[Row], ceilings: Ceilings, path: Path) -> None:
    """Draw TB/s of decode over the context and TFLOP/s of prefill over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    panels = (
        (DECODE, "tb_per_s", ceilings.read_tb_per_s, "TB/s, keys and values once", "reading 1 GB"),
        (PREFILL, "tflop_per_s", ceilings.matmul_tflop_per_s, "TFLOP/s, causal", "8192^3 matmul"),
    )
    for axis, (family, field, ceiling, unit, what) in zip(axes, panels, strict=True):
        shown = [row for row in rows if row.family == family]
        for variant in dict.fromkeys(row.variant for row in shown):
            mine = [row for row in shown if row.variant == variant]
            points = [(row.context, getattr(row, field)) for row in mine]
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.axhline(ceiling, color="black", linestyle="--", label=what)
        axis.set(xlabel="keys of a sequence", ylabel=unit, title=family)
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.suptitle(f"paged_attention, {rows[0].gpu}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = harness.host_parser(__doc__)
    parser.add_argument(
        "--only", metavar="PATTERN", default="", help="cases, by regular expression"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="variants that start so")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser


def main() -> None:
    """Measure the chosen cases, print a line each and write the files asked for."""
    options = make_parser().parse_args()
    harness.require_gpu()
    torch.manual_seed(0)
    ceilings = Ceilings(
        harness.read_gb_per_s(options.repeats) / 1e3, harness.matmul_tflop_per_s(options.repeats)
    )
    print(", ".join(harness.describe_machine()))
    print("read {:.2f} TB/s, matmul {:.0f} TFLOP/s; cold L2\n".format(*ceilings))
    print(f"{'case':48} {'variant':14} {'us':>9} {'TB/s':>6} {'TFLOP/s':>8} {'of ceiling':>10}")
    cases = [case for case in make_cases() if re.search(options.only, case.label)]
    rows: list[Row] = []
    with torch.no_grad(), harness.progress(cases, unit="case") as progress:
        for case in progress:
            progress.set_postfix_str(case.label)
            for row in measure(case, ceilings, options):
                rows.append(row)
                speeds = f"{row.us:9.2f} {row.tb_per_s:6.2f} {row.tflop_per_s:8.1f}"
                line = f"{case.label:48} {row.variant:14} {speeds} {row.of_ceiling:10.0%}"
                progress.write(line, file=sys.stdout)
            if options.csv and rows:
                harness.write_csv(rows, options.csv)
            torch.compiler.reset()
            torch.cuda.empty_cache()
    if options.plot and rows:
        draw(rows, ceilings, options.plot)


if __name__ == "__main__":
    main()
