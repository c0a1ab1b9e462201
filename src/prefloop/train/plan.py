"""Which pairs make which optimizer step: an order that is drawn, not stored, so that it costs little at any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import ConfigError
from prefloop.rows import TokenizedPair

Step = list[list[int]]
"""Microbatches of indices of pairs."""
WINDOW = 64
"""Parts on disk that are shuffled together, and the most that are held in memory at once."""
KNOWN_STEPS = 2000
"""Up to this many steps, the largest microbatch is looked for in every one of them."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers do not fall to 0


@dataclass(frozen=True)
class PairIndex:
    """What a plan needs to know of each pair.

    `lengths` are the tokens of context, chosen, rejected, and of all views with their contexts, int32 `[pair, 4]`;
    `owners` a number for each context, int64 `[pair]`, the same for pairs of one prompt; `starts` the first pair of
    each part on disk, and their total.
    """

    lengths: NDArray[np.int32]
    owners: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair]) -> "PairIndex":
        """Return the index of pairs that are in memory."""
        lengths = [(len(p.context), len(p.chosen), len(p.rejected), view_tokens(p)) for p in pairs]
        ids = np.fromiter((token for p in pairs for token in p.context), np.int64)
        numbers = context_numbers(ids, np.array([len(p.context) for p in pairs], np.int64))
        return cls.of_lengths(lengths, numbers)

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[Sequence[int]], owners: Sequence[int] | NDArray[np.int64] | None
    ) -> "PairIndex":
        """Return the index of pairs of these `lengths`; `None`: every pair has a prompt of its own."""
        table = np.asarray(lengths, np.int32).reshape(-1, 4)
        numbers = np.arange(len(table)) if owners is None else np.asarray(owners, np.int64)
        return cls(table, numbers, np.array([0, len(table)], np.int64))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.lengths)

    def apart(self) -> "PairIndex":
        """Return the index in which every pair has a prompt of its own."""
        return PairIndex(self.lengths, np.arange(len(self)), self.starts)


def context_numbers(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number for each context, the same for the same token ids: a polynomial in them, modulo 2^64.

    Args:
        ids: the contexts' token ids, one context after another, int `[token]`.
        lengths: tokens of each context, int `[pair]`.

    """
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(ids)) - np.repeat(starts, lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _BASE, np.uint64))
    sums = np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers[place], dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    numbers: NDArray[np.int64] = (sums[starts + lengths] - sums[starts]).astype(np.int64)
    return numbers


def view_tokens(pair: TokenizedPair) -> int:
    """Return the tokens of a pair's views, each with its context."""
    return sum(len(view.context) + len(view.tokens) for view in pair.views)


@dataclass(frozen=True)
class Plan(Sequence[Step]):
    """Steps of microbatches of indices of pairs.

    Each epoch holds every pair once, in an order drawn from (seed, epoch); its last step may be short. Prompts are
    shuffled, and the pairs of one prompt follow each other, so that they share its computation. Inside a step prompts
    of similar size stand together, and a microbatch holds at most `budget` tokens, counted as the shared layout
    computes them: a context once, and every completion. A larger pair is a microbatch of its own. The budget changes
    microbatches only: the pairs of a step are the same for every budget.

    Data of more than `WINDOW` parts are shuffled by parts first and then within windows of that many parts, so that
    reading in the plan's order opens each part once an epoch.

    Raises:
        ConfigError: pairs_per_step, epochs or budget is below 1.

    """

    pairs: PairIndex
    pairs_per_step: int
    epochs: int
    seed: int
    budget: int
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settings = {
            "pairs_per_step": self.pairs_per_step,
            "epochs": self.epochs,
            "tokens_per_microbatch": self.budget,
        }
        for name, value in settings.items():
            if value < 1:
                raise ConfigError(f"train.{name} (train/plan.py): must be ≥ 1, got {value}")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the pairs."""
        return -(-len(self.pairs) // self.pairs_per_step)

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return self.epochs * self.steps_per_epoch

    @overload
    def __getitem__(self, step: int) -> Step: ...
    @overload
    def __getitem__(self, step: slice) -> list[Step]: ...
    def __getitem__(self, step: int | slice) -> Step | list[Step]:
        """Return the microbatches of an optimizer step."""
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[place * self.pairs_per_step :][: self.pairs_per_step]
        return list(self.cut(self._by_size(chosen).tolist(), self.budget))

    def longest(self) -> list[int]:
        """Return the microbatch with the most tokens; of a long plan, the most among steps of the longest pairs."""
        tokens = self.pairs.lengths.sum(1)
        steps = np.arange(len(self))
        if len(self) > KNOWN_STEPS:
            wanted = np.argsort(tokens)[-self.pairs_per_step :]
            steps = np.unique(np.flatnonzero(np.isin(self._order(0), wanted)) // self.pairs_per_step)
        batches = [batch for step in steps.tolist() for batch in self[step]]
        return max(batches, key=lambda batch: int(tokens[batch].sum()))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return all pairs in the order of `epoch`. Only the last one asked for is kept."""
        if epoch not in self._orders:
            stream = np.random.default_rng((self.seed, epoch))
            order = [self._shuffled(window, stream) for window in self._windows(stream)]
            self._orders.clear()
            self._orders[epoch] = np.concatenate(order) if order else np.zeros(0, np.int64)
        return self._orders[epoch]

    def _windows(self, stream: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        starts = self.pairs.starts
        parts = len(starts) - 1
        order = np.arange(parts) if parts <= WINDOW else stream.permutation(parts)
        for begin in range(0, parts, WINDOW):
            yield np.concatenate([np.arange(starts[p], starts[p + 1]) for p in order[begin : begin + WINDOW]])

    def _shuffled(self, pairs: NDArray[np.int64], stream: np.random.Generator) -> NDArray[np.int64]:
        """Return `pairs` with their prompts in random order, each prompt's pairs in their own order."""
        _, first, group = np.unique(self.pairs.owners[pairs], return_index=True, return_inverse=True)
        by_appearance = np.argsort(np.argsort(first))  # number groups as they first appear
        place = np.argsort(stream.permutation(len(first)))
        return pairs[np.argsort(place[by_appearance[group]], kind="stable")]

    def _by_size(self, step: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a step's pairs with prompts of similar size side by side, each prompt's pairs in their own order."""
        _, group = np.unique(self.pairs.owners[step], return_inverse=True)
        largest = np.zeros(len(step), np.int64)
        np.maximum.at(largest, group, self.pairs.lengths[step].sum(1))
        first = np.full(len(step), len(self.pairs))
        np.minimum.at(first, group, step)
        return step[np.lexsort((step, first[group], largest[group]))]

    def tokens(self, pairs: Sequence[int]) -> int:
        """Return the tokens of some pairs, each with its own context."""
        return int(self.pairs.lengths[list(pairs)].sum())

    def cut(self, step: Sequence[int], budget: int) -> Iterator[list[int]]:
        """Yield the microbatches of at most `budget` tokens that pairs in this order make."""
        lengths, owners = self.pairs.lengths[step].tolist(), self.pairs.owners[step].tolist()
        batch: list[int] = []
        used, last = 0, None
        for pair, (context, *completions), owner in zip(step, lengths, owners, strict=True):
            cost = sum(completions) + (0 if batch and owner == last else context)
            if batch and used + cost > budget:
                yield batch
                batch, used, cost = [], 0, context + sum(completions)
            batch.append(pair)
            used += cost
            last = owner
        yield batch
