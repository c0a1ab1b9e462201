"""Beam search on the policy's likelihood: the completions that the policy finds most probable, as whole texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import PRECISIONS, CausalLM, decode_completion, encode_prompt
from prefloop.models.decoding import decoding
from prefloop.models.decoding_batch import DecodingBatch
from prefloop.models.decoding_llama import lean_step
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup, digest_of
from prefloop.sample._decoder import end_of_string, load_decoder, room
from prefloop.sample.hf import stream_seed


@dataclass(frozen=True)
class Beam:
    """Search for argmax_y log π(y | x) with a beam, as "From r to Q*" does (arXiv 2404.12358).

        argmax Σ r + beta · log π_ref + V*(s_K+1)  =  argmax Σ beta · log π*        (eq. 12, 13)

    At the optimum of DPO's objective, searching by likelihood is searching by reward and value. On a policy that has
    not reached it, more beams over-optimise: in the paper 5 beams gained 10 to 15 points of win rate over one, and
    beyond that completions grew long and win rates fell. `prefloop evaluate --beams 1,2,4,8` shows where that begins.

    Scores are sums of log-probs, without a length penalty (inferred from eq. 13). The beam is that of `transformers`:
    equal to `generate(num_beams, length_penalty=0)`. One beam is greedy decoding; as many beams as there are texts find
    the most probable one. Nothing is drawn, so the seed has no effect.

    Raises:
        ConfigError: a field is out of range.

    """

    completions: int = 1
    """K: completions for each prompt, the best of the beam, most probable first. 1 to `beams`; default 1."""
    beams: int = 5
    """Beginnings that are kept at every token, ≥ 1. Default 5: the number that helped most in the paper."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included. ≥ 1; default 256, as in hf."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, as in hf. Default none."""
    batch: int = 64
    """Beginnings decoded together, of several prompts where they fit. ≥ 1; default 64, as in hf."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto` (default): fp32 on CPU, bf16 on CUDA."""
    device: str = "auto"
    """A torch device, or `auto` (default): CUDA where there is one, else CPU."""

    # Nothing is drawn, so these are no settings.
    temperature: ClassVar[float] = 0.0
    top_p: ClassVar[float] = 1.0
    draws_from_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rules: list[tuple[str, object, bool, str]] = [
            ("beams", self.beams, self.beams >= 1, "≥ 1"),
            ("completions", self.completions, 1 <= self.completions <= self.beams, "between 1 and sampler.beams"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "≥ 1"),
            ("batch", self.batch, self.batch >= 1, "≥ 1"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
            ("precision", self.precision, self.precision in ("auto", *PRECISIONS), "auto, fp32 or bf16"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"sampler.{name} (sample/beam.py): must be {rule}, got {value!r}; set sampler.{name}")

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order, the most probable completion first.

        `sampler_logps` are the policy's, at temperature 1.

        Raises:
            ConfigError, DataError: the policy cannot be loaded, or a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token or has fewer completions than are asked for, or the
                policy's logits are not finite.

        """
        lm = load_decoder(context.policy.path, self.precision, self.device)
        searches = [self._begin(lm, prompt) for prompt in prompts]
        by_length = sorted(searches, key=lambda search: len(search.prompt_ids))
        together = max(1, self.batch // self.beams)
        reach = max((len(s.prompt_ids) + s.limit for s in searches), default=0)
        with decoding(lm.model), torch.inference_mode():
            lean = lean_step(lm.model, reach) if searches else None
            for first in range(0, len(by_length), together):
                self._search(lm, DecodingBatch(lm.model, lean), by_length[first : first + together])
        return [self._group(lm, search, context) for search in searches]

    def _begin(self, lm: CausalLM, prompt: Prompt) -> "_Search":
        ids = encode_prompt(lm.tokenizer, prompt)
        return _Search(prompt, ids, room(lm, prompt, ids, self.max_new_tokens))

    def _search(self, lm: CausalLM, batch: DecodingBatch, live: list["_Search"]) -> None:
        """Search for all of `live` at once: row p · beams + b of the batch is beam b of prompt p."""
        rows = [index for index in range(len(live)) for _ in range(self.beams)]
        logits = batch.start([s.prompt_ids for s in live], rows, max(s.limit for s in live))
        while True:
            kept, tokens, going = [], [], []
            for place, (search, found) in enumerate(zip(live, self._candidates(lm, live, logits), strict=True)):
                grown = search.grow(found, self.beams, lambda s, h: self._ends(lm, s, h))
                if search.finished(self.completions):
                    continue
                going.append(search)
                # A beam that is not there is a copy of the first that no candidate comes from.
                grown += [(grown[0][0], _Beginning(grown[0][1].ids, (), -inf))] * (self.beams - len(grown))
                search.running = [beginning for _, beginning in grown]
                kept += [place * self.beams + parent for parent, _ in grown]
                tokens += [beginning.ids[-1] for _, beginning in grown]
            live = going
            if not live:
                return
            batch.keep(kept)
            logits = batch.advance(torch.tensor(tokens, device=lm.device))

    def _candidates(self, lm: CausalLM, live: Sequence["_Search"], logits: Tensor) -> list[list["_Candidate"]]:
        """Return for each prompt the best (beam, token, log-prob, sum), the best first."""
        logps = logits.float().log_softmax(-1)
        if bool(torch.isnan(logps).any()):
            bad = live[int(torch.isnan(logps).any(-1).nonzero()[0, 0]) // self.beams]
            raise SamplerError(
                f"{lm.path}: the policy's logits are not finite after prompt {bad.prompt.prompt_id} "
                f"({bad.prompt.source}); its weights are damaged or diverged, use another policy"
            )
        vocabulary = logps.shape[-1]
        logps = logps.view(len(live), self.beams * vocabulary)
        # float64: sums over a long completion keep the order of its tokens' float32 log-probs.
        before = torch.tensor([s.totals(self.beams) for s in live], dtype=torch.float64, device=lm.device)
        sums = before.repeat_interleave(vocabulary, 1) + logps
        # Each beam may end in as many ways as there are end tokens; that many more leave enough that go on.
        wanted = min(self.beams * (1 + max(1, len(lm.stop_ids))), sums.shape[-1])
        best, places = sums.topk(wanted, dim=-1)
        picked = logps.gather(-1, places)
        return [
            [(at // vocabulary, at % vocabulary, logp, total) for at, logp, total in zip(*columns, strict=True)]
            for columns in zip(places.tolist(), picked.tolist(), best.tolist(), strict=True)
        ]

    def _ends(self, lm: CausalLM, search: "_Search", found: "_Beginning") -> bool:
        if found.ids[-1] in lm.stop_ids:
            return True
        last = len(found.ids) - 1
        return bool(self.stop) and end_of_string(lm, search.prompt_ids, found.ids, last, self.stop) is not None

    def _group(self, lm: CausalLM, search: "_Search", context: RoundContext) -> SampleGroup:
        best = sorted(search.ended, key=lambda found: -found.total)[: self.completions]
        if len(best) < self.completions:
            raise SamplerError(
                f"prompt {search.prompt.prompt_id} ({search.prompt.source}): {len(best)} completions of at most "
                f"{search.limit} tokens, fewer than sampler.completions={self.completions}; lower it, or raise "
                "sampler.max_new_tokens"
            )
        completions = tuple(self._completion(lm, search, i, found, context) for i, found in enumerate(best))
        policy, number = context.policy.digest, context.round
        return SampleGroup(search.prompt, completions, policy, number, self.temperature, self.top_p)

    def _completion(
        self, lm: CausalLM, search: "_Search", index: int, found: "_Beginning", context: RoundContext
    ) -> Completion:
        shown = found.ids[:-1] if found.ids[-1] in lm.stop_ids else found.ids
        where = (context.round, search.prompt.prompt_id, index)
        return Completion(
            completion_id=digest_of("beam", self.beams, context.policy.digest, *where),
            text=decode_completion(lm.tokenizer, search.prompt_ids, shown),
            token_ids=found.ids,
            sampler_logps=found.logps,
            finish_reason="stop" if found.stopped else "length",
            seed=stream_seed(context.seed, *where),
            source=context.policy.digest,
        )


_Candidate = tuple[int, int, float, float]
"""The beam that it goes on from, the token, its log-prob, and the sum of all, in nats."""


@dataclass(frozen=True, slots=True)
class _Beginning:
    """The beginning of a completion: ids, their log-probs, and the sum of these; −∞ for one that is not there."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    total: float
    stopped: bool = False


@dataclass(slots=True)
class _Search:
    """The beam of one prompt: beginnings that go on, and completions that have ended."""

    prompt: Prompt
    prompt_ids: list[int]
    limit: int
    running: list[_Beginning] = field(default_factory=lambda: [_Beginning((), (), 0.0)])
    ended: list[_Beginning] = field(default_factory=list)
    best_running: float = 0.0

    def totals(self, beams: int) -> list[float]:
        return [found.total for found in self.running] + [-inf] * (beams - len(self.running))

    def grow(
        self, candidates: Sequence[_Candidate], beams: int, ends: Callable[["_Search", _Beginning], bool]
    ) -> list[tuple[int, _Beginning]]:
        """Sort candidates, the best first, into those that end and at most `beams` that go on; return these.

        One that ends counts only among the best `beams`, as in `transformers`.
        """
        going: list[tuple[int, _Beginning]] = []
        for rank, (parent, token, logp, total) in enumerate(candidates):
            if total == -inf or len(going) == beams:
                break
            before = self.running[parent]
            found = _Beginning((*before.ids, token), (*before.logps, logp), total)
            stopped = ends(self, found)
            if not stopped and len(found.ids) < self.limit:
                going.append((parent, found))
            elif rank < beams:
                self.ended.append(replace(found, stopped=stopped))
        self.best_running = going[0][1].total if going else -inf
        return going

    def finished(self, wanted: int) -> bool:
        """Say whether no beginning can become one of the best `wanted`: log-probs only fall as a text grows."""
        if self.best_running == -inf:
            return True
        ranked = sorted((found.total for found in self.ended), reverse=True)
        return len(ranked) >= wanted and ranked[wanted - 1] >= self.best_running
