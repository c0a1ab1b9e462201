"""Completions that the prompts bring with them: an existing preference data set instead of a sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefloop.errors import ConfigError, DataError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup, digest_of

GIVEN = "given"
"""Source of a completion that came with the prompt and does not say where from."""


@dataclass(frozen=True)
class Given:
    """Return each prompt's own candidates, in the order of the data.

    Candidates are the columns `chosen` and `rejected`, or `completions` with `scores`: see `prompts/dataset.py`. They
    have no token ids; the trainer encodes them, with the end-of-sequence token.
    """

    completions: int = 0
    """At most this many of each prompt's candidates, ≥ 0; 0 (default): all of them."""

    # Nothing is drawn, so these are no settings.
    temperature: ClassVar[float] = 1.0
    top_p: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.completions < 0:
            raise ConfigError(f"sampler.completions (sample/given.py): must be ≥ 0, got {self.completions}")

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group for each prompt, in order.

        Raises:
            DataError: a prompt has no candidates.

        """
        self.check_prompts(prompts, 0)
        return [self._group(prompt, context) for prompt in prompts]

    def check_prompts(self, prompts: Sequence[Prompt], rounds: int) -> None:
        """Raise DataError if a prompt has no candidates; the number of rounds does not matter."""
        for prompt in prompts:
            if not prompt.candidates:
                raise DataError(
                    f"{prompt.source}: no completions to choose from; give the columns chosen and rejected, or "
                    "completions and scores, or sample them with sampler.kind=hf"
                )

    def _group(self, prompt: Prompt, context: RoundContext) -> SampleGroup:
        chosen = prompt.candidates[: self.completions] if self.completions else prompt.candidates
        completions = tuple(
            Completion(
                completion_id=digest_of(GIVEN, prompt.prompt_id, index, candidate.text),
                text=candidate.text,
                token_ids=None,
                sampler_logps=None,
                finish_reason="stop",
                seed=0,
                source=candidate.source or GIVEN,
            )
            for index, candidate in enumerate(chosen)
        )
        return SampleGroup(prompt, completions, GIVEN, context.round, self.temperature, self.top_p)
