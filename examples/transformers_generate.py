"""Generate with a model of Hugging Face Transformers whose attention is torch_tkv's.

`python examples/transformers_generate.py --model FOLDER` takes any model folder with a tokenizer.
Without --model it exports the repository's own small model over bytes, and takes that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from generate import PROMPTS
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from torch_tkv.integrations.transformers import TkvCache

OWN_WEIGHTS = Path(__file__).parent / "stdlib-bytes"
# What Transformers calls the parts of the repository's own Llama.
NAMES = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
    "norm": "model.norm",
}


def export(weights: Path, folder: Path) -> None:
    """Write the repository's own model as a model of Transformers."""
    sizes = json.loads((weights / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["ffn_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_positions"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        rms_norm_eps=sizes["norm_eps"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).bfloat16()
    state = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): weight
        for name, weight in load_file(weights / "model.safetensors").items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder)


class Bytes:
    """The tokenizer of a model over bytes."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, Tensor]:
        rows = [list(text.encode()) for text in texts]
        longest = max(map(len, rows))
        padded = [[0] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    def batch_decode(self, tokens: Tensor, **_: object) -> list[str]:
        return [bytes(row).decode(errors="replace") for row in tokens.tolist()]


def load(
    folder: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, Any]:
    """Return the model in `folder`, or the repository's own, and its tokenizer."""
    options = {"dtype": dtype, "attn_implementation": "tkv", "local_files_only": True}
    if folder is None:
        with tempfile.TemporaryDirectory() as exported:
            export(OWN_WEIGHTS, Path(exported))
            model = AutoModelForCausalLM.from_pretrained(exported, **options)
        tokenizer: Any = Bytes()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="left", local_files_only=True
        )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def make_cache(kind: str, model: PreTrainedModel, batch_size: int, length: int) -> Any:
    """Return a cache for `length` tokens a sequence; None lets Transformers make its own."""
    if kind == "paged":
        return TkvCache(model, batch_size, length)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return None


def run(
    model: PreTrainedModel, inputs: dict[str, Tensor], args: argparse.Namespace
) -> tuple[Tensor, float]:
    """Return the new tokens [B, <= max_new_tokens] and the seconds it took."""
    batch_size, prompt = inputs["input_ids"].shape
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    tokens = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.sample,
        past_key_values=make_cache(args.cache, model, batch_size, prompt + args.max_new_tokens),
        # Transformers compiles on a GPU only, and with a cache of fixed addresses only.
        compile_config=CompileConfig(backend="tkv", mode="reduce-overhead", fullgraph=True)
        if args.cache != "dynamic" and model.device.type == "cuda"
        else None,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens[:, prompt:], time.perf_counter() - begin


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder; the repository's own if not given")
    parser.add_argument("--prompt", action="append", help="may be repeated: one batch of them all")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--sample", action="store_true", help="instead of the likeliest token")
    parser.add_argument("--cache", default="paged", choices=("paged", "static", "dynamic"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare", metavar="ATTENTION", help="generate with this one too, as sdpa or eager"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, tokenizer = load(args.model, torch.device(args.device), getattr(torch, args.dtype))
    prompts = args.prompt or PROMPTS
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs = {name: encoded[name].to(args.device) for name in ("input_ids", "attention_mask")}

    tokens, seconds = run(model, inputs, args)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        print(f"--- {number} ---\n{prompt}{text}\n")
    print(f"tkv, {args.cache} cache: {tokens.numel()} tokens in {seconds:.2f} s, all included")
    if args.compare:
        model.set_attn_implementation(args.compare)
        args.cache = "dynamic"
        expected, seconds = run(model, inputs, args)
        print(f"{args.compare}, dynamic cache: {seconds:.2f} s")
        if not torch.equal(tokens, expected):
            raise SystemExit(f"the tokens differ from those of {args.compare}")
        print(f"all {tokens.numel()} tokens equal those of {args.compare}")


if __name__ == "__main__":
    main()
