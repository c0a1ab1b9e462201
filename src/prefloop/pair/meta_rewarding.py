"""Pairs of completions with length control, and pairs of judgements: what Meta-Rewarding learns from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import pvariance
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import JudgedGroup, Judgement, PreferencePair, digest_of, prompt_id


@dataclass(frozen=True)
class MetaRewarding:
    """Pairs for the actor and pairs for the judge, of one policy that is both. Meta-Rewarding, arXiv:2407.19594.

    Actor, one pair for each prompt, with S_max and S_min the highest and the lowest score:

        chosen   = the shortest with a score in [(1 − ρ)·S_max + ρ·S_min, S_max]
        rejected = the longest with a score in [S_min, (1 − ρ)·S_min + ρ·S_max]

    Length is counted in characters. A pair needs a higher score on the chosen side, so from ρ = ½ on, where the bands
    meet, some prompts make none. Equal lengths go by score, then by place.

    Judge: the best against the worst rated judgement of a completion, under the prompt of that judgement; see
    `keep_judgements` and `meta` of judge llm. Judgements that a meta-judge did not rate, or rated equal, make none.

    How sure: the chosen band and its shortest are second-hand; that the rejected side is the longest of a band too, as
    mirrored here, is one summary's. That judgements come from the completion whose scores vary most, that long winning
    ones are dropped, and that only the first rounds have judge pairs, is second-hand too. Not found, and ours: every
    number, and characters as the measure of length.

    Raises:
        ConfigError: a field is out of range.

    """

    rho: float = 0.3
    """ρ, width of the bands as a share of S_max − S_min, in [0, 1]. 0: best against worst. Default ours, not found."""
    judge_pairs: bool = True
    """Whether judgements make pairs. The paper's do in the first two of four rounds."""
    judged: Literal["widest", "all"] = "widest"
    """Whose judgements make a pair. widest: those of the completion over whose score they differ most (variance). all:
    those of each completion."""
    longest_judgement: int | None = None
    """A pair of judgements is dropped if the better one has more characters than this, ≥ 1. Default: no limit; the
    paper has one, its number was not found."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise ConfigError(f"pair_builder.rho (pair/meta_rewarding.py): must be in [0, 1], got {self.rho!r}")
        if self.judged not in ("widest", "all"):
            raise ConfigError(f"pair_builder.judged: must be widest or all, got {self.judged!r}")
        if self.longest_judgement is not None and self.longest_judgement < 1:
            raise ConfigError(f"pair_builder.longest_judgement: must be ≥ 1, got {self.longest_judgement!r}")

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the actor's pair of each group and then the judge's, in the order of `groups`."""
        for group in groups:
            yield from self._actor_pair(group)
            if self.judge_pairs:
                for some in self._judgements(group):
                    yield from self._judge_pair(group, some)

    def _actor_pair(self, group: JudgedGroup) -> Iterator[PreferencePair]:
        scores = {index: score for index, score in enumerate(group.scores) if score is not None}
        if not scores:
            return
        low, high = min(scores.values()), max(scores.values())
        length = [len(completion.text) for completion in group.completions]
        # Rounding must not leave the best or the worst outside of its own band.
        top_from = min(high, (1 - self.rho) * high + self.rho * low)
        bottom_to = max(low, (1 - self.rho) * low + self.rho * high)
        top = [index for index, score in scores.items() if score >= top_from]
        bottom = [index for index, score in scores.items() if score <= bottom_to]
        chosen = min(top, key=lambda index: (length[index], -scores[index], index))
        rejected = min(bottom, key=lambda index: (-length[index], scores[index], index))
        winner, loser = group.completions[chosen], group.completions[rejected]
        if scores[chosen] <= scores[rejected] or (winner.text, winner.media) == (loser.text, loser.media):
            return
        yield PreferencePair(
            pair_id=digest_of(winner.completion_id, loser.completion_id),
            prompt=group.prompt,
            chosen=winner,
            rejected=loser,
            chosen_score=scores[chosen],
            rejected_score=scores[rejected],
            margin=scores[chosen] - scores[rejected],
            win_prob=None if group.win_prob is None else group.win_prob[chosen][rejected],
            weight=1.0,
            builder="meta_rewarding/actor",
            round=group.round,
        )

    def _judgements(self, group: JudgedGroup) -> list[list[Judgement]]:
        """Return the rated judgements of each completion that takes part."""
        rated: dict[int, list[Judgement]] = {}
        for judgement in group.judgements:
            if judgement.rating is not None:
                rated.setdefault(judgement.completion, []).append(judgement)
        if self.judged == "all" or not rated:
            return list(rated.values())
        widest = max(rated, key=lambda index: (_variance(group, index), -index))
        return [rated[widest]]

    def _judge_pair(self, group: JudgedGroup, judgements: Sequence[Judgement]) -> Iterator[PreferencePair]:
        best = max(judgements, key=_rating)
        # Two wordings of one question, as JSON and as text, are two prompts.
        worst = min((j for j in judgements if j.messages == best.messages), key=_rating)
        if _rating(best) <= _rating(worst) or best.judgement.text == worst.judgement.text:
            return
        if self.longest_judgement is not None and len(best.judgement.text) > self.longest_judgement:
            return
        name = prompt_id(best.messages)
        prompt = replace(group.prompt, prompt_id=name, messages=best.messages, gold=None, candidates=(), media=())
        yield PreferencePair(
            pair_id=digest_of(name, best.judgement.completion_id, worst.judgement.completion_id),
            prompt=prompt,
            chosen=best.judgement,
            rejected=worst.judgement,
            chosen_score=best.rating,
            rejected_score=worst.rating,
            margin=_rating(best) - _rating(worst),
            win_prob=None,
            weight=1.0,
            builder="meta_rewarding/judge",
            round=group.round,
        )


def _variance(group: JudgedGroup, index: int) -> float:
    """Return how much the judgements of a completion differ in score."""
    scores = [j.score for j in group.judgements if j.completion == index and j.score is not None]
    return pvariance(scores) if scores else 0.0


def _rating(judgement: Judgement) -> float:
    assert judgement.rating is not None
    return judgement.rating
