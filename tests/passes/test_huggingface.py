"""Unmodified models of Hugging Face: every layer is one operator, and the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiled import post_grad_only
from torch import Tensor
from torch._inductor import config

import torch_tkv  # noqa: F401 - registers the backend
from torch_tkv.passes.pipeline import Pipeline
from torch_tkv.passes.report import report

transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")

PROMPT, STEPS, CACHE_LENGTH, HEADS, HEAD_SIZE = 5, 16, 24, 2, 16
WRITE, ROPE, NORMED = "cache write", "RoPE + cache write", "QK norm + RoPE + cache write"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8}
GEMMA3N = {
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "sliding_window": 32,
    "vocab_size_per_layer_input": 97,
}
# What a configuration says beyond sizes, and what becomes one operator.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, ROPE),
    "qwen2": ({}, ROPE),
    "qwen3": ({}, NORMED),
    "mistral": ({"sliding_window": 32}, ROPE),
    "gemma2": ({"sliding_window": 32, "query_pre_attn_scalar": HEAD_SIZE}, ROPE),
    "gemma3_text": ({"sliding_window": 32, "query_pre_attn_scalar": HEAD_SIZE}, NORMED),
    "glm": ({"pad_token_id": 0}, ROPE),  # half of each head, interleaved
    "gptj": ({"rotary_dim": 8}, ROPE),  # from a table, each column repeated
    "gpt_neox": ({}, ROPE),  # a quarter of each head, of one projection with q, k, v of a head
    "cohere": ({"pad_token_id": 0}, ROPE),  # in float32, cos and sin repeated in the table
    "gpt_oss": ({"sliding_window": 32, "pad_token_id": 0, **EXPERTS}, ROPE),  # cos of half width
    "llama4_text": ({"use_qk_norm": False, **EXPERTS}, ROPE),  # complex numbers
    "gemma3n_text": (GEMMA3N, NORMED),  # by a power instead of a reciprocal root
}
# What stays apart, and why.
APART: dict[str, tuple[dict[str, Any], str]] = {
    "exaone4": ({"layer_types": ["full_attention"] * 2, "sliding_window": 32}, "norm apart: "),
    "hunyuan_v1_dense": ({}, "RoPE apart: the key is changed after its rotation"),
    "deepseek_v2": ({**LATENT, "first_k_dense_replace": 2}, "norm apart: "),
}


def make_model(name: str, layers: int = 2) -> torch.nn.Module:
    extra, _ = (MODELS | APART)[name]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 64,
    }
    model_config = transformers.AutoConfig.for_model(name, **(sizes | extra))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(model_config).eval()


def generate(
    model: torch.nn.Module, prefill: Callable[..., Any], decode: Callable[..., Any]
) -> Any:
    """Return the logits of a prefill and of greedy steps, with a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    tokens = torch.arange(1, 1 + PROMPT)[None]
    model(input_ids=tokens, past_key_values=cache, use_cache=True)  # makes the tensors of the cache
    cache.reset()
    logits = []
    for step in range(1 + STEPS):
        forward = decode if step else prefill
        out = forward(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)


def check(name: str) -> list[dict[str, Any]]:
    """Require equal logits of two graphs, one of the prefill and one of all steps.

    Returns:
        What is reported of the two layers; it is the same of both graphs.
    """
    model = make_model(name)
    graphs: list[int] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(len(gm.graph.nodes))
        return post_grad_only(gm, inputs)

    expected = generate(model, model, model)
    with config.patch(post_grad_custom_post_pass=Pipeline()):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        logits = generate(model, compiled, compiled)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert len(graphs) == 2
    (graph,) = report().as_dict()["graphs"]
    assert graph["count"] == len(graph["layers"]) == 2
    return list(graph["layers"])


@pytest.mark.parametrize("name", MODELS)
def test_rope_and_write_of_every_layer_are_one_operator(name: str) -> None:
    _, kind = MODELS[name]
    assert [(layer["fused"], layer["reason"]) for layer in check(name)] == [(kind, None)] * 2


@pytest.mark.parametrize("name", APART)
def test_what_operators_do_not_do_stays_in_front_of_the_write(name: str) -> None:
    _, reason = APART[name]
    for layer in check(name):
        assert layer["fused"] == WRITE
        assert layer["reason"].startswith(reason)


def test_the_backend_decodes_the_same_tokens() -> None:
    model = make_model("qwen3", layers=1)
    expected = generate(model, model, model)
    logits = generate(model, model, torch.compile(model, fullgraph=True, backend="tkv"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert report().as_dict()["kinds"] == {NORMED: 1}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_on_a_gpu_rope_and_write_of_a_layer_are_one_kernel(name: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = make_model(name, layers=2).to("cuda", torch.bfloat16)
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    cache.early_initialization(1, HEADS, HEAD_SIZE, torch.bfloat16, torch.device("cuda"))
    tokens = torch.arange(1, 1 + PROMPT, device="cuda")[None]

    def step(model: Callable[..., Any], tokens: Tensor) -> None:
        model(input_ids=tokens, past_key_values=cache, use_cache=True)

    step(model, tokens)
    kernels: dict[str, list[str]] = {}
    for backend in ("inductor", "tkv"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        for _ in range(3):
            step(compiled, tokens[:, :1])
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            step(compiled, tokens[:, :1])
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        kernels[backend] = [e.name for e in prof.events() if e.device_type == on_gpu]
    assert sum("rope_reshape_and_cache" in kernel for kernel in kernels["tkv"]) == 2
    assert not any("index_put" in kernel for kernel in kernels["tkv"])
    assert len(kernels["tkv"]) < len(kernels["inductor"])
