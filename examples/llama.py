"""A small Llama over bytes: trained on whole windows, run over a paged KV cache.

T tokens, B sequences, Hq query heads, Hkv KV heads, D head size, N blocks of P slots.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torch_tkv


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model; the defaults make 3.7 million parameters."""

    vocab_size: int = 256
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 576
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Batch(NamedTuple):
    """Where the tokens of one step lie in their sequences and in the cache."""

    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    block_table: Tensor  # [B, max_blocks] int32
    seq_lens: Tensor  # [B] int32, keys in the cache after this step's writes
    query_start_loc: Tensor  # [B + 1] int32

    @classmethod
    def ragged(
        cls, context_lens: Tensor, query_lens: Tensor, block_table: Tensor, block_size: int
    ) -> Batch:
        """Append `query_lens[b]` tokens to each sequence that holds `context_lens[b]` already."""
        query_start_loc = F.pad(query_lens.cumsum(0), (1, 0))
        sequence = torch.repeat_interleave(query_lens)  # [T]
        offset = torch.arange(len(sequence)) - query_start_loc[sequence]
        positions = context_lens[sequence] + offset
        blocks = block_table[sequence, positions // block_size]
        return cls(
            positions,
            blocks.long() * block_size + positions % block_size,
            block_table,
            (context_lens + query_lens).int(),
            query_start_loc.int(),
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(*(index.to(device) for index in self))


def rope_table(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [max_positions, D] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # cos and sin are float32, so a 16-bit x is rotated in float32 and rounded once.
    return (x * cos + rotate_half(x) * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    k_cache: Tensor  # [N, P, Hkv, D]
    v_cache: Tensor  # [N, P, Hkv, D]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        # Buffers, because torch.compile takes their addresses as fixed: CUDA graphs need no copy.
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        weight = self.k_proj.weight.detach()
        self.register_buffer("k_cache", weight.new_zeros(shape), persistent=False)
        self.register_buffer("v_cache", weight.new_zeros(shape), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch | None) -> Tensor:
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = causal_attention(q, k, v) if batch is None else self.cached_attention(q, k, v, batch)
        return self.o_proj(out.flatten(-2))

    def cached_attention(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Write k and v [T, Hkv, D] to their slots, then attend to the cache from q [T, Hq, D]."""
        block_size = self.k_cache.shape[1]
        block, offset = batch.slot_mapping // block_size, batch.slot_mapping % block_size
        self.k_cache[block, offset] = k
        self.v_cache[block, offset] = v
        return torch_tkv.paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
        )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within each window: q [B, T, Hq, D], k and v [B, T, Hkv, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, batch)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """Byte-level language model; the embedding is also the output projection."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # The residual stream sums 2 * num_layers projections, so each starts smaller.
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Give every layer a zeroed cache of `num_blocks` blocks."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.allocate_cache(num_blocks, block_size)

    def forward(self, tokens: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the logits of every next byte.

        Args:
            tokens: int64 [B, T] windows without a batch; [T], all sequences in a row, with one.
            batch: where the tokens belong; `allocate_cache` comes first.

        Returns:
            [..., vocab_size], one row per token.
        """
        if batch is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        else:
            positions = batch.positions
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, batch)
        return F.linear(self.norm(x), self.embedding.weight)


def save_model(model: Llama, folder: Path) -> None:
    """Write `config.json` and the weights, rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Llama:
    """Read what `save_model` wrote."""
    model = Llama(LlamaConfig(**json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    # Assigned, not cast with Module.to: the RoPE table stays float32 whatever the weights are.
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.to(device).eval()
