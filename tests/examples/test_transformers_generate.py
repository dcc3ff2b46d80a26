from __future__ import annotations

from pathlib import Path

import generate
import pytest
import torch
from llama import load_model

pytest.importorskip("transformers", reason="needs the extra [transformers]")

import transformers_generate

PROMPTS = ["def main(", "import os\nimport "]
NEW = 6


@pytest.mark.parametrize("cache", ["paged", "static"])
def test_the_own_model_gives_the_same_text_in_transformers(
    cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [prompt.encode() for prompt in PROMPTS]
    lengths = torch.tensor([len(prompt) + NEW for prompt in prompts])
    model = load_model(transformers_generate.OWN_WEIGHTS, torch.device("cpu"))
    table = generate.allocate_blocks(lengths, 16)
    model.allocate_cache(int(table.max()) + 1, 16)
    own = generate.generate(model, prompts, NEW, table, 16, torch.device("cpu")).tokens

    options = ["--max-new-tokens", str(NEW), "--device", "cpu", "--cache", cache]
    asked = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    transformers_generate.main([*asked, *options, "--compare", "sdpa"])
    printed = capsys.readouterr().out
    for prompt, tokens in zip(PROMPTS, own.tolist(), strict=True):
        assert prompt + bytes(tokens).decode() + "\n" in printed
    assert f"all {own.numel()} tokens equal those of sdpa" in printed


def test_any_folder_with_a_tokenizer_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    transformers_generate.export(transformers_generate.OWN_WEIGHTS, tmp_path)
    words = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!").save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--max-new-tokens", "3", "--device", "cpu", "--sample"]
    transformers_generate.main(
        [*options, "--prompt", "abc", "--prompt", "de", "--cache", "dynamic"]
    )
    printed = capsys.readouterr().out
    assert "--- 0 ---\nabc" in printed
    assert "tkv, dynamic cache: 6 tokens" in printed
