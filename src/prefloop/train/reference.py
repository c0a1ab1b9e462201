"""Pairs to token ids, and the reference's log-probs beside them, stored once for each reference and content."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import Completion, PreferencePair, Prompt, TokenizedPair
from prefloop.tensors import CompletionLogps


@dataclass
class Tokenized:
    """Pairs as token ids, and how many were dropped for which reason."""

    pairs: list[TokenizedPair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    encode_prompt: Callable[[Prompt], list[int]],
    encode_completion: Callable[[Completion], list[int]],
    max_tokens: int,
) -> Tokenized:
    """Tokenize each side once. A sampled completion keeps the ids it was sampled with.

    A pair is dropped, and counted, when a side is empty, both sides have the same ids, or the prompt and the longer
    side exceed `max_tokens`. Nothing is truncated: a cut completion teaches the wrong end.
    """
    result = Tokenized()
    for pair in pairs:
        context = tuple(encode_prompt(pair.prompt))
        chosen = tuple(encode_completion(pair.chosen))
        rejected = tuple(encode_completion(pair.rejected))
        if not chosen or not rejected:
            result.dropped["a side is empty"] += 1
        elif chosen == rejected:
            result.dropped["both sides have the same tokens"] += 1
        elif len(context) + max(len(chosen), len(rejected)) > max_tokens:
            result.dropped[f"longer than train.max_tokens={max_tokens}"] += 1
        else:
            result.pairs.append(
                TokenizedPair(pair.pair_id, context, chosen, rejected, None, None, pair.win_prob, pair.weight)
            )
    return result


def score_reference(
    model: nn.Module, pairs: Sequence[TokenizedPair], layout: str, tokens_per_batch: int
) -> list[TokenizedPair]:
    """Return `pairs` with the log-probs of `model` for every completion token, in nats. Computes no gradients."""
    scored: list[TokenizedPair] = []
    for batch in _within_budget(pairs, tokens_per_batch):
        groups = [TokenGroup(p.context, (p.chosen, p.rejected)) for p in batch]
        with torch.inference_mode():
            logps = completion_logps(model, groups, layout=layout)
        values = rows_of(logps)
        for index, pair in enumerate(batch):
            scored.append(replace(pair, reference_chosen=values[2 * index], reference_rejected=values[2 * index + 1]))
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
