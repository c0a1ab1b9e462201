"""Token rewards: what a preference-trained policy says of each token of a completion, beside its reference.

    reward_t = beta · (log π(y_t | s_t) − log π_ref(y_t | s_t))  =  r_t + V*(s_t+1) − V*(s_t)

Eq. 10 of "From r to Q*" (arXiv 2404.12358), exact where π is the optimum of DPO's objective. The value V* is a
potential: many rewards r share one policy, so a token's number is not the reward r of any one of them. What preferences
identify are sums over whole completions, up to a number for the prompt (eq. 8, 9). Numbers of tokens compare within one
state: as alternatives at the same place after the same beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import mean
from typing import Any

import numpy as np

_QUANTILE = 0.98  # of absolute values, where the colours end; a few extreme tokens would leave all others pale
_FEWEST = 50  # tokens below which colours reach to the largest


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """One token: its text as it stands in the completion, log-probs in nats, and its reward.

    `label` is the token's name where it shows no text: an end token, or a part of a character. `shade` is what its
    colour says: the reward, or the centred one.
    """

    token: int
    text: str
    label: str
    policy_logp: float
    reference_logp: float
    reward: float
    shade: float


@dataclass(frozen=True, slots=True)
class StepCredit:
    """A step of a completion: its text, how many tokens it takes, and the sum of their rewards."""

    text: str
    tokens: int
    reward: float


@dataclass(frozen=True, slots=True)
class Credit:
    """A completion with the credit of its tokens. `score` is the judge's or the data's, where there is one."""

    name: str
    text: str
    score: float | None
    tokens: tuple[TokenCredit, ...]
    steps: tuple[StepCredit, ...] = ()

    @property
    def reward(self) -> float:
        """The implicit reward of the completion: the sum over its tokens."""
        return sum(token.reward for token in self.tokens)


@dataclass(frozen=True, slots=True)
class CreditGroup:
    """Completions of one prompt. `prefix` stands before all of them and is not counted: the steps that they share."""

    prompt: str
    prefix: str
    completions: tuple[Credit, ...]

    @property
    def margin(self) -> float | None:
        """Implicit reward of chosen minus rejected; `None` where the completions are not such a pair."""
        named = {credit.name: credit.reward for credit in self.completions}
        return named["chosen"] - named["rejected"] if {"chosen", "rejected"} == named.keys() else None


def token_rewards(policy: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    """Return beta · (log π − log π_ref) of each token.

    Args:
        policy: log-probs under the policy, nats.
        reference: those of the same tokens under the reference, nats.
        beta: strength of the pull to the reference in training.

    Raises:
        ValueError: not one log-prob for each token on both sides.

    Example:
        >>> token_rewards([-1.0, -2.0], [-1.5, -1.0], 0.5)
        [0.25, -0.5]

    """
    return [beta * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True)]


def step_sums(steps: Sequence[tuple[str, int]], rewards: Sequence[float]) -> tuple[StepCredit, ...]:
    """Return the sum of `rewards` over each step, given as text and number of tokens; what is left is a last step.

    Nothing is returned for fewer than two steps.
    """
    if len(steps) < 2:
        return ()
    ends = list(accumulate(count for _, count in steps))
    found = [StepCredit(text, n, sum(rewards[end - n : end])) for (text, n), end in zip(steps, ends, strict=True)]
    if ends[-1] < len(rewards):
        found.append(StepCredit("", len(rewards) - ends[-1], sum(rewards[ends[-1] :])))
    return tuple(found)


def centred(groups: Sequence[CreditGroup]) -> list[CreditGroup]:
    """Return the groups with shades from which the mean over all completions at the same position is taken.

    It takes away what all completions have there in common, such as a rise at the beginning. Rewards stay as they are.
    """
    by_place: dict[int, list[float]] = {}
    for credit in _credits(groups):
        for place, token in enumerate(credit.tokens):
            by_place.setdefault(place, []).append(token.reward)
    means = {place: mean(values) for place, values in by_place.items()}
    return [
        replace(
            group,
            completions=tuple(
                replace(c, tokens=tuple(replace(t, shade=t.reward - means[i]) for i, t in enumerate(c.tokens)))
                for c in group.completions
            ),
        )
        for group in groups
    ]


def shared_scale(groups: Sequence[CreditGroup]) -> float:
    """Return the absolute shade at which colours are strongest: one for all completions; 0 if there is nothing.

    It is the 98 % quantile of absolute shades, or the largest of few tokens; what lies beyond looks like the end.
    """
    shades = [abs(token.shade) for credit in _credits(groups) for token in credit.tokens]
    if not shades:
        return 0.0
    return float(np.quantile(shades, _QUANTILE)) if len(shades) >= _FEWEST else max(shades)


def extremes(credit: Credit, count: int = 3) -> tuple[list[TokenCredit], list[TokenCredit]]:
    """Return the tokens with the largest positive and the largest negative shades."""
    ranked = sorted(credit.tokens, key=lambda token: token.shade)
    most = [token for token in reversed(ranked[-count:]) if token.shade > 0]
    least = [token for token in ranked[:count] if token.shade < 0]
    return most, least


def group_json(group: CreditGroup) -> dict[str, Any]:
    """Return a group as `credit.json` holds it; see docs/credit.md for the fields."""
    return {
        "prompt": group.prompt,
        "prefix": group.prefix,
        "margin": group.margin,
        "completions": [
            {
                "name": credit.name,
                "text": credit.text,
                "score": credit.score,
                "reward": credit.reward,
                "policy_logp": sum(token.policy_logp for token in credit.tokens),
                "reference_logp": sum(token.reference_logp for token in credit.tokens),
                "tokens": [
                    {
                        "token": token.token,
                        "text": token.text or token.label,
                        "reward": token.reward,
                        "shade": token.shade,
                        "policy_logp": token.policy_logp,
                        "reference_logp": token.reference_logp,
                    }
                    for token in credit.tokens
                ],
                "steps": [{"text": s.text, "tokens": s.tokens, "reward": s.reward} for s in credit.steps],
            }
            for credit in group.completions
        ],
    }


def _credits(groups: Sequence[CreditGroup]) -> Iterator[Credit]:
    return (credit for group in groups for credit in group.completions)
