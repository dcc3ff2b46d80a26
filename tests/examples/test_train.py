from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import train
from llama import Llama, LlamaConfig, load_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "tests").mkdir(parents=True)
    for i in range(40):
        (folder / f"m{i}.py").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 20)
    (folder / "tests" / "test_m0.py").write_text("def test_function_0(): ...\n")
    return folder


def test_each_file_is_either_trained_on_or_held_out(source: Path) -> None:
    corpus = train.read_corpus(source, min_bytes=1)
    texts = [bytes(text.tolist()) for text in (corpus.train, corpus.validation)]
    assert corpus.num_files == 40
    for i in range(40):
        assert sum(b"def function_%d(" % i in text for text in texts) == 1
    assert not any(b"test_function_0" in text for text in texts)


def test_a_source_without_validation_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match="at least 1 are needed"):
        train.read_corpus(tmp_path, min_bytes=1)


def test_every_byte_is_predicted_once_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[int] = []

    def record(_: object, windows: torch.Tensor) -> torch.Tensor:
        targets.extend(windows[:, 1:].flatten().tolist())
        return windows[:, 1:].float().mean()

    monkeypatch.setattr(train, "next_byte_loss", record)
    text = torch.arange(33, dtype=torch.uint8)
    model = Llama(LlamaConfig(num_layers=1))
    assert train.evaluate(model, text, seq_len=4, batch_size=3) == pytest.approx(16.5)
    assert targets == list(range(1, 33))


def test_saved_weights_reproduce_the_stated_validation_loss(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--steps", "2", "--batch-size", "2", "--seq-len", "32", "--device", "cpu"]
    train.main([*sizes, "--source", str(source), "--out", str(out)])

    model = load_model(out, torch.device("cpu"))
    text = train.read_corpus(source, min_bytes=33).validation
    nats = train.evaluate(model, text, seq_len=32)
    stated = re.search(
        r"validation text.*\| ([\d.]+) \| ([\d.]+) \|", (out / "README.md").read_text()
    )
    assert stated is not None
    assert float(stated[1]) == pytest.approx(nats, abs=1e-3)
    assert float(stated[2]) == pytest.approx(nats / math.log(2), abs=1e-3)
    assert nats < math.log(256)
