"""Scores by the implicit reward of a preference-trained policy: how much more likely it makes the completion."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from prefloop.errors import ConfigError, DataError
from prefloop.models.causal_lm import CausalLM, encode_completion, encode_prompt, load
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class ImplicitReward:
    """DPO's implicit reward (Rafailov et al. 2023, arXiv:2305.18290, section 4) as a judge.

        r(x, y) = beta · (log π_policy(y | x) − log π_reference(y | x)), summed over the tokens of y

    Departs from the paper: none; the prompt-only term beta · log Z(x) is the same for all completions of a prompt and
    left out, so scores of different prompts do not compare.

    A completion's text is tokenized with the policy's tokenizer, and ends in its end token if the completion stopped
    by itself. A completion has no score, and a note, if it has no tokens, if it is longer with its prompt than the
    models take, or if the reward is not finite. The models are loaded on first use and kept.

    Raises:
        ConfigError: a field is out of range; on loading: no such folder or hub id, or twice the same model.
        DataError: on loading: a folder that is not a causal language model, or different vocabularies.

    """

    policy: str
    """Folder or hub id of a policy trained with a preference loss."""
    reference: str
    """Folder or hub id of the reference it was trained against."""
    beta: float = 0.1
    """Pull to the reference, > 0. The unit of the score is beta nats; 0.1 is the paper's default."""
    batch_tokens: int = 8192
    """At most this many tokens in one forward pass; a longer single completion with its prompt goes alone."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one; or cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        for name, path in (("policy", self.policy), ("reference", self.reference)):
            if not path:
                raise ConfigError(f"judge.{name}: empty; name a folder or hub id")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"judge.beta: must be a number > 0, got {self.beta!r}")
        if self.batch_tokens < 1:
            raise ConfigError(f"judge.batch_tokens: must be ≥ 1, got {self.batch_tokens!r}")

    @cached_property
    def models(self) -> tuple[CausalLM, CausalLM]:
        """Policy and reference. A preflight check may ask for them before there is anything to score."""
        policy, reference = self._load("policy", self.policy), self._load("reference", self.reference)
        if policy.digest == reference.digest:
            raise ConfigError(
                f"judge.reference: {self.reference} is the same model as judge.policy, so every score would be 0; "
                "name the model that the policy was trained against"
            )
        if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            raise DataError(
                f"judge.reference: {self.reference} has another vocabulary than {self.policy}; their log-probabilities "
                "do not compare"
            )
        return policy, reference

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order.

        Raises:
            DataError: a prompt cannot be tokenized, or the policy's tokenizer has no end token.

        """
        return [self._judge(group) for group in groups]

    def _load(self, field: str, path: str) -> CausalLM:
        try:
            return load(path, precision=self.precision, device=self.device)
        except ConfigError as error:
            raise ConfigError(f"judge.{field}: {str(error).removeprefix('policy: ')}") from error

    def _judge(self, group: SampleGroup) -> Verdict:
        tokenizer = self.models[0].tokenizer
        prompt = tuple(encode_prompt(tokenizer, group.prompt))
        completions = [
            tuple(encode_completion(tokenizer, c.text, stop=c.finish_reason == "stop")) for c in group.completions
        ]
        notes = [self._refusal(len(prompt), len(ids)) for ids in completions]
        scores: list[float | None] = [None] * len(completions)
        usable = [index for index, note in enumerate(notes) if note is None]
        for batch in _batches(usable, len(prompt), completions, self.batch_tokens):
            rewards = self._rewards(TokenGroup(prompt, tuple(completions[index] for index in batch)))
            for index, reward in zip(batch, rewards, strict=True):
                if math.isfinite(reward):
                    scores[index] = reward
                else:
                    notes[index] = f"the implicit reward is {reward}"
        return Verdict(tuple(scores), tuple(notes))

    def _refusal(self, prompt: int, completion: int) -> str | None:
        if completion == 0:
            return "the completion has no tokens"
        limits = [_positions(lm) for lm in self.models]
        if any(limit is not None and prompt + completion > limit for limit in limits):
            return f"prompt and completion have {prompt} + {completion} tokens, more than the models take ({limits})"
        return None

    @torch.no_grad()
    def _rewards(self, group: TokenGroup) -> list[float]:
        policy, reference = (completion_logps(lm.model, [group]).total.double() for lm in self.models)
        rewards: list[float] = (self.beta * (policy - reference)).tolist()
        return rewards


def _positions(lm: CausalLM) -> int | None:
    positions: int | None = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def _batches(
    indices: Sequence[int], prompt: int, completions: Sequence[Sequence[int]], budget: int
) -> Iterator[list[int]]:
    """Yield runs of `indices` whose completions fit the budget, each counted with the prompt: no layout needs more."""
    batch: list[int] = []
    width = 0
    for index in indices:
        width = max(width, prompt + len(completions[index]))
        if batch and (len(batch) + 1) * width > budget:
            yield batch
            batch, width = [], prompt + len(completions[index])
        batch.append(index)
    if batch:
        yield batch
