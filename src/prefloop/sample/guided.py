"""Guided decoding: beginnings are drawn in blocks, and those with the largest value so far go on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch

from prefloop.errors import ConfigError, DataError, SamplerError
from prefloop.models.causal_lm import CausalLM, check_folder, encode_prompt, folder_digest, load, locate
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext, Start
from prefloop.rows import Completion, PolicyRef, Prompt, SampleGroup, digest_of
from prefloop.sample._decoder import room
from prefloop.sample._tokens import foreign_token
from prefloop.sample.hf import Hf, stream_seed

_FILE = "sample/guided.py"


@dataclass(frozen=True)
class Guided:
    """Value-guided decoding with the policy's own token-level values, block by block.

        Σ_t beta · log(π(y_t | s_t) / π_ref(y_t | s_t))  =  Σ r + V*(s_t+1) − V*(s_0)          value       (eq. 10)
        Σ_t beta · log π(y_t | s_t)  =  Σ r + beta · log π_ref + V*(s_t+1) − V*(s_0)           likelihood  (eq. 13)

    Equations of "From r to Q*" (arXiv 2404.12358), exact at the optimum of DPO: summed over a beginning, log-ratios are
    the reward so far and the value of what may still come, so that unfinished texts of one prompt can be ranked.
    Equation 12 is the objective of search guided by a value, and eq. 13 says that it is likelihood under π; for that
    see `beam`. The procedure here is a reading, not the paper's: each of `beams` beginnings is continued `branches`
    times by `block` tokens that the `propose` model draws, and the best `beams` of all by `score` go on; a completion
    that has ended keeps its place as long as its score does. A tree search with visit counts (MCTS) is not offered.

    With `block` = `max_new_tokens` and one beam it is best-of-`branches`. Where policy and reference are the same
    model, all values are 0 and the first draw is kept. What is kept is no draw from the policy, so it carries no
    sampler log-probs.

    Raises:
        ConfigError: a field is out of range, or the reference is not there or cannot be a policy.

    """

    completions: int = 1
    """K: completions for each prompt, the best of the last beam. 1 to `beams`; default 1."""
    reference: str = ""
    """Folder or hub id of the model that the policy was trained against. Default: the run's first policy."""
    score: Literal["value", "likelihood"] = "value"
    """What ranks beginnings: the log-ratio (eq. 10), or the policy's log-prob (eq. 13). Default value."""
    propose: Literal["policy", "reference"] = "reference"
    """Whose tokens are drawn. Default reference (ours): π_ref then enters by how often a block is drawn."""
    block: int = 8
    """Tokens that are drawn before beginnings are ranked, ≥ 1. Default 8 (ours)."""
    beams: int = 2
    """Beginnings that are kept, ≥ 1. Default 2 (ours)."""
    branches: int = 4
    """Continuations of each beginning, ≥ 1. Default 4 (ours). The first block draws `beams` times as many."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included, ≥ 1."""
    temperature: float = 1.0
    """Divides the logits that are drawn from, ≥ 0. Scores are at temperature 1."""
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

    # The content of the reference, so that a stage's key notices a changed model.
    digest: str = field(init=False, default="")

    draws_from_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value, least in (("block", self.block, 1), ("beams", self.beams, 1), ("branches", self.branches, 1)):
            if value < least:
                raise ConfigError(f"sampler.{name} ({_FILE}): must be ≥ {least}, got {value!r}; set sampler.{name}")
        if not 1 <= self.completions <= self.beams:
            raise ConfigError(
                f"sampler.completions ({_FILE}): must be between 1 and sampler.beams={self.beams}, got "
                f"{self.completions!r}; set sampler.beams or sampler.completions"
            )
        self._hf(self.max_new_tokens)  # refuses what hf refuses
        if self.reference:
            object.__setattr__(self, "digest", self._named.digest)

    def _hf(self, tokens: int) -> Hf:
        return Hf(
            completions=1,
            max_new_tokens=tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            batch=self.batch,
            precision=self.precision,
            device=self.device,
        )

    @cached_property
    def _named(self) -> PolicyRef:
        try:
            folder = locate(self.reference)
            check_folder(folder)
        except (ConfigError, DataError) as error:
            raise ConfigError(f"sampler.reference ({_FILE}): {str(error).removeprefix('policy: ')}") from error
        return PolicyRef(str(folder), folder_digest(folder), round=-1)

    def check_policy(self, policy: PolicyRef) -> None:
        """Refuse a reference whose tokens are not those of `policy`.

        Raises:
            ConfigError: names the first token that differs.

        """
        if not self.reference:
            return
        foreign = foreign_token(policy.path, policy.digest, self._named.path, self._named.digest)
        if foreign is not None:
            raise ConfigError(
                f"sampler.reference ({_FILE}): {self.reference} has another tokenizer than the policy {policy.path} "
                f"({foreign}); name the model that the policy was trained against"
            )

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order, the best completion first.

        Raises:
            ConfigError, DataError: a model cannot be loaded or has another tokenizer, or a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token, or logits are not finite.

        """
        self.check_policy(context.policy)
        reference = self._named if self.reference else context.start
        models = [self._model(context.policy), self._model(reference)]
        searches = [_Search(prompt, self._limit(models, prompt)) for prompt in prompts]
        for turn in range(-(-self.max_new_tokens // self.block)):
            live = [search for search in searches if any(map(search.goes_on, search.beam))]
            if not live:
                break
            self._extend(live, turn, context, reference)
            self._rank(live, context.policy, reference)
        return [self._group(search, context) for search in searches]

    def _model(self, model: PolicyRef) -> CausalLM:
        return load(model.path, precision=self.precision, device=self.device)

    def _limit(self, models: Sequence[CausalLM], prompt: Prompt) -> int:
        return min(room(lm, prompt, encode_prompt(lm.tokenizer, prompt), self.max_new_tokens) for lm in models)

    def _extend(self, live: Sequence["_Search"], turn: int, context: RoundContext, reference: PolicyRef) -> None:
        """Replace each beginning that goes on by its continuations."""
        proposer = replace(context, policy=reference) if self.propose == "reference" else context
        reach = min((turn + 1) * self.block, self.max_new_tokens)
        starts, owners = [], []
        for search in live:
            growing = [b for b in search.beam if search.goes_on(b)]
            search.beam = [b for b in search.beam if not search.goes_on(b)]
            branches = self.branches if turn else self.branches * self.beams
            for place, beginning in enumerate(growing):
                seeds = [self._seed(context, search.prompt, turn, place * branches + i) for i in range(branches)]
                starts.append(Start(search.prompt, beginning.ids, None, tuple(seeds)))
                owners.append(search)
        for search, drawn in zip(owners, self._hf(reach).go_on(starts, proposer), strict=True):
            search.beam += [_Beginning(c) for c in drawn]

    def _seed(self, context: RoundContext, prompt: Prompt, turn: int, index: int) -> int:
        if turn == 0:  # so that one block is the draws of hf
            return stream_seed(context.seed, context.round, prompt.prompt_id, index)
        return int(digest_of("guided", context.seed, context.round, prompt.prompt_id, turn, index), 16) >> 1

    def _rank(self, live: Sequence["_Search"], policy: PolicyRef, reference: PolicyRef) -> None:
        """Keep the best `beams` of each prompt, none twice; of equal ones the first."""
        for search in live:
            search.beam = list({b.ids: b for b in search.beam}.values())
        ours = self._totals(live, self._model(policy))
        theirs = [0.0] * len(ours)
        if self.score == "value":
            theirs = self._totals(live, self._model(reference))
        scores = iter(a - b for a, b in zip(ours, theirs, strict=True))
        for search in live:
            scored = [(next(scores), beginning) for beginning in search.beam]
            search.beam = [beginning for _, beginning in sorted(scored, key=lambda s: -s[0])[: self.beams]]

    def _totals(self, live: Sequence["_Search"], lm: CausalLM) -> list[float]:
        """Return the log-prob of every beginning, nats."""
        totals: list[float] = []
        for search in live:
            context = tuple(encode_prompt(lm.tokenizer, search.prompt))
            for first in range(0, len(search.beam), self.batch):
                some = tuple(b.ids for b in search.beam[first : first + self.batch])
                with torch.inference_mode():
                    totals += completion_logps(lm.model, [TokenGroup(context, some)]).total.double().tolist()
        return totals

    def _group(self, search: "_Search", context: RoundContext) -> SampleGroup:
        if len(search.beam) < self.completions:
            raise SamplerError(
                f"prompt {search.prompt.prompt_id} ({search.prompt.source}): {len(search.beam)} different completions, "
                f"fewer than sampler.completions={self.completions}; lower it, or raise sampler.branches"
            )
        kept = [replace(b.completion, sampler_logps=None) for b in search.beam[: self.completions] if b.completion]
        policy = context.policy.digest
        named = tuple(
            replace(c, completion_id=digest_of("guided", policy, c.completion_id, i), source=policy)
            for i, c in enumerate(kept)
        )
        return SampleGroup(search.prompt, named, policy, context.round, self.temperature, self.top_p)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The beginning of a completion; `None`: nothing yet."""

    completion: Completion | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        return (self.completion.token_ids or ()) if self.completion else ()


@dataclass(slots=True)
class _Search:
    """The beam of one prompt, the best first. No completion has more than `limit` tokens."""

    prompt: Prompt
    limit: int
    beam: list[_Beginning] = field(default_factory=lambda: [_Beginning()])

    def goes_on(self, found: _Beginning) -> bool:
        """Say whether a beginning has neither ended nor reached the limit."""
        ended = found.completion is not None and found.completion.finish_reason == "stop"
        return not ended and len(found.ids) < self.limit
