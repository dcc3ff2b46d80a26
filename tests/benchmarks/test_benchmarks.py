"""What the benchmarks compute, on the CPU where there is no GPU; what they measure needs one."""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate", reason="needs the extra [bench]")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_is_imported_without_a_gpu(module: str) -> None:
    assert importlib.import_module(module).__doc__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", sorted({*MODULES} - {"harness", "inputs"}))
def test_without_a_gpu_a_benchmark_says_so_in_one_sentence(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module}.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / f"{module}.py"), run_name="__main__")
    says = "The benchmarks measure a CUDA or ROCm GPU, and torch sees none."
    assert stopped.value.code == says  # which Python prints to stderr, and exits with 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("module", "dtypes", "size"),
    [
        ("reshape_and_cache", (BF16, BF16), 4 * 65536 * 8 * 128 * 2),
        ("reshape_and_cache", (BF16, FP8), 3 * 65536 * 8 * 128 * 2),
        ("rope_reshape_and_cache", (BF16, BF16), (4 * 8 + 2 * 32) * 65536 * 128 * 2),
        ("concat_and_cache_mla", (BF16, BF16), 2 * 65536 * 576 * 2),
        ("gather_cache", (BF16, BF16), 4 * 65536 * 8 * 128 * 2),
        ("gather_cache", (FP8, BF16), 3 * 65536 * 8 * 128 * 2),
        ("reshape_and_cache_dynamic", (BF16, torch.int8), 2 * 65536 * 8 * (128 * 3 + 4)),
        ("rotary_embedding", (BF16,), 2 * (32 + 8) * 65536 * 128 * 2),
        ("merge_attention_states", (BF16,), 3 * 65536 * 32 * (128 * 2 + 4)),
        ("copy_blocks", (BF16,), 4 * 65536 * 8 * 128 * 2),
        ("copy_blocks", (BF16, 8), 8 * 4 * 65536 * 8 * 128 * 2),
    ],
)
def test_bytes_are_counted_once_read_and_once_written(module, dtypes, size) -> None:
    assert importlib.import_module(module).count_bytes(65536, *dtypes) == size


def make_operator_cases(module: str, tokens: int, sets: int) -> list:
    options = {
        "layouts": ["NHD", "HND"],
        "dtypes": ["int8", "fp8"] if module == "reshape_and_cache_dynamic" else ["bf16", "fp8"],
        "forms": ["rope", "qk_norm"],
        "slots": ["pages", "random"],
        "kv_dims": [0, 1, -1],
        "layers": [1, 3],
        "near": None,
    }
    make_cases = importlib.import_module(module).make_cases
    return list(make_cases(tokens, sets, argparse.Namespace(**options)))


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize(
    "module",
    [
        "concat_and_cache_mla",
        "copy_blocks",
        "gather_cache",
        "merge_attention_states",
        "reshape_and_cache",
        "reshape_and_cache_dynamic",
        "reshape_and_cache_head_major",
        "reshape_and_cache_packed",
        "rope_reshape_and_cache",
        "rotary_embedding",
    ],
)
def test_every_way_to_do_an_operation_gives_what_is_expected(
    module: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("inputs"), "MIN_BLOCKS", 8)
    check = importlib.import_module("harness").check
    cases = make_operator_cases(module, tokens, sets=2)
    assert len({case.label for case in cases}) == len(cases)

    def other_set(call: Callable) -> Callable:
        return lambda _: call(1)

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for case in cases:
            for name, call in case.calls.items():
                check(name, call, case)
                with pytest.raises(SystemExit, match=f"is wrong for {case.label}, {tokens} tokens"):
                    check(name, other_set(call), case)
            for call in case.copies.values():
                targets = call(1)
                if not case.label.endswith(("fp8", "int8")):  # which are read as another dtype
                    moved = 2 * sum(target.nbytes for target in targets)
                    assert 0.98 * case.bytes < moved <= case.bytes


def test_slots_are_each_used_once_and_random_ones_in_no_order() -> None:
    inputs = importlib.import_module("inputs")
    for make_slots in (inputs.make_slots, inputs.make_random_slots):
        for tokens, sets in ((1, 20), (33, 2), (1000, 3), (65536, 2)):
            num_blocks, slots = make_slots(tokens, sets)
            assert [len(s) for s in slots] == [tokens] * sets
            used = torch.cat(slots)
            assert len(used.unique()) == tokens * sets
            assert used.min() >= 0
            assert used.max() < num_blocks * 16
    follow = (slots[0].diff() == 1).float().mean()
    assert follow < 0.01


def test_near_pages_are_permuted_among_neighbours_only() -> None:
    inputs = importlib.import_module("inputs")
    _, (slots,) = inputs.make_slots(65536, 1, near=64)
    pages = slots[::16] // 16
    assert torch.equal(pages // 64, torch.arange(4096) // 64)
    assert not torch.equal(pages, torch.arange(4096))
    assert torch.equal(inputs.make_slots(65536, 1, near=1)[1][0], torch.arange(65536))


def test_a_progress_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = importlib.import_module("harness")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with harness.progress([1, 2], unit="size") as sizes:
            for size in sizes:
                sizes.set_postfix_str(f"{size} tokens")
        assert bool(stream.getvalue()) == shown


def make_rows() -> list:
    row = importlib.import_module("harness").Row
    machine = ("H200, a GPU", "2.13", "3.7", "abc", "2026-11-21")
    return [
        row("write", "NHD", "tkv", 64, "warm L2", 1.5, 400.0, 0.1, *machine),
        row("write", "NHD", "tkv", 1, "warm L2", 1.25, 6.5, 0.002, *machine),
        row("write", "NHD", "inductor", 64, "warm L2", 1.75, None, None, *machine),
    ]


def test_a_table_has_cases_and_variants_down_and_tokens_across() -> None:
    headers, table = importlib.import_module("harness").pivot(make_rows(), "us")
    assert headers == ["case", "variant", "1", "64"]
    assert table == [["NHD", "tkv", 1.25, 1.5], ["NHD", "inductor", None, 1.75]]
    headers, table = importlib.import_module("harness").pivot(make_rows(), "gb_per_s")
    assert table == [["NHD", "tkv", 6.5, 400.0]]


def test_a_csv_file_gives_back_the_rows(tmp_path: Path) -> None:
    harness, rows, path = importlib.import_module("harness"), make_rows(), tmp_path / "rows.csv"
    harness.write_csv(rows, path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        assert line == {key: "" if v is None else str(v) for key, v in row._asdict().items()}


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    harness = importlib.import_module("harness")
    harness.draw(make_rows()[:2], harness.Ceilings(4000.0, 0.5), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_short_calls_go_many_to_a_graph_and_long_ones_few() -> None:
    counts = [
        importlib.import_module("harness").calls_per_graph(t) for t in (1, 1024, 16384, 65536)
    ]
    assert counts == [20, 20, 8, 2]


def test_variants_are_chosen_by_how_their_names_start() -> None:
    chosen = importlib.import_module("harness").chosen
    assert chosen("inductor view", None)
    assert chosen("inductor view", ["tkv", "inductor"])
    assert not chosen("vllm", ["tkv", "inductor"])


def test_sequences_are_cut_from_all_pages_and_their_table_lists_them_in_order() -> None:
    gather = importlib.import_module("gather_cache")
    for pages in (1, 2, 40, 4096):
        cuts = gather.cut(pages)
        assert cuts == sorted(set(cuts))
        assert (cuts[0], cuts[-1]) == (0, pages)
        order = torch.randperm(pages, dtype=torch.int32)
        table = gather.make_table(order, cuts)
        assert table.shape[0] == min(pages, gather.MAX_SEQUENCES)
        assert torch.equal(table[table >= 0], order)


def test_attention_counts_the_keys_and_the_pairs_that_are_seen() -> None:
    attention = importlib.import_module("paged_attention")
    cases = {case.label: case for case in attention.make_cases()}
    assert len(cases) == len(attention.make_cases())
    decode = cases["decode: 32 x 4096"]
    assert decode.bytes == 32 * 4096 * 2 * 8 * 128 * 2
    assert decode.flops == 4 * 32 * 4096 * 32 * 128
    assert cases["float8 cache: 32 x 4096"].bytes == decode.bytes / 2
    assert cases["window: 8 x 65536 of 4096"].bytes == cases["window: 8 x 4096 without"].bytes
    prompt = cases["prefill over length: 1 x 16384"]
    assert prompt.flops == 4 * (16384 * 16385 // 2) * 32 * 128


def small_attention_cases() -> list:
    attention = importlib.import_module("paged_attention")
    few = {"heads": (4, 2), "head_size": 16}
    return [
        attention.even("decode", 3, 100, **few),
        attention.even("float8", 2, 100, cache_dtype=FP8, **few),
        attention.even("window", 2, 100, window=21, **few),
        attention.even("drafts", 2, 100, 4, padding=3, **few),
        attention.even("prompt", 1, 90, 90, **few),
        attention.Case("mixed", "", [100, 20, 20], [1, 20, 20], **few),
    ]


@pytest.mark.parametrize("case", small_attention_cases(), ids=lambda case: case.family)
@pytest.mark.parametrize("variant", ["tkv", "sdpa"])
def test_a_variant_of_attention_gives_what_is_expected(variant: str, case) -> None:
    attention = importlib.import_module("paged_attention")
    inputs = attention.make_inputs(case, 2, device="cpu")
    expected = attention.make_expected(case, inputs, chunk=16)
    call = getattr(attention, variant)(case, inputs)
    attention.check(variant, case, call(0), expected)
    with pytest.raises(SystemExit, match=f"{variant} is wrong for {case.family}"):
        attention.check(variant, case, call(1), expected)


def test_calls_of_attention_take_turns_over_more_than_the_cache() -> None:
    attention = importlib.import_module("paged_attention")
    for case in attention.make_cases():
        sets, count = attention.rotation(case)
        assert 1 <= sets <= count <= attention.MAX_SETS
        assert count >= 2
    assert attention.rotation(attention.even("decode", 1, 1024)) == (24, 24)


def test_plots_of_attention_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [bench]")
    attention = importlib.import_module("paged_attention")
    machine = ("H200, a GPU", "2.13", "3.7", "abc", "2026-11-21")
    rows = [
        attention.Row("paged_attention", family, "", "tkv", context, 9.0, 4.0, 600.0, 0.9, *machine)
        for family in (attention.DECODE, attention.PREFILL, "ragged")
        for context in (512, 1024)
    ]
    attention.draw(rows, attention.Ceilings(4.5, 700.0), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    importlib.import_module("harness").write_csv(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().startswith("operator,family,case,variant,context,us")
