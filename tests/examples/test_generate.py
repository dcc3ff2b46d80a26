from __future__ import annotations

import generate
import pytest
import torch
from llama import Batch, Llama, LlamaConfig

CONFIG = LlamaConfig(
    dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, max_positions=32
)
BLOCK_SIZE = 4
SEQ_LEN = 19


def make_model() -> Llama:
    model = Llama(CONFIG)
    for parameter in model.parameters():
        # Wider than the initial weights, so that attention is far from uniform.
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([[1, 6, 15], *([[1, 1, 1]] * 4)], id="prefill_then_decode"),
        pytest.param([[5, 1, 3], [2, 9, 1], [1, 1, 13], [11, 8, 2]], id="chunked_prefill"),
    ],
)
@torch.no_grad()
def test_cached_forward_equals_training_forward(chunks: list[list[int]]) -> None:
    torch.manual_seed(0)
    model = make_model()
    windows = torch.randint(CONFIG.vocab_size, (3, SEQ_LEN))
    expected = model(windows)

    block_table = generate.allocate_blocks(torch.full((3,), SEQ_LEN), BLOCK_SIZE)
    model.allocate_cache(block_table.numel(), BLOCK_SIZE)
    for name, cache in model.named_buffers():
        if name.endswith("_cache"):
            cache.fill_(float("nan"))  # no slot may be read before it is written
    context = torch.zeros(3, dtype=torch.int64)
    for chunk in chunks:
        query_lens = torch.tensor(chunk)
        spans = [slice(c, c + q) for c, q in zip(context.tolist(), chunk, strict=True)]
        batch = Batch.ragged(context, query_lens, block_table, BLOCK_SIZE)
        tokens = torch.cat([window[span] for window, span in zip(windows, spans, strict=True)])
        rows = torch.cat([logits[span] for logits, span in zip(expected, spans, strict=True)])
        torch.testing.assert_close(model(tokens, batch), rows, rtol=1e-4, atol=1e-4)
        context += query_lens


def test_an_advanced_batch_equals_one_built_anew() -> None:
    lengths, ones = torch.tensor([3, 4, 9]), torch.ones(3, dtype=torch.int64)
    block_table = generate.allocate_blocks(lengths + 6, BLOCK_SIZE)
    batch = Batch.ragged(lengths, ones, block_table, BLOCK_SIZE)
    for step in range(1, 6):
        generate.advance(batch, BLOCK_SIZE)
        anew = Batch.ragged(lengths + step, ones, block_table, BLOCK_SIZE)
        for name, expected in anew._asdict().items():
            assert torch.equal(getattr(batch, name), expected), name


def test_no_two_tokens_share_a_slot() -> None:
    lengths = torch.tensor([1, 4, 5, 11])
    block_table = generate.allocate_blocks(lengths, BLOCK_SIZE)
    slots = Batch.ragged(torch.zeros_like(lengths), lengths, block_table, BLOCK_SIZE).slot_mapping
    assert len(slots.unique()) == lengths.sum()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_generation_equals_eager(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "def main(", "--prompt", "import os\nimport "]
    generate.main([*prompts, "--max-new-tokens", "6", "--device", device])
    printed = capsys.readouterr().out
    assert "def main(" in printed
    assert "all 12 tokens equal the uncompiled model's" in printed


def test_generation_fails_when_the_compiled_model_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(model: Llama, **_: object) -> generate.Model:
        return lambda tokens, batch: -model(tokens, batch)

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(SystemExit, match="tokens differ"):
        generate.main(["--prompt", "def main(", "--max-new-tokens", "2", "--device", "cpu"])


def test_generation_refuses_more_positions_than_the_model_has() -> None:
    with pytest.raises(SystemExit, match="exceed 1024 bytes"):
        generate.main(["--prompt", "x", "--max-new-tokens", "1024", "--device", "cpu"])
