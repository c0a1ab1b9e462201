"""Which pairs make which optimizer step, and a microbatch of pairs as log-probabilities."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prefloop.errors import ConfigError
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair
from prefloop.tensors import CompletionLogps, PairLogps

PairLength = tuple[int, int, int]
"""Tokens of context, chosen and rejected."""


def plan_steps(
    lengths: Sequence[PairLength], pairs_per_step: int, epochs: int, seed: int, tokens_per_microbatch: int
) -> list[list[list[int]]]:
    """Return steps of microbatches of indices into `lengths`.

    Each epoch holds every pair once, in an order drawn from (seed, epoch); its last step may be short. Inside a step
    pairs of similar size stand together, and a microbatch holds at most `tokens_per_microbatch` tokens, counted as
    the shared layout computes them (context + chosen + rejected). A larger pair is a microbatch of its own. The
    token budget changes microbatches only: the pairs of a step are the same for every budget.

    Raises:
        ConfigError: pairs_per_step, epochs or tokens_per_microbatch is below 1.

    """
    settings = {"pairs_per_step": pairs_per_step, "epochs": epochs, "tokens_per_microbatch": tokens_per_microbatch}
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"train.{name} (train/batches.py): must be ≥ 1, got {value}")
    sizes = [sum(length) for length in lengths]
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(sizes)).tolist()
        for start in range(0, len(order), pairs_per_step):
            step = sorted(order[start : start + pairs_per_step], key=lambda pair: (sizes[pair], pair))
            steps.append(list(_microbatches(step, sizes, tokens_per_microbatch)))
    return steps


def _microbatches(step: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for pair in step:
        if batch and used + sizes[pair] > budget:
            yield batch
            batch, used = [], 0
        batch.append(pair)
        used += sizes[pair]
    yield batch


def pair_logps(
    model: nn.Module, pairs: Sequence[TokenizedPair], layout: str = "auto", needs_reference: bool = True
) -> PairLogps:
    """Score a microbatch: log-probs under `model`, and the stored ones of the reference beside them.

    Both sides of a pair form one `TokenGroup`. A missing `win_prob` becomes 1: a plain label.

    Raises:
        ValueError: no pairs; or `needs_reference`, and a pair has no reference log-probs, or not one for each token.

    """
    groups = [TokenGroup(pair.context, (pair.chosen, pair.rejected)) for pair in pairs]
    policy = completion_logps(model, groups, layout=layout)
    device = policy.token_logps.device
    reference_chosen = reference_rejected = None
    if needs_reference:
        for pair in pairs:
            _require_reference(pair)
        reference_chosen = _stored([pair.reference_chosen or () for pair in pairs], device)
        reference_rejected = _stored([pair.reference_rejected or () for pair in pairs], device)
    return PairLogps(
        policy_chosen=_every_second(policy, 0),
        policy_rejected=_every_second(policy, 1),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        win_prob=_column([1.0 if pair.win_prob is None else pair.win_prob for pair in pairs], device),
        weight=_column([pair.weight for pair in pairs], device),
    )


def _every_second(logps: CompletionLogps, first: int) -> CompletionLogps:
    """Return the rows of one side; rows come chosen, rejected, chosen, …"""
    return CompletionLogps(logps.token_logps[first::2], logps.mask[first::2])


def _require_reference(pair: TokenizedPair) -> None:
    sides = (("chosen", pair.chosen, pair.reference_chosen), ("rejected", pair.rejected, pair.reference_rejected))
    for side, tokens, values in sides:
        if values is None or len(values) != len(tokens):
            raise ValueError(
                f"pair {pair.pair_id}: {side} has {len(tokens)} tokens but "
                f"{'no' if values is None else len(values)} reference log-probs; score the reference again"
            )


def _stored(rows: Sequence[Sequence[float]], device: torch.device) -> CompletionLogps:
    width = max(map(len, rows), default=0)
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    return CompletionLogps(values.reshape(len(rows), width).to(device), mask.to(device))


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
