"""Pairs to token ids, and the reference's log-probs beside them, stored once for each reference and content."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import ABSENT, Completion, PreferencePair, Prompt, TokenizedPair, TokenizedView
from prefloop.team import ALONE, Team
from prefloop.tensors import CompletionLogps
from prefloop.train.batches import group_by_context


@dataclass(frozen=True)
class Encoding:
    """How prompts and completions become token ids, and the most tokens that a prompt and a completion may have."""

    prompt: Callable[[Prompt], list[int]]
    completion: Callable[[Completion], list[int]]
    max_tokens: int


def tokenize_pairs(
    pairs: Iterable[PreferencePair], encoding: Encoding, dropped: Counter[str], sampled_by: str | None = None
) -> Iterator[TokenizedPair]:
    """Tokenize each side once. A sampled completion keeps the ids it was sampled with.

    Sides that the policy with digest `sampled_by` sampled keep its sampling log-probs as reference log-probs; whether
    these may be used is for `sampler_gap` to say.

    A pair is left out, and counted in `dropped`, when a side is empty though it is not absent, both sides have the
    same ids, or a prompt with its longest completion exceeds `max_tokens`. Nothing is truncated: a cut completion
    teaches the wrong end.
    """
    for pair in pairs:
        tokenized = _tokenize(pair, encoding, sampled_by)
        reason = _objection(pair, tokenized, encoding.max_tokens)
        if reason:
            dropped[reason] += 1
        else:
            yield tokenized


def _tokenize(pair: PreferencePair, encoding: Encoding, sampled_by: str | None) -> TokenizedPair:
    shared = encoding.completion(pair.prefix) if pair.prefix is not None else []
    views = tuple(
        TokenizedView(
            name=view.name,
            context=tuple(encoding.prompt(replace(pair.prompt, messages=view.messages))),
            tokens=tuple(encoding.completion(view.completion)),
            reference=None,
        )
        for view in pair.views
    )
    return TokenizedPair(
        pair_id=pair.pair_id,
        context=(*encoding.prompt(pair.prompt), *shared),
        chosen=tuple(encoding.completion(pair.chosen)),
        rejected=tuple(encoding.completion(pair.rejected)),
        reference_chosen=_sampled_logps(pair.chosen, sampled_by),
        reference_rejected=_sampled_logps(pair.rejected, sampled_by),
        win_prob=pair.win_prob,
        weight=pair.weight,
        views=views,
        chosen_score=pair.chosen_score,
        rejected_score=pair.rejected_score,
        sampled_chosen=pair.chosen.sampler_logps,
    )


def _objection(pair: PreferencePair, tokenized: TokenizedPair, max_tokens: int) -> str:
    """Return why a pair cannot be trained on; "" if it can."""
    sides = ((pair.chosen, tokenized.chosen), (pair.rejected, tokenized.rejected))
    if any(not ids and completion != ABSENT for completion, ids in sides):
        return "a side is empty"
    if tokenized.chosen == tokenized.rejected:
        return "both sides have the same tokens"
    longest = len(tokenized.context) + max(len(tokenized.chosen), len(tokenized.rejected))
    if max(longest, *(len(view.context) + len(view.tokens) for view in tokenized.views), 0) > max_tokens:
        return f"longer than train.max_tokens={max_tokens}"
    return ""


def _sampled_logps(side: Completion, sampled_by: str | None) -> tuple[float, ...] | None:
    if side == ABSENT:
        return ()
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
            worst = max([worst, *(abs(a - b) for a, b in zip(stored, computed, strict=True))])
    return worst


NOTHING = [TokenGroup((0,), ((0,),))]
"""What a rank scores while others have more to score than it has."""


def score_reference(
    model: nn.Module, pairs: Sequence[TokenizedPair], layout: str, tokens_per_batch: int, team: Team = ALONE
) -> list[TokenizedPair]:
    """Return `pairs` with the log-probs of `model` for every completion token, in nats. Computes no gradients.

    The ranks of a `team` share the model's weights: they call this together, each with its own pairs, or none.
    """
    names = [view.name for view in pairs[0].views] if pairs else []
    batches = list(_within_budget(pairs, tokens_per_batch))
    found = [group_by_context(batch, names) for batch in batches]
    logps = list(score_groups(model, [grouped.groups for grouped in found], layout, team))
    scored: list[TokenizedPair] = []
    for batch, grouped, computed in zip(batches, found, logps, strict=True):
        values = rows_of(computed)
        for place, pair in enumerate(batch):
            views = tuple(replace(v, reference=values[grouped.views[v.name][place]]) for v in pair.views)
            chosen, rejected = values[grouped.chosen[place]], values[grouped.rejected[place]]
            scored.append(replace(pair, reference_chosen=chosen, reference_rejected=rejected, views=views))
    return scored


def score_groups(
    model: nn.Module, batches: Sequence[Sequence[TokenGroup]], layout: str, team: Team = ALONE
) -> Iterator[CompletionLogps]:
    """Yield the log-probs of each batch, nats, without gradients.

    The ranks of a `team` share the model's weights: they call this together, each with its own batches, and take all
    that it yields. Who has fewer runs the model on a token meanwhile, as all must run it equally often.
    """
    most = max(team.gathered(len(batches)))
    # A gathered weight that was made in inference mode could not be trained on later.
    quiet = torch.inference_mode if team.size == 1 else torch.no_grad
    for turn in range(most):
        own = turn < len(batches)
        with quiet():
            found = completion_logps(model, batches[turn] if own else NOTHING, layout=layout)
        if own:
            yield found


def rows_of(logps: CompletionLogps) -> list[tuple[float, ...]]:
    """Return each row's log-probs without padding."""
    lengths = logps.mask.sum(-1).tolist()
    return [tuple(row[:n]) for row, n in zip(logps.token_logps.tolist(), lengths, strict=True)]


def _within_budget(pairs: Sequence[TokenizedPair], budget: int) -> Iterable[list[TokenizedPair]]:
    batch: list[TokenizedPair] = []
    used = 0
    for pair in pairs:
        size = len(pair.context) + len(pair.chosen) + len(pair.rejected)
        size += sum(len(view.context) + len(view.tokens) for view in pair.views)
        if batch and used + size > budget:
            yield batch
            batch, used = [], 0
        batch.append(pair)
        used += size
    if batch:
        yield batch
