"""Pairs to token ids, and the reference's log-probs beside them, stored once for each reference and content."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from prefloop.models.logps import completion_logps
from prefloop.rows import Completion, PreferencePair, Prompt, TokenizedPair
from prefloop.tensors import CompletionLogps
from prefloop.train.batches import group_by_context


@dataclass
class Tokenized:
    """Pairs as token ids, and how many were dropped for which reason."""

    pairs: list[TokenizedPair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoding:
    """How prompts and completions become token ids, and the most tokens that a prompt and a completion may have."""

    prompt: Callable[[Prompt], list[int]]
    completion: Callable[[Completion], list[int]]
    max_tokens: int


def tokenize_pairs(pairs: Iterable[PreferencePair], encoding: Encoding, sampled_by: str | None = None) -> Tokenized:
    """Tokenize each side once. A sampled completion keeps the ids it was sampled with.

    Sides that the policy with digest `sampled_by` sampled keep its sampling log-probs as reference log-probs; whether
    these may be used is for `sampler_gap` to say.

    A pair is dropped, and counted, when a side is empty, both sides have the same ids, or the prompt and the longer
    side exceed `max_tokens`. Nothing is truncated: a cut completion teaches the wrong end.
    """
    result = Tokenized()
    for pair in pairs:
        context = tuple(encoding.prompt(pair.prompt))
        chosen = tuple(encoding.completion(pair.chosen))
        rejected = tuple(encoding.completion(pair.rejected))
        if not chosen or not rejected:
            result.dropped["a side is empty"] += 1
        elif chosen == rejected:
            result.dropped["both sides have the same tokens"] += 1
        elif len(context) + max(len(chosen), len(rejected)) > encoding.max_tokens:
            result.dropped[f"longer than train.max_tokens={encoding.max_tokens}"] += 1
        else:
            result.pairs.append(
                TokenizedPair(
                    pair_id=pair.pair_id,
                    context=context,
                    chosen=chosen,
                    rejected=rejected,
                    reference_chosen=_sampled_logps(pair.chosen, sampled_by),
                    reference_rejected=_sampled_logps(pair.rejected, sampled_by),
                    win_prob=pair.win_prob,
                    weight=pair.weight,
                )
            )
    return result


def _sampled_logps(side: Completion, sampled_by: str | None) -> tuple[float, ...] | None:
    return side.sampler_logps if sampled_by is not None and side.source == sampled_by else None


def sampler_gap(sampled: Sequence[TokenizedPair], live: Sequence[TokenizedPair]) -> float:
    """Return the largest difference between a sampler's and a live log-prob of one token, nats; ∞ if one is missing."""
    worst = 0.0
    for ours, theirs in zip(sampled, live, strict=True):
        for stored, computed in (
            (ours.reference_chosen, theirs.reference_chosen),
            (ours.reference_rejected, theirs.reference_rejected),
        ):
            if stored is None or computed is None or len(stored) != len(computed):
                return math.inf
            worst = max(worst, *(abs(a - b) for a, b in zip(stored, computed, strict=True)))
    return worst


def score_reference(
    model: nn.Module, pairs: Sequence[TokenizedPair], layout: str, tokens_per_batch: int
) -> list[TokenizedPair]:
    """Return `pairs` with the log-probs of `model` for every completion token, in nats. Computes no gradients."""
    scored: list[TokenizedPair] = []
    for batch in _within_budget(pairs, tokens_per_batch):
        groups, chosen, rejected = group_by_context(batch)
        with torch.inference_mode():
            logps = completion_logps(model, groups, layout=layout)
        values = rows_of(logps)
        scored += [
            replace(pair, reference_chosen=values[row], reference_rejected=values[other])
            for pair, row, other in zip(batch, chosen, rejected, strict=True)
        ]
    return scored


def rows_of(logps: CompletionLogps) -> list[tuple[float, ...]]:
    """Return each row's log-probs without padding."""
    lengths = logps.mask.sum(-1).tolist()
    return [tuple(row[:n]) for row, n in zip(logps.token_logps.tolist(), lengths, strict=True)]


def _within_budget(pairs: Sequence[TokenizedPair], budget: int) -> Iterable[list[TokenizedPair]]:
    batch: list[TokenizedPair] = []
    used = 0
    for pair in pairs:
        size = len(pair.context) + len(pair.chosen) + len(pair.rejected)
        if batch and used + size > budget:
            yield batch
            batch, used = [], 0
        batch.append(pair)
        used += size
    if batch:
        yield batch
