"""One decoding step of a Llama-type model in a third of the operations.

A small model's step takes longer to start its operations than to compute them. Here a layer is 15 operations instead
of about 45: the projections of queries, keys and values are one product, as are those of gate and up; norm weights
are part of the product that follows; sums with the residual are part of the product before; and the rotary turn is
one product of complex numbers, for which the widths of queries and keys are laid in pairs.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    Cache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from prefloop.models.decoding import DECODING_ATTENTION, RoomyLayer, decoding_cache

RECOGNISED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Classes of models that `lean_step` writes a step for."""
LARGEST = 2**23
"""Parameters up to which a step is lean: the copies of the weights take at most 32 MiB. The products of larger models
take nearly all the time; at 24 M parameters nothing was gained."""
TOLERANCE = 1e-5
"""Largest difference between the lean step's logits and the model's own, as a part of the largest logit."""

_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights as one step multiplies with them; `out` and `down` are transposed."""

    qkv: Tensor
    qkv_bias: Tensor | None
    turn_norm: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


class LeanStep:
    """The step of one model: weights copied as they are now, cosines and sines up to position `reach`.

    Keys in the cache have their widths in pairs: see `adopt`.
    """

    def __init__(self, model: PreTrainedModel, reach: int) -> None:
        """Copy the weights of `model`, whose class is one of `RECOGNISED`."""
        body, config = model.model, model.config
        self.embedding: Tensor = body.embed_tokens.weight
        self.head: Tensor = model.lm_head.weight
        self.norm: Tensor = body.norm.weight
        self.eps: float = body.norm.variance_epsilon
        self.least = torch.tensor(self.eps)
        attention = body.layers[0].self_attn
        self.width: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.groups: int = config.num_key_value_heads
        self.heads: int = config.num_attention_heads
        self.norms_heads = type(model) is Qwen3ForCausalLM
        self.pairs = torch.arange(self.width).view(2, -1).T.flatten()
        self.layers = [self._layer(layer) for layer in body.layers]
        cos, sin = body.rotary_emb(self.norm, torch.arange(reach)[None])
        half = self.width // 2
        self.angles = torch.complex(cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous())

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        bias = norm = None
        if query.bias is not None:
            bias = torch.cat([self._paired(query.bias), self._paired(key.bias), value.bias])
        if self.norms_heads:
            norms = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.groups
            norm = torch.stack(norms)[:, self.pairs]
        qkv = torch.cat([self._paired(query.weight), self._paired(key.weight), value.weight])
        return _Layer(
            qkv=qkv * layer.input_layernorm.weight,
            qkv_bias=bias,
            turn_norm=norm,
            out=attention.o_proj.weight.T,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * layer.post_attention_layernorm.weight,
            down=mlp.down_proj.weight.T,
        )

    def _paired(self, weight: Tensor) -> Tensor:
        """Lay the two halves of every head's widths, which turn together, next to each other."""
        paired: Tensor = weight.unflatten(0, (-1, self.width))[:, self.pairs]
        return paired.flatten(0, 1)

    def adopt(self, cache: Cache) -> None:
        """Lay the keys of a cache that the model filled as this step wants them."""
        for layer in cache.layers:
            layer.keys = layer.keys[..., self.pairs]

    def __call__(self, ids: Tensor, positions: Tensor, bias: Tensor | None, cache: Cache) -> Tensor:
        """Append one token to each row of `cache`; return the logits of the next, [row vocabulary].

        `bias` [row 1 1 position] is added to the scores: 0, or minus infinity before a row's first token.
        """
        hidden = functional.embedding(ids, self.embedding)
        rows, width, turning = len(hidden), self.width, self.heads + self.groups
        angles = self.angles[positions]
        weight = 0 if bias is None else 1
        if bias is None:
            bias = hidden.new_empty(1)
        else:
            bias = bias.expand(-1, self.groups, -1, -1).reshape(rows * self.groups, 1, -1)
        for layer, held in zip(self.layers, cache.layers, strict=True):
            qkv = functional.linear(self._normed(hidden), layer.qkv, layer.qkv_bias).view(rows, -1, width)
            turn = qkv[:, :turning]
            if layer.turn_norm is not None:
                turn.copy_(self._normed(turn).mul_(layer.turn_norm))
            torch.view_as_complex(turn.view(rows, turning, width // 2, 2)).mul_(angles)
            query = turn[:, : self.heads].reshape(rows * self.groups, -1, width)
            keys, values = held.append(qkv[:, self.heads :].view(rows, 2, self.groups, width).transpose(0, 1))
            scores = torch.baddbmm(bias, query, keys, beta=weight, alpha=self.scaling)
            mixed = scores.softmax(-1).bmm(values)
            hidden.addmm_(mixed.view(rows, -1), layer.out)
            gate, up = functional.linear(self._normed(hidden), layer.gate_up).chunk(2, 1)
            hidden.addmm_(functional.silu(gate).mul_(up), layer.down)
        return functional.linear(functional.rms_norm(hidden, hidden.shape[1:], self.norm, self.eps), self.head)

    def _normed(self, states: Tensor) -> Tensor:
        """Return RMS norm without weights: 4 operations instead of rms_norm's 6."""
        size = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return states * torch.addcmul(self.least, size, size, value=1 / states.shape[-1]).rsqrt_()


@torch.inference_mode()
def lean_step(model: PreTrainedModel, reach: int) -> LeanStep | None:
    """Return a lean step up to position `reach`; `None`, and a line in the log, where the model keeps its own.

    The step is compared with the model's own on two short rows before it is used.
    """
    reason = _unfit(model)
    if reason is None:
        step = LeanStep(model, max(reach, 8))
        difference = _difference(model, step)
        if difference <= TOLERANCE:
            return step
        reason = f"its logits and those of a lean step differ by {difference:.1e} of the largest"
    _log.info("%s decodes with transformers' own forward: %s", model.config.model_type, reason)
    return None


def _unfit(model: PreTrainedModel) -> str | None:
    """Say why `model` can have no lean step, if so."""
    config = model.config
    if type(model) not in RECOGNISED:
        return "not a Llama-type model"
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    rules = [
        (model.device.type == "cpu" and model.dtype == torch.float32, "not float32 on the CPU"),
        (sum(weight.numel() for weight in model.parameters()) <= LARGEST, "the model is large"),
        (all(type(layer) is RoomyLayer for layer in decoding_cache(model).layers), "it has a sliding window"),
        (config._attn_implementation in ("sdpa", DECODING_ATTENTION), "another kind of attention is set"),
        (config.hidden_act == "silu", f"activation {config.hidden_act}"),
        (config.rope_parameters["rope_type"] in _FIXED_ROTARY, "rotary angles change with the length"),
        (attention.o_proj.bias is None and mlp.down_proj.bias is None, "it has biases"),
    ]
    return next((reason for holds, reason in rules if not holds), None)


def _difference(model: PreTrainedModel, step: LeanStep) -> float:
    """Return the largest difference of logits, as a part of the largest logit, one of two rows being shorter."""
    ids = torch.arange(10).view(2, 5) % model.config.vocab_size
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = []
    for lean in (False, True):
        cache = decoding_cache(model)
        model(ids, attention_mask=mask[:, :5], position_ids=positions[:, :5], past_key_values=cache, use_cache=True)
        if lean:
            step.adopt(cache)
            bias = torch.zeros(2, 1, 1, 6).masked_fill(~mask[:, None, None], -torch.inf)
            logits.append(step(ids[:, 1], positions[:, 5], bias, cache))
        else:
            output = model(
                ids[:, 1:2], attention_mask=mask, position_ids=positions[:, 5:], past_key_values=cache, use_cache=True
            )
            logits.append(output.logits[:, -1])
    own, lean_logits = logits
    return float((own - lean_logits).abs().max() / own.abs().max())
