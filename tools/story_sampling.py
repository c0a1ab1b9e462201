"""Fast batched sampling from small Llama checkpoints, on one CPU thread.

`transformers.generate` spends most of its time outside the matrix products when a
model has fewer than a million weights. `LlamaSampler` copies the weights of a
`LlamaForCausalLM` into a flat loop with a preallocated key-value cache; rows that
have finished are dropped from the batch. Its greedy output equals the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

KeyValue = tuple[Tensor, Tensor]
COMPACT_EVERY = 16  # steps between removals of finished rows; copying the cache costs time


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer, with q/k/v and gate/up fused."""

    norm_in: Tensor
    qkv: Tensor
    out: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor


def _fuse(layer: torch.nn.Module) -> _Layer:
    attn, mlp = layer.self_attn, layer.mlp
    return _Layer(
        norm_in=layer.input_layernorm.weight.detach(),
        qkv=torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]).detach(),
        out=attn.o_proj.weight.detach(),
        norm_mlp=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
        down=mlp.down_proj.weight.detach(),
    )


class LlamaSampler:
    """One-token-at-a-time forward pass of a Llama checkpoint.

    Weights are fused copies: a sampler does not see later updates of `model`.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Copy the weights of `model` and tabulate its rotary angles."""
        cfg = model.config
        self.heads, self.kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.head_dim or cfg.hidden_size // cfg.num_attention_heads
        self.eps, self.max_positions = cfg.rms_norm_eps, cfg.max_position_embeddings
        self.embed = model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.layers = [_fuse(layer) for layer in model.model.layers]
        theta = cfg.rope_parameters["rope_theta"]
        inv = theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle = torch.outer(torch.arange(self.max_positions).float(), inv)
        self.cos = torch.cat([angle.cos()] * 2, -1)
        self.sin = torch.cat([angle.sin()] * 2, -1)

    def new_cache(self, rows: int, length: int) -> list[KeyValue]:
        """Zeroed keys `[row, kv_head, dim, position]` and values `[..., position, dim]`."""
        heads, dim = self.kv_heads, self.head_dim
        # Keys are kept transposed: a quarter less time in the batched products.
        return [(torch.zeros(rows, heads, dim, length), torch.zeros(rows, heads, length, dim)) for _ in self.layers]

    def _attend(self, x: Tensor, layer: _Layer, cache: KeyValue, pos: int) -> Tensor:
        rows, dim, n_q, n_kv = len(x), self.head_dim, self.heads, self.kv_heads
        qkv = F.linear(x, layer.qkv).view(rows, n_q + 2 * n_kv, dim)
        rot = qkv[:, : n_q + n_kv]
        half = torch.cat([-rot[..., dim // 2 :], rot[..., : dim // 2]], -1)
        rot = rot * self.cos[pos] + half * self.sin[pos]
        keys, values = cache
        keys[..., pos] = rot[:, n_q:]
        values[:, :, pos] = qkv[:, n_q + n_kv :]
        query = rot[:, :n_q].reshape(rows, n_kv, n_q // n_kv, dim) * dim**-0.5
        weights = torch.softmax(query @ keys[..., : pos + 1], -1)
        mixed = weights @ values[:, :, : pos + 1]
        return F.linear(mixed.reshape(rows, n_q * dim), layer.out)

    def step(self, tokens: Tensor, cache: list[KeyValue], pos: int) -> Tensor:
        """Logits `[row, vocab]` after `tokens` `[row]` at position `pos`; extends `cache`."""
        x = self.embed[tokens]
        width = (x.shape[-1],)
        for layer, kv in zip(self.layers, cache, strict=True):
            x = x + self._attend(F.rms_norm(x, width, layer.norm_in, self.eps), layer, kv, pos)
            hidden = F.rms_norm(x, width, layer.norm_mlp, self.eps)
            gate, up = F.linear(hidden, layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.linear(F.rms_norm(x, width, self.norm, self.eps), self.head)


def _draw(logits: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # Gumbel-max: argmax(logits/T - log(E)), E ~ Exp(1), is a draw from the softmax.
    noise = torch.empty_like(logits).exponential_(generator=rng)
    return (logits / temperature - noise.log()).argmax(-1)


@torch.inference_mode()
def generate(
    sampler: LlamaSampler,
    prompts: list[list[int]],
    *,
    stop_id: int,
    max_new: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Continue each prompt until `stop_id`, `max_new` tokens or the last position.

    Prompts (token ids, BOS included) may differ in length: rows are left-aligned and a
    row's own prompt tokens are forced before its first draw. Returns the new tokens of
    each row, `stop_id` included where it was drawn.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    limit = min(sampler.max_positions, int(lengths.max()) + max_new)
    tokens = torch.zeros(len(prompts), limit, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ends = (lengths + max_new).clamp(max=limit)
    rng = torch.Generator().manual_seed(seed)
    live, cache = torch.arange(len(prompts)), sampler.new_cache(len(prompts), limit)
    stopped = torch.zeros(len(prompts), dtype=torch.bool)
    for pos in range(limit - 1):
        drawn = _draw(sampler.step(tokens[live, pos], cache, pos), temperature, rng)
        free = (pos + 1 >= lengths[live]) & ~stopped[live]
        tokens[live, pos + 1] = torch.where(free, drawn, tokens[live, pos + 1])
        over = free & ((drawn == stop_id) | (pos + 2 >= ends[live]))
        ends[live] = torch.where(over, pos + 2, ends[live])
        stopped[live] |= over
        if pos % COMPACT_EVERY == COMPACT_EVERY - 1 and stopped[live].any():
            keep = (~stopped[live]).nonzero()[:, 0]
            live, cache = live[keep], [(k[keep], v[keep]) for k, v in cache]
        if not len(live):
            break
    return [tokens[i, lengths[i] : ends[i]].tolist() for i in range(len(prompts))]
