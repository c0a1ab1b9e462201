"""Several pairs of each prompt, easy ones first: the curriculum of Curry-DPO (arXiv 2403.07230)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, JudgedGroup, PreferencePair, digest_of

Scored = tuple[float, Completion]


@dataclass(frozen=True)
class Curriculum:
    """Each prompt's best completion against each worse one; round t trains on the t-th easiest share of these pairs.

    Easy means a large gap between the two, in score or in log-prob under the run's first policy. Ties with the best in
    score make no pair; other ties go by text, so that the order in which a prompt's completions stand in the data does
    not matter. After `steps` rounds the curriculum starts again.

    The construction is known from third-party descriptions of the paper; its hyper-parameters were not found. The
    log-prob gap is recalled from it, and how it is normalised was not found: sums over tokens are our reading.
    `scope: global` is the natural variant of it, not the paper's own text.
    """

    steps: int = 3
    """Rounds from the easiest pairs to the hardest, ≥ 1; default 3, as many as four responses give pairs."""
    scope: Literal["prompt", "global"] = "prompt"
    """prompt: round t takes each prompt's t-th easiest pair, and a prompt with fewer pairs sits out. global: all
    pairs are sorted together and cut into `steps` parts of equal size."""

    by: Literal["rating", "logp"] = "rating"
    """rating: easy is a large gap in score. logp: easy is a chosen completion that the first policy finds much likelier
    than the rejected one, log π(chosen) − log π(rejected)."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"pair_builder.steps (pair/curriculum.py): must be ≥ 1, got {self.steps}")

    @property
    def needs_logps(self) -> bool:
        """Whether it reads log-probs under the first policy."""
        return self.by == "logp"

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the pairs of round `context.round`."""
        step = context.round % self.steps
        ladders = (self._ladder(group, context) for group in groups)
        if self.scope == "prompt":
            yield from (ladder[step] for ladder in ladders if step < len(ladder))
            return
        pairs = sorted((pair for ladder in ladders for pair in ladder), key=self._ease(context))
        yield from pairs[len(pairs) * step // self.steps : len(pairs) * (step + 1) // self.steps]

    def _ease(self, context: RoundContext) -> Callable[[PreferencePair], tuple[float, str, str]]:
        def gap(pair: PreferencePair) -> float:
            if not self.needs_logps:
                return pair.margin
            return context.logps[pair.chosen.completion_id] - context.logps[pair.rejected.completion_id]

        return lambda pair: (-gap(pair), pair.prompt.prompt_id, pair.rejected.text)

    def _ladder(self, group: JudgedGroup, context: RoundContext) -> list[PreferencePair]:
        """Return the pairs of one prompt, the easiest first; of completions of one text the best scored counts."""
        scored = [(s, c) for s, c in zip(group.scores, group.completions, strict=True) if s is not None]
        scored.sort(key=_best_first)
        first: dict[str, Scored] = {}
        for item in scored:
            first.setdefault(item[1].text, item)
        ranked = list(first.values())
        if not ranked:
            return []
        best_score, best = ranked[0]
        pairs = [
            PreferencePair(
                pair_id=digest_of(best.completion_id, other.completion_id),
                prompt=group.prompt,
                chosen=best,
                rejected=other,
                chosen_score=best_score,
                rejected_score=score,
                margin=best_score - score,
                win_prob=None,
                weight=1.0,
                builder=f"curriculum/{self.scope}",
                round=context.round,
            )
            for score, other in ranked[1:]
            if score < best_score
        ]
        return sorted(pairs, key=self._ease(context))


def _best_first(item: Scored) -> tuple[float, str, str]:
    score, completion = item
    return -score, completion.text, completion.completion_id
