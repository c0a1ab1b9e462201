"""Which pairs make which optimizer step, and a microbatch of pairs as log-probabilities."""

from collections.abc import Hashable, Iterator, Sequence

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
    lengths: Sequence[PairLength],
    pairs_per_step: int,
    epochs: int,
    seed: int,
    tokens_per_microbatch: int,
    prompts: Sequence[Hashable] | None = None,
) -> list[list[list[int]]]:
    """Return steps of microbatches of indices into `lengths`.

    Each epoch holds every pair once, in an order drawn from (seed, epoch); its last step may be short. Where `prompts`
    names each pair's prompt, prompts are shuffled and the pairs of one prompt follow each other, so that they share its
    computation. Inside a step prompts of similar size stand together, and a microbatch holds at most
    `tokens_per_microbatch` tokens, counted as the shared layout computes them: a context once, and every completion. A
    larger pair is a microbatch of its own. The token budget changes microbatches only: the pairs of a step are the same
    for every budget.

    Raises:
        ConfigError: pairs_per_step, epochs or tokens_per_microbatch is below 1.

    """
    settings = {"pairs_per_step": pairs_per_step, "epochs": epochs, "tokens_per_microbatch": tokens_per_microbatch}
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"train.{name} (train/batches.py): must be ≥ 1, got {value}")
    owners: Sequence[Hashable] = range(len(lengths)) if prompts is None else prompts
    together: dict[Hashable, list[int]] = {}
    for pair, owner in enumerate(owners):
        together.setdefault(owner, []).append(pair)
    groups = list(together.values())
    largest = {owner: max(sum(lengths[pair]) for pair in pairs) for owner, pairs in together.items()}
    steps = []
    for epoch in range(epochs):
        shuffled = np.random.default_rng((seed, epoch)).permutation(len(groups)).tolist()
        order = [pair for group in shuffled for pair in groups[group]]
        for start in range(0, len(order), pairs_per_step):
            chosen = order[start : start + pairs_per_step]
            step = sorted(chosen, key=lambda pair: (largest[owners[pair]], together[owners[pair]][0], pair))
            steps.append(list(_microbatches(step, lengths, owners, tokens_per_microbatch)))
    return steps


def _microbatches(
    step: Sequence[int], lengths: Sequence[PairLength], owners: Sequence[Hashable], budget: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for pair in step:
        context, chosen, rejected = lengths[pair]
        shares = bool(batch) and owners[batch[-1]] == owners[pair]
        cost = chosen + rejected + (0 if shares else context)
        if batch and used + cost > budget:
            yield batch
            batch, used, cost = [], 0, context + chosen + rejected
        batch.append(pair)
        used += cost
    yield batch


def pair_logps(
    model: nn.Module, pairs: Sequence[TokenizedPair], layout: str = "auto", needs_reference: bool = True
) -> PairLogps:
    """Score a microbatch: log-probs under `model`, and the stored ones of the reference beside them.

    All completions of one context form one `TokenGroup`, and a completion that several pairs have is computed once. A
    missing `win_prob` becomes 1: a plain label.

    Raises:
        ValueError: no pairs; or `needs_reference`, and a pair has no reference log-probs, or not one for each token.

    """
    groups, chosen, rejected = group_by_context(pairs)
    policy = completion_logps(model, groups, layout=layout)
    device = policy.token_logps.device
    reference_chosen = reference_rejected = None
    if needs_reference:
        for pair in pairs:
            _require_reference(pair)
        reference_chosen = _stored([pair.reference_chosen or () for pair in pairs], device)
        reference_rejected = _stored([pair.reference_rejected or () for pair in pairs], device)
    return PairLogps(
        policy_chosen=_rows(policy, chosen),
        policy_rejected=_rows(policy, rejected),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        win_prob=_column([1.0 if pair.win_prob is None else pair.win_prob for pair in pairs], device),
        weight=_column([pair.weight for pair in pairs], device),
    )


def group_by_context(pairs: Sequence[TokenizedPair]) -> tuple[list[TokenGroup], list[int], list[int]]:
    """Return groups of distinct completions, and the row of each pair's chosen and rejected side among all of them."""
    completions: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair in pairs:
        completions.setdefault(pair.context, {}).update({pair.chosen: None, pair.rejected: None})
    groups = [TokenGroup(context, tuple(found)) for context, found in completions.items()]
    keys = [(group.context, completion) for group in groups for completion in group.completions]
    row = {key: index for index, key in enumerate(keys)}
    return groups, [row[p.context, p.chosen] for p in pairs], [row[p.context, p.rejected] for p in pairs]


def _rows(logps: CompletionLogps, rows: Sequence[int]) -> CompletionLogps:
    index = torch.tensor(rows, device=logps.mask.device)
    return CompletionLogps(logps.token_logps[index], logps.mask[index])


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
