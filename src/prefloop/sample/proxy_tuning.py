"""Proxy tuning: a large policy, steered at every token by what tuning did to a small model."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from prefloop.errors import ConfigError, DataError
from prefloop.models.causal_lm import CausalLM, check_folder, folder_digest, locate
from prefloop.models.decoding import decoding
from prefloop.models.decoding_batch import DecodingBatch
from prefloop.models.decoding_llama import lean_step
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, Prompt, SampleGroup, digest_of
from prefloop.sample._decoder import load_decoder
from prefloop.sample._tokens import foreign_token
from prefloop.sample.hf import Hf, NewBatch

_FILE = "sample/proxy_tuning.py"


@dataclass(frozen=True)
class ProxyTuning:
    """Draw from the policy with the log-ratio of a tuned and an untuned small model added to its logits.

        π(a | s)  ∝  policy(a | s) · (tuned(a | s) / untuned(a | s))^beta
        logits    =  logits(policy) + beta · (logits(tuned) − logits(untuned))

    Eq. 14 of "From r to Q*" (arXiv 2404.12358), which reads the tuned model's log-ratio as a token's advantage. Only
    token by token is this the product; it is not the best policy for the small models' reward over whole texts, which
    would need the large model's own values. With `untuned` the policy itself and beta 1, it is `tuned`.

    The three models share one vocabulary. `sampler_logps` are of the distribution that is drawn from at temperature 1,
    and `source` names its three models and beta, so that no stage takes them for the policy's own.

    Raises:
        ConfigError: a field is out of range, or a model is not there or cannot be a policy.

    """

    tuned: str
    """Folder or hub id of a small model after tuning."""
    untuned: str
    """Folder or hub id of the same small model before it."""
    beta: float = 1.0
    """How far to steer: 0 is the policy alone, negative values steer away. Default 1: the log-ratio as it is."""
    completions: int = 4
    """K: completions for each prompt, ≥ 1; default 4, as in hf."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included, ≥ 1."""
    temperature: float = 1.0
    """Divides the sum of the logits, ≥ 0; 0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens, ≥ 0; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, as in hf."""
    batch: int = 64
    """Completions decoded together, ≥ 1."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA. Of all three models."""
    device: str = "auto"
    """A torch device, or `auto`: CUDA where there is one, else CPU."""

    # The content of both folders, so that a stage's key notices a changed model.
    digests: tuple[str, ...] = field(init=False, default=())

    draws_from_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isfinite(self.beta):
            raise ConfigError(f"sampler.beta ({_FILE}): must be a number, got {self.beta!r}; set sampler.beta")
        object.__setattr__(self, "digests", tuple(model.digest for model in self._small))
        if self.digests[0] == self.digests[1]:
            raise ConfigError(
                f"sampler.untuned ({_FILE}): {self.untuned} is the same model as sampler.tuned, so nothing would be "
                "steered; name the model from before tuning"
            )
        _ = self._hf  # refuses what hf refuses

    @cached_property
    def _hf(self) -> Hf:
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
    def _small(self) -> tuple[PolicyRef, PolicyRef]:
        """The tuned and the untuned model."""
        return self._found("tuned", self.tuned), self._found("untuned", self.untuned)

    @cached_property
    def _loaded(self) -> tuple[CausalLM, CausalLM]:
        """Both on their device, kept as long as this sampler: `load` itself keeps only two."""
        tuned, untuned = (load_decoder(model.path, self.precision, self.device) for model in self._small)
        return tuned, untuned

    def _found(self, name: str, named: str) -> PolicyRef:
        try:
            folder = locate(named)
            check_folder(folder)
        except (ConfigError, DataError) as error:
            raise ConfigError(f"sampler.{name} ({_FILE}): {str(error).removeprefix('policy: ')}") from error
        return PolicyRef(str(folder), folder_digest(folder), round=-1)

    def check_policy(self, policy: PolicyRef) -> None:
        """Refuse small models whose tokens are not those of `policy`.

        Raises:
            ConfigError: names the model and the first token that differs.

        """
        for name, model in zip(("tuned", "untuned"), self._small, strict=True):
            foreign = foreign_token(policy.path, policy.digest, model.path, model.digest)
            if foreign is not None:
                raise ConfigError(
                    f"sampler.{name} ({_FILE}): {model.path} has another tokenizer than the policy {policy.path} "
                    f"({foreign}); logits of different tokens cannot be added, so name a model of the policy's family"
                )

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order.

        Raises:
            ConfigError: the small models have another tokenizer, or a model cannot be loaded.
            DataError: a model cannot be loaded, or a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token, or the sum of the logits is not finite.

        """
        self.check_policy(context.policy)
        small = self._loaded
        policy = load_decoder(context.policy.path, self.precision, self.device)

        def batches(reach: int) -> NewBatch:
            parts = [(lm, lean_step(lm.model, reach)) for lm in (policy, *small)]
            return lambda: _Steered([DecodingBatch(lm.model, lean) for lm, lean in parts], self.beta)

        with ExitStack() as stack:
            for lm in small:
                stack.enter_context(decoding(lm.model))
            groups = self._hf.draw(policy, prompts, context, small, batches)
        source = digest_of("proxy_tuning", context.policy.digest, *self.digests, self.beta)
        return [replace(g, completions=tuple(replace(c, source=source) for c in g.completions)) for g in groups]


class _Steered(DecodingBatch):
    """Three batches that take the same tokens: policy, tuned and untuned. Their logits are added up."""

    def __init__(self, parts: Sequence[DecodingBatch], beta: float) -> None:
        self.parts = parts
        self.beta = beta
        self.device = parts[0].device
        self.can_join = all(part.can_join for part in parts)

    def start(self, prompts: Sequence[Sequence[int]], prompt_of_row: list[int], ahead: int) -> Tensor:
        return self._sum([part.start(prompts, prompt_of_row, ahead) for part in self.parts])

    def advance(self, token: Tensor) -> Tensor:
        return self._sum([part.advance(token) for part in self.parts])

    def keep(self, rows: list[int]) -> None:
        for part in self.parts:
            part.keep(rows)

    def join(self, other: DecodingBatch, ahead: int) -> None:
        assert isinstance(other, _Steered)  # all batches of a call are made alike
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.join(theirs, ahead)

    def _sum(self, logits: Sequence[Tensor]) -> Tensor:
        # Models of one family may have differing room for unused tokens at the end of the vocabulary.
        known = min(values.shape[-1] for values in logits)
        policy, tuned, untuned = (values[..., :known].to(torch.float32) for values in logits)
        return policy + self.beta * (tuned - untuned)
