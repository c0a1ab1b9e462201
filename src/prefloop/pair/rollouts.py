"""Every completion of a round with its score: what policy-gradient trainers learn from."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from prefloop.errors import ConfigError, DataError
from prefloop.protocols import RoundContext
from prefloop.rows import ABSENT, GOLD, Completion, JudgedGroup, PreferencePair, digest_of


@dataclass(frozen=True)
class Rollouts:
    """One-sided pairs: each sampled completion as the chosen side, with its score and the sampler's log-probs.

    For `trainer.kind` ppo and group_advantage, with `loss.kind=rollout_kl`. A completion that was drawn k times for one
    prompt, token by token the same, is one row of weight k. A completion without a score is left out.

    Completions must be draws from the policy itself, at temperature 1 and from all tokens: the ratio of new to old
    probabilities is that of the drawing distribution only there. Other samplers are refused.

    Raises:
        ConfigError: a field is out of range.

    """

    min_group: int = 1
    """Prompts with fewer scored completions are left out, ≥ 1. Group baselines (RLOO, GRPO) need 2."""
    unfinished: float | None = None
    """Score of a completion that was cut at the length limit, instead of the judge's. None: the judge's. The code of
    arXiv 2406.09279 has −10."""

    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.min_group < 1:
            raise ConfigError(f"pair_builder.min_group: must be ≥ 1, got {self.min_group}")
        if self.unfinished is not None and not math.isfinite(self.unfinished):
            raise ConfigError(f"pair_builder.unfinished: must be a number or null, got {self.unfinished}")

    def check_sampler(self, sampler: object) -> None:
        """Refuse a sampler that does not draw from the policy itself, or too few completions for `min_group`."""
        drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for name, value in drawn.items():
            found = getattr(sampler, name, value)
            if found != value:
                raise ConfigError(
                    f"sampler.{name}: {found}, but pair_builder.kind rollouts needs draws from the policy itself; set "
                    f"sampler.{name}={value:g}"
                )
        if not getattr(sampler, "draws_from_policy", True):
            raise ConfigError(
                f"sampler.kind: {type(sampler).__name__} searches or steers, and its completions are no draws from the "
                "policy itself, which pair_builder.kind rollouts needs; set sampler.kind=hf"
            )
        count = getattr(sampler, "completions", self.min_group)
        if count < self.min_group:
            raise ConfigError(
                f"sampler.completions: {count}, but pair_builder.min_group is {self.min_group}; raise the former"
            )

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield one-sided pairs, in the order of `groups`.

        Raises:
            DataError: a completion has no log-probs of its sampler.

        """
        for group in groups:
            found = list(self._scored(group))
            if len(found) >= self.min_group:
                yield from self._pairs(group, found)

    def _scored(self, group: JudgedGroup) -> Iterator[tuple[Completion, float]]:
        for completion, score in zip(group.completions, group.scores, strict=True):
            if score is None or completion.source == GOLD:
                continue
            if completion.sampler_logps is None or completion.token_ids is None:
                raise DataError(
                    f"pair_builder.kind rollouts: completion {completion.completion_id} of prompt "
                    f"{group.prompt.prompt_id} has no sampler log-probs; draw completions with sampler.kind=hf"
                )
            cut = self.unfinished is not None and completion.finish_reason == "length"
            yield completion, self.unfinished if cut and self.unfinished is not None else score

    def _pairs(self, group: JudgedGroup, found: list[tuple[Completion, float]]) -> Iterator[PreferencePair]:
        kept: dict[object, list[tuple[Completion, float]]] = {}
        for completion, score in found:
            kept.setdefault((completion.text, completion.token_ids), []).append((completion, score))
        for same in kept.values():
            completion, score = same[0]
            yield PreferencePair(
                pair_id=digest_of(completion.completion_id, ABSENT.completion_id),
                prompt=group.prompt,
                chosen=completion,
                rejected=ABSENT,
                chosen_score=score,
                rejected_score=None,
                margin=0.0,
                win_prob=None,
                weight=float(len(same)),
                builder="rollouts",
                round=group.round,
            )
