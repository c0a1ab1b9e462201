"""How likely a language model finds each of two words after a text: what judges that write nothing are read off."""

import math
from collections.abc import Iterator, Sequence

import torch

from prefloop.errors import DataError
from prefloop.models.causal_lm import CausalLM, encode_completion
from prefloop.models.logps import TokenGroup, completion_logps

Logps = tuple[tuple[float, ...], tuple[float, ...]]
"""Log-probs of the tokens of the first and of the second word, nats."""


def word_ids(lm: CausalLM, words: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of two words as they follow a text.

    Raises:
        DataError: a word has none, or both have the same.

    """
    first, second = (tuple(encode_completion(lm.tokenizer, word, stop=False)) for word in words)
    if not first or not second or first == second:
        raise DataError(f"{lm.path}: the tokenizer has the same tokens for {words[0]!r} and {words[1]!r}")
    return first, second


def word_logps(
    lm: CausalLM, contexts: Sequence[tuple[int, ...]], words: tuple[tuple[int, ...], tuple[int, ...]], batch_tokens: int
) -> list[Logps | None]:
    """Return the log-probs of both words after each context; `None` where that is too long or they are not finite.

    Contexts of similar length go together, at most `batch_tokens` tokens in one forward pass.
    """
    groups = [TokenGroup(context, words) for context in contexts]
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    fitting = [index for index, group in enumerate(groups) if longest is None or _length(group) <= longest]
    fitting.sort(key=lambda index: _length(groups[index]))
    found: list[Logps | None] = [None] * len(groups)
    for batch in _batches(fitting, groups, batch_tokens):
        with torch.no_grad():
            logps = completion_logps(lm.model, [groups[index] for index in batch])
        rows = [tuple(row[mask].tolist()) for row, mask in zip(logps.token_logps, logps.mask, strict=True)]
        for place, index in enumerate(batch):
            pair = rows[2 * place], rows[2 * place + 1]
            found[index] = pair if math.isfinite(log_odds(pair)) else None
    return found


def log_odds(logps: Logps) -> float:
    """Return log π(first word) − log π(second word), nats."""
    return math.fsum(logps[0]) - math.fsum(logps[1])


def _length(group: TokenGroup) -> int:
    return len(group.context) + max(map(len, group.completions))


def _batches(indices: Sequence[int], groups: Sequence[TokenGroup], budget: int) -> Iterator[list[int]]:
    """Yield runs of `indices`, the shortest first, in which two rows of the longest length for each fit the budget."""
    batch: list[int] = []
    for index in indices:
        if batch and 2 * (len(batch) + 1) * _length(groups[index]) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
