"""Models of Transformers with attn_implementation="tkv" against their own attention."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

pytest.importorskip("transformers", reason="needs the extra [transformers]")

from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

import torch_tkv.integrations.transformers as integration
from torch_tkv.integrations.transformers import TkvCache, attention, index_mask

VOCABULARY, BATCH, PROMPT, NEW, CAPACITY = 97, 3, 11, 14, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,  # wide, so that the likeliest token is far ahead of the next
    "pad_token_id": 0,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GEMMA2 = {"sliding_window": 7, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 9}
GPT_OSS = {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {name: SIZES[name] for name in ("vocab_size", "initializer_range", "eos_token_id")}
QWEN2_MOE = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), "sdpa"),
    "small": (LlamaForCausalLM, LlamaConfig(**SIZES | {"num_hidden_layers": 1}), "sdpa"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES), "sdpa"),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=7), "sdpa"),
    # A model of full and of sliding layers; the sdpa of Transformers knows no softcap.
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, **GEMMA2), "eager"),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig(**SIZES, **GPT_OSS), "eager"),  # with sinks
    # It tells the window to the mask, and not to the attention.
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES, **QWEN2_MOE), "sdpa"),
    # Its configuration names no number of KV heads.
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(**GPT2, n_embd=64, n_layer=2, n_head=4, pad_token_id=0),
        "sdpa",
    ),
}
needs_gpu = pytest.mark.gpu


@functools.cache
def make_model(name: str, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    model, config, _ = MODELS[name]
    made = model(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return made.to(device)


def with_attention(name: str, implementation: str | None, device: str = "cpu") -> PreTrainedModel:
    """Return the model with this attention, its own where it is None."""
    model = make_model(name, device)
    model.set_attn_implementation(implementation or MODELS[name][2])
    return model


def make_prompts(device: str = "cpu") -> dict[str, Tensor]:
    """Return prompts of 6, 11 and 10 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (BATCH, PROMPT), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[2, :1] = 0
    return {"input_ids": (tokens * mask).to(device), "attention_mask": mask.to(device)}


def make_cache(kind: str, model: PreTrainedModel, **options: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=CAPACITY)
    return TkvCache(model, BATCH, CAPACITY, **options)


def generate(model: PreTrainedModel, cache: str, *, sample: bool = False) -> Tensor:
    torch.manual_seed(1)
    return model.generate(
        **make_prompts(model.device),
        past_key_values=make_cache(cache, model),
        max_new_tokens=NEW,
        do_sample=sample,
    )[:, PROMPT:]


@functools.cache
def expected_tokens(name: str, sample: bool) -> Tensor:
    tokens = generate(with_attention(name, None), "dynamic", sample=sample)
    assert min(len(row.unique()) for row in tokens) > 2
    return tokens


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "small"])
def test_padded_prompts_are_continued_as_with_the_model_s_own_attention(
    name: str, cache: str, sample: bool
) -> None:
    expected = expected_tokens(name, sample)
    assert torch.equal(generate(with_attention(name, "tkv"), cache, sample=sample), expected)


@pytest.mark.parametrize("option", ["softcap", "scaling"])
def test_what_the_configuration_says_of_attention_is_heeded(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_option(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **(kwargs | {option: None}))

    model = with_attention("gemma2", "tkv")
    monkeypatch.setitem(integration.AttentionInterface._global_mapping, "tkv", without_option)
    assert not torch.equal(generate(model, "static"), expected_tokens("gemma2", False))


def step(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits of new tokens, whose positions follow from the mask of all so far."""
    positions = None
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    with torch.no_grad():
        return model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits


@pytest.mark.parametrize("cache", ["static", "paged"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prompt_may_come_in_chunks(name: str, cache: str) -> None:
    prompts = make_prompts()
    logits = {}
    for implementation, kind in ((None, "dynamic"), ("tkv", cache)):
        model = with_attention(name, implementation)
        past = make_cache(kind, model)
        for end in (4, 7, PROMPT, PROMPT + 1):  # the first sequence begins in the second chunk
            tokens = prompts["input_ids"].repeat(1, 2)[:, past.get_seq_length() : end]
            mask = torch.cat((prompts["attention_mask"], torch.ones(BATCH, 1).long()), 1)[:, :end]
            logits[kind, end] = step(model, past, tokens, mask)[mask[:, -tokens.shape[1] :] == 1]
    for (kind, end), rows in logits.items():
        torch.testing.assert_close(rows, logits["dynamic", end], rtol=1e-4, atol=1e-4, msg=kind)


@pytest.mark.parametrize("capacity", [PROMPT + 2, 256], ids=["blocks_of_1", "blocks_of_256"])
def test_without_a_mask_all_rows_begin_at_the_first_slot(capacity: int) -> None:
    tokens = make_prompts()["input_ids"]
    logits = []
    for implementation in (None, "tkv"):
        model = with_attention("llama", implementation)
        cache = StaticCache(config=model.config, max_cache_len=capacity)
        logits += [step(model, cache, tokens, None), step(model, cache, tokens[:, :1], None)]
    torch.testing.assert_close(logits[:2], logits[2:], rtol=1e-4, atol=1e-4)


def test_blocks_are_as_large_as_the_length_allows_where_nothing_is_padded() -> None:
    config = SimpleNamespace(num_key_value_heads=2)
    for length, block_size in ((512, 256), (2304, 256), (320, 64), (48, 16), (40, 1), (41, 1)):
        packed = index_mask(3, 1, length, 5, config=config)
        starts, lens, table = packed[0, 0].split((1, 1, length // block_size), 1)
        assert starts.flatten().tolist() == [0, 1, 2, 3]
        assert lens[:3].flatten().tolist() == [6, 6, 6]
        rows = torch.arange(3)[:, None] * (2 * length // block_size)
        assert torch.equal(table[:3].long(), rows + torch.arange(length // block_size))


def test_a_sequence_that_begins_in_a_later_chunk_has_no_keys() -> None:
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    packed = index_mask(2, 4, 16, **PLAIN, attention_mask=mask)
    assert packed[0, 0, :2, 1].tolist() == [0, 3]


def test_what_the_cache_holds_of_padding_and_beyond_the_length_is_never_read() -> None:
    prompts, model = make_prompts(), with_attention("llama", "tkv")
    mask = torch.cat((prompts["attention_mask"], torch.ones(BATCH, 1).long()), 1)
    logits = []
    for poison in (0.0, math.nan):
        cache = make_cache("static", model)
        step(model, cache, prompts["input_ids"], prompts["attention_mask"])
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                states[:, :, PROMPT:] = poison
                states.transpose(1, 2)[:, :PROMPT][prompts["attention_mask"] == 0] = poison
        logits.append(step(model, cache, prompts["input_ids"][:, -1:], mask))
    assert torch.equal(*logits)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, **options: Any
) -> Tensor:
    """Return softmax(scale q k^T) v [B, n, Hq, Dv] with a softcap and sinks, visible keys only."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    sinks = options["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["all_heads", "a_rank_s_heads"])
def test_sinks_softcap_and_window_meet_padding_and_an_offset(kv_heads: int) -> None:
    new, length, size, window = 3, 20, 16, 6
    offset, kv_offset = 15, 4  # a ring of the newest keys, whose first is of position 4
    query = torch.randn(BATCH, 4, new, size)
    key, value = torch.randn(BATCH, kv_heads, length, size), torch.randn(BATCH, kv_heads, length, 8)
    padding = torch.tensor([0, 6, 10])
    positions = torch.arange(offset + new)
    mask = positions >= padding[:, None]
    config = SimpleNamespace(num_key_value_heads=2, sliding_window=window)
    packed = index_mask(
        *(BATCH, new, length, offset, kv_offset),
        attention_mask=mask,
        local_size=window,
        config=config,
    )
    module, sinks = SimpleNamespace(config=config, is_causal=True), torch.randn(4)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": 2.0, "s_aux": sinks}
    got, weights = attention(module, query, key, value, packed, **options)

    key_position = torch.arange(length) + kv_offset
    query_position = offset + torch.arange(new)[:, None]
    visible = (key_position <= query_position) & (key_position > query_position - window)
    visible = visible & (key_position >= padding[:, None, None])
    expected = reference_attention(query, key, value, visible, 0.3, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert weights is None


def test_an_encoder_without_padding_attends_to_everything() -> None:
    query, key, value = torch.randn(3, BATCH, 2, 5, 16)
    config = SimpleNamespace(num_key_value_heads=2)
    module = SimpleNamespace(config=config, is_causal=False)
    assert index_mask(BATCH, 5, 5, config=config, allow_is_bidirectional_skip=True) is None
    got, _ = attention(module, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"layout": "HND", "block_size": 8}, 1e-4, id="HND"),
        pytest.param({"dtype": torch.int8, "scales": "token"}, 0.1, id="int8"),
        pytest.param({"dtype": torch.float8_e4m3fn, "scales": "head"}, 0.3, id="float8"),
    ],
)
def test_a_paged_cache_may_have_other_layouts_and_dtypes(options: Any, tolerance: float) -> None:
    prompts, model = make_prompts(), with_attention("llama", "tkv")
    logits = [
        step(model, cache, prompts["input_ids"], prompts["attention_mask"])[:, -1]
        for cache in (make_cache("paged", model), make_cache("paged", model, **options))
    ]
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert error < tolerance


def test_a_paged_cache_is_used_again_after_reset() -> None:
    prompts, model = make_prompts(), with_attention("llama", "tkv")
    cache = make_cache("paged", model)
    first = step(model, cache, *prompts.values())
    assert cache.get_seq_length() == PROMPT
    cache.reset()
    assert torch.equal(step(model, cache, *prompts.values()), first)


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_a_compiled_step_is_one_graph_and_generates_the_same(cache: str) -> None:
    torch.compiler.reset()
    prompts, model = make_prompts(), with_attention("small", "tkv")
    past, tokens, mask = make_cache(cache, model), *prompts.values()
    compiled = torch.compile(model, backend="tkv", fullgraph=True)
    logits, generated = step(model, past, tokens, mask), []
    for length in range(PROMPT + 1, PROMPT + 6):
        tokens = logits[:, -1:].argmax(-1)
        generated.append(tokens)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.sum(-1, keepdim=True) - 1
        with torch.no_grad():
            logits = compiled(
                input_ids=tokens,
                attention_mask=torch.nn.functional.pad(mask, (0, CAPACITY - length)),
                position_ids=positions,
                past_key_values=past,
            ).logits
    expected = expected_tokens("small", False)[:, : len(generated)]
    assert torch.equal(torch.cat(generated, 1), expected)


# How Transformers 5.17 and later ones call the tokens of a page.
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
CONTINUOUS = {"num_blocks": 40, PAGE_SIZE: 8, "max_batch_tokens": 24}
REQUESTS = (3, 19, 1, 30, 9)  # tokens of each prompt: one takes two steps, some share a step


def make_requests() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in REQUESTS]


def one_by_one(model: PreTrainedModel) -> list[list[int]]:
    return [
        model.generate(
            torch.tensor([request], device=model.device), max_new_tokens=NEW, do_sample=False
        )[0, len(request) :].tolist()
        for request in make_requests()
    ]


def continuous(model: PreTrainedModel, **options: Any) -> list[list[int]]:
    outputs = model.generate_batch(
        inputs=make_requests(),
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**CONTINUOUS, **options),
        progress_bar=False,
    )
    by_request = sorted(outputs.items(), key=lambda item: int(item[0].split("_")[-1]))
    return [output.generated_tokens for _, output in by_request]


@pytest.fixture
def known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say how much memory there is: Transformers asks psutil, which not everybody has."""
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda _: 2**30)


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "qwen2-moe"])
def test_continuous_batching_generates_what_single_requests_do(name: str) -> None:
    # Not compared with the model's own, since "paged|eager" leaves out the softcap of Gemma 2.
    expected = one_by_one(with_attention(name, None))
    model = with_attention(name, "tkv")
    assert continuous(model, use_cuda_graph=False) == expected
    assert model.config._attn_implementation == "tkv"


def test_registering_twice_changes_nothing() -> None:
    keep = ContinuousBatchingManager.switch_to_cb_friendly_attn
    integration.register()
    assert ContinuousBatchingManager.switch_to_cb_friendly_attn is keep


RIGHT = torch.tensor([[1, 1, 0]])
PLAIN = {"config": SimpleNamespace(num_key_value_heads=2, sliding_window=4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": RIGHT}, "attention_mask must be zeros, then ones: padding on the left"),
        ({"local_size": 8}, "the mask must be causal or a causal window, got chunks of 8"),
        ({"use_vmap": True}, "got one with a function of the model's own"),
        (
            {"attention_mask": RIGHT, "allow_is_bidirectional_skip": True},
            "attention_mask must be None for bidirectional attention",
        ),
        (
            {"local_size": 4, "allow_is_bidirectional_skip": True},
            "the mask must be causal where it is a window, got one of both sides",
        ),
        (
            {"attention_mask": RIGHT, "allow_is_causal_skip": False},
            "got one of more than the padding",
        ),
    ],
)
def test_a_mask_that_indices_cannot_say_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_mask(1, 3, 3, **PLAIN, **arguments)


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (None, {}, "attention_mask must be 2-D .* got None"),
        (torch.zeros(1, 1, 3, 3), {}, r"attention_mask must be 2-D .* got torch.float32 \(1, 1, 3"),
        (index_mask(1, 3, 4, **PLAIN), {}, "keys must be those of the mask"),
        (None, {"dropout": 0.1}, "dropout must be 0, got 0.1"),
        (None, {"output_attentions": True}, "output_attentions must be False, got True"),
        (None, {"position_bias": torch.zeros(1)}, "position_bias must be None, got a tensor"),
    ],
)
def test_attention_refuses_what_it_cannot_do(mask: Any, arguments: Any, message: str) -> None:
    module, states = SimpleNamespace(is_causal=True, **PLAIN), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=f'attn_implementation="tkv": {message}'):
        attention(module, states, states, states, mask, **arguments)


def test_packed_sequences_are_refused_outside_of_continuous_batching() -> None:
    model = with_attention("llama", "tkv")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="None where no sequences are packed"):
        model(torch.ones_like(positions), position_ids=positions, use_cache=False)


def test_a_paged_cache_refuses_what_it_cannot_do() -> None:
    model = with_attention("llama", None)
    with pytest.raises(ValueError, match=r"model must be one with attn_imp.* got 'sdpa'"):
        TkvCache(model, BATCH, CAPACITY)
    cache = make_cache("paged", with_attention("llama", "tkv"))
    with pytest.raises(ValueError, match="model must be one with attn_implementation"):
        step(with_attention("llama", "sdpa"), cache, *make_prompts().values())
    model = with_attention("llama", "tkv")
    linear = Qwen3Config(**SIZES, layer_types=["linear_attention"] * 2, attn_implementation="tkv")
    with pytest.raises(ValueError, match=r"one of full and sliding attention only, got \['linear"):
        TkvCache(SimpleNamespace(config=linear, device="cpu"), BATCH, CAPACITY)
    cache = make_cache("paged", model)
    with pytest.raises(ValueError, match=r"keys must be \[B=3, Hkv=2, n, D=16\], got \(1, 2, 1"):
        step(model, cache, torch.ones(1, 1).long(), None)
    with pytest.raises(ValueError, match="seq_lens must be at most the 64 keys"):
        step(model, make_cache("paged", model), torch.ones(BATCH, CAPACITY + 1).long(), None)
    beams = make_prompts() | {"input_ids": torch.ones(1, 2).long(), "attention_mask": None}
    with pytest.raises(NotImplementedError, match="beam search"):
        model.generate(**beams, past_key_values=cache, num_beams=BATCH, max_new_tokens=4)


@pytest.mark.usefixtures("known_memory")
def test_the_examples_of_the_documentation_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(page), "exec"), {})


@needs_gpu
@pytest.mark.parametrize(
    ("name", "cache"),
    # Not the static cache of a window: a ring of keys, which Transformers shifts by a copy.
    [(name, "paged") for name in ("llama", "qwen3", "mistral", "gemma2")] + [("qwen3", "static")],
)
@inductor_config.patch({"triton.cudagraph_or_error": True})
def test_generate_compiles_and_captures_a_step_on_a_gpu(name: str, cache: str) -> None:
    torch.compiler.reset()
    expected = generate(with_attention(name, None, "cuda"), "dynamic")
    model = with_attention(name, "tkv", "cuda")
    tokens = model.generate(
        **make_prompts("cuda"),
        past_key_values=make_cache(cache, model),
        max_new_tokens=NEW,
        do_sample=False,
        compile_config=CompileConfig(backend="tkv", fullgraph=True, mode="reduce-overhead"),
    )[:, PROMPT:]
    assert torch.equal(tokens, expected)


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuous_batching_is_captured_on_a_gpu(name: str) -> None:
    expected = one_by_one(with_attention(name, None, "cuda"))
    assert continuous(with_attention(name, "tkv", "cuda"), use_cuda_graph=True) == expected
