"""Draw n completions and keep those that the policy itself finds most probable."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup
from prefloop.sample.hf import Hf


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n by the policy's likelihood: of n draws the K with the largest Σ log π(token), end token included.

    The other search by likelihood beside `beam` (eq. 13 of "From r to Q*", arXiv 2404.12358, says what it stands for);
    the paper searches with beams only, so this one is a reading. Sums, not means: a long completion pays for every
    token. The draws are those of hf with the same seed; with n = K they are all kept, and only their order changes.

    What is kept is no draw from the policy, so it carries no sampler log-probs, and estimates that need draws, such as
    `kl_policy_start`, are left out.

    Raises:
        ConfigError: a field is out of range.

    """

    completions: int = 1
    """K: completions of each prompt that are kept, the most probable first. 1 to `n`; default 1."""
    n: int = 8
    """Completions of each prompt that are drawn, ≥ 1. Default 8 (ours)."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included, ≥ 1."""
    temperature: float = 1.0
    """Divides the logits that are drawn from, ≥ 0; 0 draws the most probable token n times over. Ranking is at 1."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens, ≥ 0; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, as in hf."""
    batch: int = 64
    """Completions decoded together, ≥ 1."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA."""
    device: str = "auto"
    """A torch device, or `auto`: CUDA where there is one, else CPU."""

    draws_from_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"sampler.n (sample/best_of_n.py): must be ≥ 1, got {self.n!r}; set sampler.n")
        if not 1 <= self.completions <= self.n:
            raise ConfigError(
                f"sampler.completions (sample/best_of_n.py): must be between 1 and sampler.n={self.n}, got "
                f"{self.completions!r}; set sampler.n or sampler.completions"
            )
        _ = self._hf  # refuses what hf refuses

    @cached_property
    def _hf(self) -> Hf:
        return Hf(
            completions=self.n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            batch=self.batch,
            precision=self.precision,
            device=self.device,
        )

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order, the most probable completion first.

        Raises:
            ConfigError, DataError, SamplerError: as `hf` does.

        """
        groups = self._hf(prompts, context)
        return [replace(group, completions=self._best(group.completions)) for group in groups]

    def _best(self, drawn: Sequence[Completion]) -> tuple[Completion, ...]:
        ranked = sorted(drawn, key=lambda completion: -sum(completion.sampler_logps or ()))
        return tuple(replace(completion, sampler_logps=None) for completion in ranked[: self.completions])
