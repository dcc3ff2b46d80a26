"""What the benchmarks share: timing inside CUDA graphs, ceilings, tables, CSV files and plots.

A benchmark yields cases: one operation on inputs of one size, and every way to do it. Each way is
checked against the expected result first. Then all are captured, several calls a graph, and their
graphs replayed in turn in one process; medians are reported, beside ceilings of the same run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

TOKENS = (1, 64, 1024, 16384, 65536)
# Where operators are measured. Without a GPU the tests check them on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Head counts, head size and block size of the shapes measured.
HQ, HKV, D, P = 32, 8, 128, 16

# A progress bar on stderr; none where that is no terminal.
progress = functools.partial(tqdm, leave=False, disable=None)

# A call on the inputs of one set, by the set's number; returns what it wrote.
Call = Callable[[int], Sequence[Tensor]]


class Case(NamedTuple):
    """One operation on inputs of one size, and every way to do it."""

    label: str  # what differs from other cases but for the tokens, as "NHD bfloat16"
    tokens: int
    bytes: int  # read and written by a call
    reset: Callable[[], None]  # undoes what calls wrote in place
    expected: Sequence[Tensor]  # what a call on set 0 returns
    calls: Mapping[str, Call]
    copies: Mapping[str, Call]  # calls that only move as many bytes; not checked
    tolerance: float = 0.0
    read: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple  # what is compared of results


class Ceilings(NamedTuple):
    """What the GPU can do, measured in the same run."""

    copy_gb_per_s: float  # bytes read and written
    empty_us: float  # an empty kernel in a graph of many


class Row(NamedTuple):
    """A measurement, as in a CSV file."""

    operator: str
    case: str
    variant: str
    tokens: int
    where: str  # "warm L2", "cold L2", "host"
    us: float
    gb_per_s: float | None = None
    of_copy: float | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


def host_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=25, help="rounds, of which the median")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    return parser


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks of operators have."""
    parser = host_parser(description)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
    parser.add_argument("--cold", action="store_true", help="inputs of its own a call, L2 flushed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants that start so")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser


def require_gpu() -> None:
    """Exit with one sentence where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("The benchmarks measure a CUDA or ROCm GPU, and torch sees none.")


def run(
    operator: str,
    make_cases: Callable[[int, int, argparse.Namespace], Iterable[Case]],
    options: argparse.Namespace,
) -> None:
    """Measure every case, print the tables and write the files that `options` ask for.

    `make_cases(tokens, sets, options)` yields cases whose calls take sets of inputs from 0 on.
    """
    require_gpu()
    torch.manual_seed(0)
    ceilings = measure_ceilings(options.repeats)
    rows: list[Row] = []
    with torch.no_grad(), progress(options.tokens, unit="size") as sizes:
        for tokens in sizes:
            sets = calls_per_graph(tokens) if options.cold else 1
            for case in make_cases(tokens, sets, options):
                sizes.set_postfix_str(f"{case.label}, {tokens} tokens")
                rows += measure(operator, case, sets, ceilings, options)
                torch.compiler.reset()
    report(rows, ceilings, options.csv, options.plot)


def measure(
    operator: str, case: Case, sets: int, ceilings: Ceilings, options: argparse.Namespace
) -> list[Row]:
    """Check and time every way to do a case."""
    calls = {name: call for name, call in case.calls.items() if chosen(name, options.only)}
    for name, call in calls.items():
        check(name, call, case)
    calls |= {name: call for name, call in case.copies.items() if chosen(name, options.only)}
    count = calls_per_graph(case.tokens)
    graphs = {name: capture(call, count, sets) for name, call in calls.items()}
    times = replay(graphs, options.repeats, flush=options.cold)
    case.reset()
    machine = describe_machine()
    where = "cold L2" if options.cold else "warm L2"
    rows = []
    for name, time in times.items():
        us = time / count
        speed = case.bytes / us / 1e3
        of_copy = speed / ceilings.copy_gb_per_s
        rows.append(
            Row(operator, case.label, name, case.tokens, where, us, speed, of_copy, *machine)
        )
    return rows


def calls_per_graph(tokens: int) -> int:
    """Return how many calls a graph holds: many where one is short."""
    return max(2, min(20, 2**17 // max(tokens, 1)))


def chosen(name: str, only: Sequence[str] | None) -> bool:
    """Return whether the variant `name` was asked for."""
    return only is None or name.startswith(tuple(only))


def check(name: str, call: Call, case: Case) -> None:
    """Exit where a variant does not compute what is expected."""
    case.reset()
    for got, right in zip(case.read(call(0)), case.read(case.expected), strict=True):
        try:
            torch.testing.assert_close(
                got.float(), right.float(), rtol=case.tolerance, atol=case.tolerance
            )
        except AssertionError as error:
            sys.exit(f"{name} is wrong for {case.label}, {case.tokens} tokens: {error}")


def capture(call: Callable[[int], object], count: int, sets: int) -> torch.cuda.CUDAGraph:
    """Return a graph of `count` calls that take turns over the sets of inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(sets):
            call(number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            call(number % sets)
    return graph


def replay(
    graphs: Mapping[str, torch.cuda.CUDAGraph], repeats: int, *, flush: bool = False
) -> dict[str, float]:
    """Return the median time of a replay of each graph, in us, replayed in turn."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    l2 = torch.cuda.get_device_properties().L2_cache_size
    dirt = torch.empty(4 * l2 if flush else 0, dtype=torch.uint8, device="cuda")
    for _ in range(repeats):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dirt.zero_()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def measure_ceilings(repeats: int) -> Ceilings:
    """Measure the bandwidth of a copy of 1 GB and the time of an empty kernel."""
    empty = replay({"empty": capture(lambda _: _nothing[(1,)](), 100, 1)}, repeats)["empty"]
    return Ceilings(_copy_gb_per_s(repeats), empty / 100)


def _copy_gb_per_s(repeats: int) -> float:
    # Not in a graph: there a copy is a node of its own kind, which reached 2.8 TB/s where this
    # reached 4.2 (one H200, torch 2.11).
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return 2 * source.nbytes / statistics.median(times[1:]) / 1e6


@triton.jit
def _nothing() -> None:
    pass


def read_gb_per_s(repeats: int) -> float:
    """Measure the bandwidth of reading 1 GB."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    sums = torch.empty(source.numel() // 8192, device="cuda")
    graph = capture(lambda _: _sum[(sums.numel(),)](source, sums, 8192), 4, 1)
    return source.nbytes / (replay({"read": graph}, repeats)["read"] / 4) / 1e3


@triton.jit
def _sum(source, sums, BLOCK: tl.constexpr) -> None:
    part = tl.load(source + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(part.to(tl.float32)))


def matmul_tflop_per_s(repeats: int) -> float:
    """Measure the product of two bfloat16 matrices of 8192 x 8192."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    graph = capture(lambda _: a @ b, 2, 1)
    return 2 * 8192**3 / (replay({"matmul": graph}, repeats)["matmul"] / 2) / 1e6


@functools.cache
def optional(module: str) -> ModuleType | None:
    """Return a module of somebody else's, or None, saying so, where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"without {module.partition('.')[0]}: {error}", file=sys.stderr)
        return None


@functools.cache
def describe_machine() -> tuple[str, str, str, str, str]:
    """Return the GPU, the versions of torch and Triton, the commit and the date."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git here
        commit = ""
    date = datetime.date.today().isoformat()
    name = torch.cuda.get_device_name()
    return name, torch.__version__, triton.__version__, commit or "unknown", date


def report(
    rows: Sequence[Row], ceilings: Ceilings, table: Path | None, plot: Path | None = None
) -> None:
    """Print the tables; write the CSV file and the plot."""
    print(", ".join(describe_machine()))
    print(f"copy {ceilings.copy_gb_per_s:.0f} GB/s, empty kernel {ceilings.empty_us:.2f} us")
    for field, unit, form in (("us", "us", ".2f"), ("gb_per_s", "GB/s", ".0f")):
        headers, lines = pivot(rows, field)
        if lines:
            print(f"\n{unit} by tokens, {rows[0].where}")
            print(tabulate(lines, headers, floatfmt=form, missingval="-"))
    if table:
        write_csv(rows, table)
    if plot:
        draw(rows, ceilings, plot)


def pivot(rows: Sequence[Row], field: str) -> tuple[list[str], list[list[object]]]:
    """Return headers and lines of a table of `field`: cases and variants down, tokens across."""
    values = {(row.case, row.variant, row.tokens): getattr(row, field) for row in rows}
    values = {key: value for key, value in values.items() if value is not None}
    tokens = sorted({key[2] for key in values})
    names = dict.fromkeys(key[:2] for key in values)
    table = [[*name, *(values.get((*name, count)) for count in tokens)] for name in names]
    return ["case", "variant", *map(str, tokens)], table


def write_csv(rows: Sequence[NamedTuple], path: Path) -> None:
    """Write measurements, a line each, below their fields' names."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def draw(rows: Sequence[Row], ceilings: Ceilings, path: Path) -> None:
    """Draw GB/s over tokens, a panel a case, with the bandwidth of a copy as the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(1, len(labels), figsize=(6 * len(labels), 4.5), squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        shown = [row for row in rows if row.case == label]
        for variant in dict.fromkeys(row.variant for row in shown):
            points = [(row.tokens, row.gb_per_s) for row in shown if row.variant == variant]
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.axhline(ceilings.copy_gb_per_s, color="black", linestyle="--", label="copy of 1 GB")
        axis.set(xscale="log", xlabel="tokens", ylabel="GB/s read and written", title=label)
        axis.legend()
    figure.suptitle(f"{rows[0].operator}, {rows[0].gpu}, {rows[0].where}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
