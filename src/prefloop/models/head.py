"""The end of a causal LM: log-probs of target tokens from hidden states, never holding the logits of all positions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from prefloop.errors import ConfigError

CPU_CHUNK = 1 << 20
"""Logits held at a time on a CPU: 4 MiB in float32, so that they stay in the cache (fastest of 12 shapes tried)."""

GPU_CHUNK = 1 << 26
"""Logits held at a time on a GPU: 256 MiB in float32, large enough that launches do not count."""


@dataclass(frozen=True)
class HeadFacts:
    """What a model does to its logits, z = h·Wᵀ + b, before the softmax: softcap · tanh(z · scale / softcap).

    `scale` is 1 for most models, `logit_scale` for Cohere, 1 / `logits_scaling` for Granite. `softcap` is
    `final_logit_softcapping` (Gemma 2), or `None`. `temperature` divides what comes out.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def head_of(model: PreTrainedModel, temperature: float = 1.0) -> tuple[nn.Linear, HeadFacts]:
    """Return the language-model head of a causal LM, and what its config says about logits.

    Raises:
        ConfigError: the head is not a plain linear layer (such as one with a LoRA adapter), or temperature ≤ 0.

    """
    if not temperature > 0:
        raise ConfigError(f"temperature (models/logps.py): must be > 0, got {temperature}")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"models/head.py: the LM head of {type(model).__name__} must be a plain nn.Linear, got "
            f"{type(head).__name__}; leave lm_head out of the adapter's targets"
        )
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return head, HeadFacts(scale, getattr(config, "final_logit_softcapping", None), temperature)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal LM that makes the hidden states which its head reads.

    Raises:
        ConfigError: there is no such part.

    """
    candidates = (model.get_decoder(), *model.children())
    for candidate in candidates:
        if isinstance(candidate, PreTrainedModel) and candidate is not model:
            return candidate
    raise ConfigError(f"models/head.py: {type(model).__name__} has no decoder under its LM head; use a causal LM")


def target_logps(
    hidden: Float[Tensor, "score width"],
    head: nn.Linear,
    targets: Int[Tensor, " score"],
    facts: HeadFacts,
    chunk: int | None = None,
) -> Float[Tensor, " score"]:
    """Return log softmax(logits)[target] for each hidden state, nats, in float32 or wider.

    At most `chunk` logits exist at a time, forward and backward; the backward pass computes them again. Matrix
    products run in the autocast type where autocast is on, else in the type of `hidden`; the log-sum-exp and all
    sums over chunks are float32. Differentiable once, with respect to `hidden` and the head's weight and bias.

    Raises:
        ValueError: chunk < 1.

    """
    return target_logps_and_squares(hidden, head, targets, facts, chunk, squares=False)[0]


def target_logps_and_squares(
    hidden: Float[Tensor, "score width"],
    head: nn.Linear,
    targets: Int[Tensor, " score"],
    facts: HeadFacts,
    chunk: int | None = None,
    squares: bool = True,
) -> tuple[Float[Tensor, " score"], Float[Tensor, " score"]]:
    """Return what `target_logps` does, and log Σ_v softmax(logits)[v]² beside it: nats, without gradient.

    The latter is −∞ where `squares` is false; it costs one more exponential of every logit.

    Raises:
        ValueError: chunk < 1.

    """
    if chunk is None:
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
    if chunk < 1:
        raise ValueError(f"head_chunk (models/logps.py): must be ≥ 1, got {chunk}")
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    tiles = _Tiles(facts, product, chunk, squares)
    result: tuple[Tensor, Tensor] = _TargetLogps.apply(hidden, head.weight, head.bias, targets, tiles)
    return result


@dataclass(frozen=True)
class _Tiles:
    """How the [score, vocabulary] logits are cut, and how one tile is computed."""

    facts: HeadFacts
    product: torch.dtype
    chunk: int
    squares: bool

    def spans(self, scores: int, vocabulary: int) -> Iterator[tuple[slice, list[slice]]]:
        """Yield spans of the vocabulary, each with the spans of rows that meet it; a tile is about square."""
        rows = max(1, min(scores, math.isqrt(self.chunk)))
        width = max(1, min(vocabulary, self.chunk // rows))
        over_rows = [slice(r, min(r + rows, scores)) for r in range(0, scores, rows)]
        for v in range(0, vocabulary, width):
            yield slice(v, min(v + width, vocabulary)), over_rows

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return one tile of what the softmax sees, divided by the temperature."""
        logits = _wide_product(hidden, weight.T)
        if bias is not None:
            logits += bias
        if self.facts.softcap is not None:
            cap = self.facts.softcap
            return logits.mul_(self.facts.scale / cap).tanh_().mul_(cap / self.facts.temperature)
        factor = self.facts.scale / self.facts.temperature
        return logits if factor == 1 else logits.mul_(factor)

    def step(self, logits: Tensor, normalizer: Tensor, targets: Tensor, span: slice) -> Tensor:
        """Return d log p(target) / d (h·Wᵀ + b) of one tile; overwrites `logits`."""
        factor = self.facts.scale / self.facts.temperature
        slope: Tensor | float = factor
        if self.facts.softcap is not None:
            tanh = logits * (self.facts.temperature / self.facts.softcap)
            slope = tanh.square_().neg_().add_(1).mul_(factor)
        step = logits.sub_(normalizer[:, None]).exp_().neg_()
        index, inside = _within(targets, span)
        # Before any rounding to 16 bits: 1 − p of a likely token would vanish in it.
        step.scatter_add_(1, index, inside[:, None].to(step.dtype))
        return step.mul_(slope)


class _TargetLogps(torch.autograd.Function):
    """log p(target) = z[target] − log Σ exp z;  d/dz = onehot(target) − p."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tiles: _Tiles
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        normalizer = hidden.new_full((len(hidden),), -math.inf, dtype=wide)
        target_logit = hidden.new_zeros(len(hidden), dtype=wide)
        square = torch.full_like(normalizer, -math.inf)
        left = hidden.to(tiles.product)
        for span, over_rows in tiles.spans(len(hidden), len(weight)):
            right, offset = weight[span].to(tiles.product), None if bias is None else bias[span]
            for rows in over_rows:
                logits = tiles.logits(left[rows], right, offset)
                index, inside = _within(targets[rows], span)
                target_logit[rows] += logits.gather(1, index).squeeze(1) * inside
                normalizer[rows] = torch.logaddexp(normalizer[rows], logits.logsumexp(-1))
                if tiles.squares:
                    square[rows] = torch.logaddexp(square[rows], logits.mul_(2).logsumexp(-1))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.tiles = tiles
        square = square - 2 * normalizer
        ctx.mark_non_differentiable(square)
        return target_logit - normalizer, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        wide = normalizer.dtype
        d_hidden = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        left = hidden.to(tiles.product)
        # The upstream factor of a row goes onto its hidden state here and onto its gradient at the end: both are far
        # smaller than its row of logits.
        weighted = (hidden * upstream[:, None]).to(tiles.product)
        for span, over_rows in tiles.spans(len(hidden), len(weight)):
            right, offset = weight[span].to(tiles.product), None if bias is None else bias[span]
            d_span = torch.zeros_like(right, dtype=wide)
            d_offset = torch.zeros_like(right[:, 0], dtype=wide)
            for rows in over_rows:
                logits = tiles.logits(left[rows], right, offset)
                step = tiles.step(logits, normalizer[rows], targets[rows], span)
                if d_bias is not None:
                    d_offset += upstream[rows] @ step
                step = step.to(tiles.product)
                if d_hidden is not None:
                    d_hidden[rows] += _wide_product(step, right)
                if d_weight is not None:
                    d_span += _wide_product(step.T, weighted[rows])
            if d_weight is not None:
                d_weight[span] = d_span
            if d_bias is not None:
                d_bias[span] = d_offset
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(upstream[:, None]).to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _within(targets: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in the span (any column where it lies outside) and whether it lies inside.

    Masks instead of a selection: the number of targets inside is never needed on the host.
    """
    inside = (targets >= span.start) & (targets < span.stop)
    return (targets - span.start).clamp(0, span.stop - span.start - 1)[:, None], inside


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left·right in float32 or wider; 16-bit products are not rounded to 16 bits where the device can do so.

    Sums of products that were rounded chunk by chunk bias training over a few dozen steps (huggingface/trl#7244).
    """
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
