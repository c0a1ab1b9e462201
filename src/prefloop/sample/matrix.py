"""Completions of one prompt by several policies: the current one, earlier versions, and models of other sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from prefloop.errors import ConfigError, DataError, SamplerError
from prefloop.models.causal_lm import check_folder, folder_digest, locate
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, Prompt, SampleGroup, digest_of
from prefloop.sample._tokens import foreign_token
from prefloop.sample.hf import Hf


@dataclass(frozen=True)
class Matrix:
    """Draw completions of each prompt from a matrix of policies, as TSO does (arXiv 2409.02118).

    Its cells are the round's own policy, policies that earlier rounds promoted, and smaller models. Each draws
    `completions`; `Completion.source` is the digest of the policy that did. In round 0 there is one version only. A
    policy is drawn from once, however often it was promoted. Random streams of the cells are independent of each
    other; those of the round's own policy are the ones that kind hf would use. Held-out completions are the measured
    policy's alone.

    The two models used last stay in memory: with more than two cells each part of the prompts loads every model
    again, so raise `prompts_per_part` where loading is slow.

    How sure: that versions and sizes span the matrix is from summaries of the paper; how many of each, and how many
    completions, was not found.

    Raises:
        ConfigError: a field is out of range, or a smaller model is not there or cannot be a policy.

    """

    completions: int = 1
    """K: completions of each prompt by each policy of the matrix. ≥ 1; default 1 (ours, not found)."""
    versions: int = 1
    """At most this many earlier promoted policies, the newest of them, ≥ 0. Default 1 (ours, not found)."""
    smaller: tuple[str, ...] = ()
    """Folders or hub ids of smaller models with the policy's tokenizer. Default none."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included. ≥ 1; default 256, as in hf."""
    temperature: float = 1.0
    """Divides the logits. ≥ 0, 0 takes the most probable token; default 1: draws from the policies themselves."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities reach this sum. In (0, 1]; default 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens. ≥ 0; default 0: all tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, as in hf. Default none."""
    batch: int = 64
    """Completions decoded together. ≥ 1; default 64, as in hf."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto` (default): fp32 on CPU, bf16 on CUDA."""
    device: str = "auto"
    """A torch device, or `auto` (default): CUDA where there is one, else CPU."""

    # The content of `smaller`, so that a stage's key notices a changed model.
    smaller_digests: tuple[str, ...] = field(init=False, default=())

    uses_versions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.versions < 0:
            raise ConfigError(f"sampler.versions (sample/matrix.py): must be ≥ 0, got {self.versions!r}")
        object.__setattr__(self, "smaller_digests", tuple(cell.digest for cell in self._sizes))
        _ = self._hf  # refuses what hf refuses

    @cached_property
    def _hf(self) -> Hf:
        """The sampler of every cell."""
        return Hf(
            completions=self.completions,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            batch=self.batch,
            precision=self.precision,
            device=self.device,
        )

    @cached_property
    def _sizes(self) -> tuple[PolicyRef, ...]:
        """The smaller models."""
        found = []
        for index, named in enumerate(self.smaller):
            try:
                folder = locate(named)
                check_folder(folder)
            except (ConfigError, DataError) as error:
                reason = str(error).removeprefix("policy: ")
                raise ConfigError(f"{_place(index)}: {reason}") from error
            found.append(PolicyRef(str(folder), folder_digest(folder), round=-1))
        return tuple(found)

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group for each prompt, in order: first the completions of the round's policy, then those of
        earlier ones, the newest first, then those of smaller models.

        Raises:
            ConfigError: a smaller model has another tokenizer, or a policy cannot be loaded.
            DataError: a policy cannot be loaded, or a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token, or a policy's logits are not finite.

        """
        self.check_policy(context.policy)
        drawn = [self._hf(prompts, context)]
        if context.round >= 0:  # below, a policy is measured on held-out prompts and nothing is trained
            drawn += [self._draw(prompts, cell, context) for cell in self._others(context)]
        return [
            replace(groups[0], completions=tuple(c for group in groups for c in group.completions))
            for groups in zip(*drawn, strict=True)
        ]

    def check_policy(self, policy: PolicyRef) -> None:
        """Refuse smaller models whose tokens are not those of `policy`: their completions would be read wrongly.

        Raises:
            ConfigError: names the model and the first token that differs.

        """
        for index, cell in enumerate(self._sizes):
            foreign = foreign_token(policy.path, policy.digest, cell.path, cell.digest)
            if foreign is not None:
                raise ConfigError(
                    f"{_place(index)}: {self.smaller[index]} has another tokenizer than the policy {policy.path} "
                    f"({foreign}); list models of the policy's own family"
                )

    def _others(self, context: RoundContext) -> list[PolicyRef]:
        """Return the cells beside the round's policy: earlier versions, the newest first, then other sizes."""
        promoted = {v.digest: v for v in reversed(context.versions) if v.digest != context.policy.digest}
        cells = {v.digest: v for v in list(promoted.values())[: self.versions]}
        for cell in self._sizes:
            if cell.digest != context.policy.digest:
                cells.setdefault(cell.digest, cell)
        return list(cells.values())

    def _draw(self, prompts: Sequence[Prompt], cell: PolicyRef, context: RoundContext) -> list[SampleGroup]:
        # Two versions of a policy that shared their random streams would write much the same text.
        seed = int(digest_of("matrix", context.seed, cell.digest), 16) >> 1
        try:
            return self._hf(prompts, replace(context, policy=cell, seed=seed))
        except (ConfigError, DataError, SamplerError) as error:
            if cell not in self._sizes:
                raise
            raise type(error)(f"{_place(self._sizes.index(cell))} ({cell.path}): {error}") from error


def _place(index: int) -> str:
    return f"sampler.smaller[{index}] (sample/matrix.py)"
