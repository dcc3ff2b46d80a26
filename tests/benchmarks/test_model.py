"""The benchmark of a whole model, on a CPU with a tiny one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate", reason="needs the extra [bench]")
pytest.importorskip("transformers", reason="needs the extra [transformers]")

import model
from model import Size

TINY = ["--device", "cpu", "--model", "tiny", "--dtype", "float32", "--repeats", "1"]
FAST = [*TINY, "--rows", "2x24x48", "--no-compile"]


@pytest.mark.parametrize(
    ("row", "ms"),
    [
        ("1x1024x2048", 3.44),
        ("1x16384x17408", 3.90),
        ("16x4096x4608", 5.36),
        ("64x2048x2304", 7.32),
    ],
)
def test_the_limit_counts_weights_and_the_keys_of_the_context(row: str, ms: float) -> None:
    llama = model.make_model("llama-3.1-8b", torch.device("meta"), torch.bfloat16)
    at_4_4_tb_per_s = model.step_bytes(llama, Size.parse(row)) / 4.4e9
    assert at_4_4_tb_per_s == pytest.approx(ms, abs=0.01)


def test_layers_with_a_window_count_the_keys_within_it() -> None:
    tiny = model.make_model("tiny", torch.device("meta"), torch.float32)
    row = 2 * 2 * 16 * 4  # K and V, heads, head size, bytes
    within, beyond = (model.step_bytes(tiny, Size(3, context, 99)) for context in (16, 20))
    assert beyond - within == 3 * 4 * row  # of the one layer without a window


def test_every_variant_is_checked_measured_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, plot = tmp_path / "model.csv", tmp_path / "model.png"
    model.main([*FAST, "--csv", str(table), "--plot", str(plot)])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [(row["phase"], row["variant"]) for row in rows]
    prompts = [name for name in model.VARIANTS if name != "static, tkv backend"]
    assert measured == [
        *(("decode", name) for name in model.VARIANTS),
        *(("prefill", name) for name in prompts),
    ]
    for row in rows:
        tokens = 2 if row["phase"] == "decode" else 48
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / float(row["ms"]) * 1e3)
        assert (row["share_of_limit"] == "") == (row["phase"] == "prefill")
    assert "tiny, decode" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_variant_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = model.fill

    def fill_wrongly(cache: object, *args: object) -> None:
        fill(cache, *args)
        if hasattr(cache, "paged"):
            cache.paged.layer(0).key_cache.zero_()

    monkeypatch.setattr(model, "fill", fill_wrongly)
    with pytest.raises(SystemExit, match=r"paged, decode of .* is wrong: its logits are off by"):
        model.main([*FAST, "--only", "paged"])


def test_a_cache_without_room_for_the_steps_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        model.main([*TINY, "--rows", "2x24x30"])
    assert "a cache needs room for 11 tokens more" in capsys.readouterr().err
