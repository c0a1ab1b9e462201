"""Evaluation judge: how likely a fixed language model that no method trains or samples from finds a completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from prefloop.models.causal_lm import CausalLM, encode_completion, encode_prompt, load
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext
from prefloop.rows import SampleGroup, Verdict


@dataclass(frozen=True)
class Fluency:
    """Mean log-probability of the completion's tokens after its prompt, nats per token, drawn to `prior` if few.

    Tokens are those of the judge's tokenizer. The end of a completion is not scored, so that a cut text and one that
    ended are treated alike. A completion that is longer than the judge reads has no score.
    """

    path: str
    """A `save_pretrained` folder of a causal language model: stories260K in the story world."""
    prior_tokens: float = 100.0
    """So many tokens of average text are thought to follow, ≥ 0, so that a short text cannot win by luck."""
    prior: float = -1.2
    """Log-probability of such a token, nats: what the story model's own completions have."""

    @cached_property
    def lm(self) -> CausalLM:
        """The judge's model, kept apart from the two that `load` keeps for policies."""
        loaded = load(self.path, precision="fp32", device="cpu", cache=False)
        loaded.model.requires_grad_(False)
        return loaded

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order."""
        return [self._judge(group) for group in groups]

    def _judge(self, group: SampleGroup) -> Verdict:
        tokenizer = self.lm.tokenizer
        prompt = tuple(encode_prompt(tokenizer, group.prompt))
        encoded = [tuple(encode_completion(tokenizer, c.text, stop=False)) for c in group.completions]
        longest = self.lm.model.config.max_position_embeddings
        usable = [i for i, ids in enumerate(encoded) if ids and len(prompt) + len(ids) <= longest]
        scores: list[float | None] = [None if ids else self.prior for ids in encoded]
        if usable:
            with torch.inference_mode():
                found = completion_logps(self.lm.model, [TokenGroup(prompt, tuple(encoded[i] for i in usable))])
            for index, total in zip(usable, found.total.tolist(), strict=True):
                scores[index] = self._drawn(total, len(encoded[index]))
        notes = tuple("longer than the judge reads" if score is None else None for score in scores)
        return Verdict(tuple(scores), notes)

    def _drawn(self, total: float, tokens: int) -> float:
        return (total + self.prior_tokens * self.prior) / (tokens + self.prior_tokens)
