"""Learned noise on the logits of a frozen model: what DNPO adds to its reference on rejected completions.

    σ = s·tanh(raw / s),   raw = W·h + b  or  B·(A·h) + b,   s² = bound        [score vocabulary]
    z̃ = z + σ ⊙ ε,   ε ~ N(0, 1)
    shift = log softmax(z̃)[target] − log softmax(z)[target]                   [score]

h is the frozen model's last hidden state at the place that predicts the target, z what its head makes of it. Tiles of
whole rows are computed and thrown away, forward and backward, so the [score, vocabulary] arrays of a batch never exist.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.functional import linear
from transformers import PreTrainedModel

from prefloop.errors import ConfigError
from prefloop.models.head import CPU_CHUNK, GPU_CHUNK, HeadFacts, decoder_of, head_of
from prefloop.models.logps import TokenGroup


@dataclass(frozen=True)
class PredictingStates:
    """Where a frozen model predicts completion tokens: its last hidden states there, the tokens, and its head."""

    hidden: Float[Tensor, "score width"]
    targets: Int[Tensor, " score"]
    head: nn.Linear
    facts: HeadFacts


@dataclass(frozen=True)
class Noised:
    """What noise does. `shift`: change of the target's log-prob, nats. `variance`: mean of σ² over the vocabulary."""

    shift: Float[Tensor, " score"]
    variance: Float[Tensor, " score"]


@torch.no_grad()
def predicting_states(model: PreTrainedModel, groups: Sequence[TokenGroup]) -> PredictingStates:
    """Run a frozen model without its head; one score for each completion token, by group, completion, token.

    Raises:
        ValueError: a context is empty, so that nothing predicts the first token.
        ConfigError: the model has no plain linear head, or no decoder under it.

    """
    pairs = [(group.context, completion) for group in groups for completion in group.completions]
    if not all(context for context, _ in pairs):
        raise ValueError("predicting_states: a context is empty; start it with a bos token")
    head, facts = head_of(model)
    device = head.weight.device
    rows = [[*context, *completion[:-1]] for context, completion in pairs]
    width = max(map(len, rows), default=0)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    # A shared model gathers its weights around what it calls itself; see `share_states`.
    output = getattr(model, _SHARED, partial(_hidden, model))(tokens, mask)
    places = [
        index * width + len(context) - 1 + offset
        for index, (context, completion) in enumerate(pairs)
        for offset in range(len(completion))
    ]
    hidden = output.flatten(0, 1).index_select(0, torch.tensor(places, dtype=torch.long, device=device))
    targets = [token for _, completion in pairs for token in completion]
    return PredictingStates(hidden, torch.tensor(targets, dtype=torch.long, device=device), head, facts)


_SHARED = "prefloop_states"
"""Method of a shared model by which it is run."""


def share_states(model: PreTrainedModel) -> None:
    """Let `predicting_states` run a model after `fully_shard`; all ranks then call it together.

    Its head stays gathered after the first call, as `NoiseHead` needs it.
    """
    setattr(model, _SHARED, MethodType(_hidden, model))
    register_fsdp_forward_method(model, _SHARED)


def _hidden(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    output: Tensor = decoder_of(model)(tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return output


class NoiseHead(nn.Module):
    """A scale of noise for every logit at every position, an affine function of the hidden state.

    Without `rank` this has as many parameters as an LM head with bias: width × vocabulary + vocabulary. With it,
    W = B·A of that rank: rank × (width + vocabulary) + vocabulary. The sign of σ means nothing, as ε is symmetric.

    Departs from the paper (DNPO, arXiv 2502.05400): σ² < bound holds at all times, by a tanh; the paper states the
    bound and minimises with a penalty instead. `bound=None` is the plain affine scale.

    Args:
        width: length of a hidden state.
        vocabulary: number of logits.
        rank: rank of W, ≥ 1; `None`: W is a full matrix.
        bound: what σ² stays below, > 0; `None`: nothing.
        initial: b at the start, so that σ ≈ `initial` everywhere; W starts at 0.
        seed: seed of A, which starts as N(0, 1 / width).

    Raises:
        ConfigError: rank or bound is out of range.

    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        rank: int | None = None,
        bound: float | None = 1.0,
        initial: float = 0.0,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        if rank is not None and rank < 1:
            raise ConfigError(f"rank (models/noise_head.py): must be ≥ 1, got {rank}; leave it out for a full matrix")
        if bound is not None and not bound > 0:
            raise ConfigError(f"bound (models/noise_head.py): must be > 0, got {bound}")
        self.limit = math.inf if bound is None else math.sqrt(bound)
        self.down: nn.Parameter | None = None
        if rank is not None:
            normal = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
            self.down = nn.Parameter(normal / math.sqrt(width))
        self.weight = nn.Parameter(torch.zeros(vocabulary, width if rank is None else rank))
        self.bias = nn.Parameter(torch.full((vocabulary,), float(initial)))

    def forward(self, states: PredictingStates, seeds: Sequence[int], chunk: int | None = None) -> Noised:
        """Draw one ε for each score and say what the noise does to its target.

        Differentiable once, with respect to this head's parameters only. A score's ε depends on its seed and the
        device's kind alone, not on the other scores nor on `chunk`.

        Args:
            states: where the frozen model predicts, and what.
            seeds: one for each score, 0 ≤ seed < 2³².
            chunk: logits of a tile, of which about six exist at a time; `None` takes that of models/head.py. A tile
                has at least one whole row. Changes memory, not results.

        Raises:
            ValueError: not one seed for each score, or chunk < 1.

        """
        if len(seeds) != len(states.targets):
            raise ValueError(f"NoiseHead: {len(states.targets)} scores but {len(seeds)} seeds")
        if chunk is None:
            chunk = CPU_CHUNK if states.hidden.device.type == "cpu" else GPU_CHUNK
        if chunk < 1:
            raise ValueError(f"NoiseHead: chunk must be ≥ 1, got {chunk}")
        features = states.hidden.detach().to(self.weight.dtype)
        if self.down is not None:
            features = linear(features, self.down)
        tiles = _Tiles(states, seeds, self.limit, max(1, chunk // len(self.weight)))
        shift, variance = _Shift.apply(features, self.weight, self.bias, tiles)
        return Noised(shift, variance)


@dataclass(frozen=True)
class _Tile:
    """Some rows of the [score, vocabulary] arrays. `sigma` and `epsilon` are what was added, scaled, to `clean`."""

    clean: Tensor
    sigma: Tensor
    epsilon: Tensor
    noisy: Tensor


@dataclass(frozen=True)
class _Tiles:
    """The arrays, cut into tiles of `height` whole rows."""

    states: PredictingStates
    seeds: Sequence[int]
    limit: float
    height: int

    def spans(self) -> Iterator[slice]:
        total = len(self.seeds)
        return (slice(first, min(first + self.height, total)) for first in range(0, total, self.height))

    def tile(self, span: slice, features: Tensor, weight: Tensor, bias: Tensor) -> _Tile:
        clean = self._logits(span).to(torch.promote_types(features.dtype, torch.float32))
        sigma = linear(features[span], weight, bias).to(clean.dtype)
        if math.isfinite(self.limit):
            sigma = sigma.div_(self.limit).tanh_().mul_(self.limit)
        epsilon = self._epsilon(span, clean)
        return _Tile(clean, sigma, epsilon, torch.addcmul(clean, sigma, epsilon))

    def _logits(self, span: slice) -> Tensor:
        """Return the frozen model's logits. Their rounding does not matter: it is the same with and without noise."""
        head, facts = self.states.head, self.states.facts
        logits = linear(self.states.hidden[span], head.weight, head.bias).float() * (facts.scale / facts.temperature)
        if facts.softcap is None:
            return logits
        cap = facts.softcap / facts.temperature
        return cap * torch.tanh(logits / cap)

    def _epsilon(self, span: slice, like: Tensor) -> Tensor:
        # Row by row, each from its own seed: the draw then depends neither on the tile nor on the microbatch.
        drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        generator = torch.Generator(like.device)
        for row, seed in zip(drawn, self.seeds[span], strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return drawn.to(like.dtype)


class _Shift(torch.autograd.Function):
    """d shift/dσ = ε ⊙ (onehot(target) − softmax(z̃));  dσ/d raw = 1 − (σ/s)²;  d variance/dσ = 2σ / vocabulary."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(features.dtype, torch.float32)
        shift, variance, normalizer = (features.new_empty(len(features), dtype=wide) for _ in range(3))
        for span in tiles.spans():
            tile = tiles.tile(span, features, weight, bias)
            target = tiles.states.targets[span, None]
            normalizer[span] = tile.noisy.logsumexp(-1)
            noisy = tile.noisy.gather(1, target).squeeze(1) - normalizer[span]
            clean = tile.clean.gather(1, target).squeeze(1) - tile.clean.logsumexp(-1)
            shift[span] = noisy - clean
            variance[span] = tile.sigma.square().mean(-1)
        ctx.save_for_backward(features, weight, bias, normalizer)
        ctx.tiles = tiles
        return shift, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, normalizer = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        on_shift, on_variance = (u[:, None] for u in upstream)
        d_features = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for span in tiles.spans():
            tile = tiles.tile(span, features, weight, bias)
            step = tile.noisy.sub_(normalizer[span, None]).exp_().neg_()
            step.scatter_add_(1, tiles.states.targets[span, None], torch.ones_like(step[:, :1]))
            step.mul_(tile.epsilon).mul_(on_shift[span])
            step.addcmul_(tile.sigma, on_variance[span], value=2 / len(weight))
            if math.isfinite(tiles.limit):
                step.mul_(tile.sigma.div_(tiles.limit).square_().neg_().add_(1))
            step = step.to(weight.dtype)
            d_weight.addmm_(step.T, features[span])
            d_bias += step.sum(0)
            if d_features is not None:
                d_features[span] = step @ weight
        return d_features, d_weight, d_bias, None
