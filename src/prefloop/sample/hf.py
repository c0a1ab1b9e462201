"""Sampling in this process with `transformers` models: no server, any architecture, the same tokens on every run.

A prompt is computed once for its K completions. Every completion has a random stream of its own, so its tokens do
not depend on the prompts it shares a batch with (beyond the rounding of floating-point sums).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import PRECISIONS, CausalLM, decode_completion, encode_prompt
from prefloop.models.decoding import decoding
from prefloop.models.decoding_batch import DecodingBatch
from prefloop.models.decoding_llama import lean_step
from prefloop.protocols import RoundContext, Start
from prefloop.rows import Completion, Prompt, SampleGroup, digest_of
from prefloop.sample._decoder import end_of_string, load_decoder, room

STEPS_PER_CHECK = 8
"""Tokens decoded between two looks for finished completions; one look costs a transfer from the accelerator."""

REFILL_AFTER = 0.25
"""Part of a batch that must have ended before waiting rows take its place; that copies the cache."""
REFILLED_DEVICES = frozenset({"cuda"})
"""Where a step costs much the same for few rows as for many, so that a batch is kept full. On a CPU it costs what
its rows cost, and rows that join are padded to the longest: 1.2 to 1.8 times slower when measured."""

NewBatch = Callable[[], DecodingBatch]
"""Makes the batches of one call of a sampler."""
Batches = Callable[[int], NewBatch]
"""Says, for the most tokens that a row will have with its prompt, how batches are made."""


@dataclass(frozen=True)
class Hf:
    """Draw completions with a `transformers` model in this process.

    `sampler_logps` are at temperature 1 and before top-k or top-p, whatever the completion was drawn with.

    Raises:
        ConfigError: a field is out of range.

    """

    completions: int = 4
    """K: completions for each prompt. ≥ 1; default 4: a best and a worst of four, as in Self-Rewarding (2401.10020)."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included. ≥ 1; default 256, a short answer. The model's own
    maximum length is kept as well."""
    temperature: float = 1.0
    """Divides the logits. ≥ 0, 0 takes the most probable token; default 1: draws from the policy itself."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities reach this sum (nucleus; Holtzman 2020, 1904.09751).
    In (0, 1]; default 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens. ≥ 0; default 0: all tokens. Applied before `top_p`, as in `transformers`."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; it is cut after the token that completes the string. Default none."""
    batch: int = 64
    """Completions decoded together. ≥ 1; default 64, on a CPU among the fastest of 32 to 256 for small models; on an
    accelerator more should be faster until memory ends. Results are the same, up to rounding."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto` (default): fp32 on CPU, bf16 on CUDA."""
    device: str = "auto"
    """A torch device, or `auto` (default): CUDA where there is one, else CPU."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, object, bool, str]] = [
            ("completions", self.completions, self.completions >= 1, "≥ 1"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "≥ 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "≥ 0 (0 is greedy)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "≥ 0 (0 keeps all tokens)"),
            ("batch", self.batch, self.batch >= 1, "≥ 1"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
            ("precision", self.precision, self.precision in ("auto", *PRECISIONS), "auto, fp32 or bf16"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"sampler.{name} (sample/hf.py): must be {rule}, got {value!r}; set sampler.{name}")

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order.

        Raises:
            ConfigError, DataError: the policy cannot be loaded, or a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token, or the policy's logits are not finite.

        """
        return self.draw(load_decoder(context.policy.path, self.precision, self.device), prompts, context)

    def draw(
        self,
        lm: CausalLM,
        prompts: Sequence[Prompt],
        context: RoundContext,
        beside: Sequence[CausalLM] = (),
        batches: Batches | None = None,
    ) -> list[SampleGroup]:
        """Draw as a call does, from whatever logits `batches` gives; `None`: those of `lm`.

        Args:
            lm: the policy; its tokenizer and end tokens are used.
            prompts: one group is returned for each, in order.
            context: names the random streams.
            beside: other models that `batches` computes with, whose room counts too.
            batches: how batches are made, by the longest row.

        Raises:
            DataError: a prompt cannot be encoded.
            SamplerError: a prompt leaves no room for a token, or logits are not finite.

        """
        rows = [row for prompt in prompts for row in self._rows(lm, prompt, context, beside)]
        self._complete(lm, rows, batches)
        completions = iter([_completion(lm, row, context) for row in rows])
        return [
            SampleGroup(
                prompt=prompt,
                completions=tuple(next(completions) for _ in range(self.completions)),
                policy=context.policy.digest,
                round=context.round,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            for prompt in prompts
        ]

    def go_on(self, starts: Sequence[Start], context: RoundContext) -> list[tuple[Completion, ...]]:
        """Return for each start one whole completion, its first tokens included, for each of its seeds.

        `max_new_tokens` counts the whole completion. A start is computed once for its completions.

        Raises:
            ConfigError, DataError: the policy cannot be loaded, or a prompt cannot be encoded.
            SamplerError: a start leaves no room for a token, or the policy's logits are not finite.

        """
        lm = load_decoder(context.policy.path, self.precision, self.device)
        rows = [self._rows_after(lm, start) for start in starts]
        self._complete(lm, [row for some in rows for row in some])
        return [
            tuple(_whole(lm, start, row, context) for row in some) for start, some in zip(starts, rows, strict=True)
        ]

    def _complete(self, lm: CausalLM, rows: list["_Row"], batches: Batches | None = None) -> None:
        # Prompts of one length need no padding; the sort is stable, so the rows of a prompt stay together.
        waiting = sorted(rows, key=lambda row: len(row.prompt_ids))
        reach = max((len(row.prompt_ids) + row.limit for row in rows), default=0)
        with decoding(lm.model):
            new = batches(reach) if batches else partial(DecodingBatch, lm.model, lean_step(lm.model, reach))
            self._decode(lm, new, deque(waiting))

    def _rows_after(self, lm: CausalLM, start: Start) -> list["_Row"]:
        ids = [*encode_prompt(lm.tokenizer, start.prompt), *start.token_ids]
        limit = self.max_new_tokens - len(start.token_ids)
        if limit < 1:
            raise SamplerError(
                f"prompt {start.prompt.prompt_id} ({start.prompt.source}): a completion cannot go on after "
                f"{len(start.token_ids)} tokens with sampler.max_new_tokens={self.max_new_tokens}; raise it"
            )
        limit = room(lm, start.prompt, ids, limit)
        return [_Row(start.prompt, ids, index, seed, limit) for index, seed in enumerate(start.seeds)]

    def _rows(self, lm: CausalLM, prompt: Prompt, context: RoundContext, beside: Sequence[CausalLM]) -> list["_Row"]:
        ids = encode_prompt(lm.tokenizer, prompt)
        limit = min(room(model, prompt, ids, self.max_new_tokens) for model in (lm, *beside))
        return [
            _Row(prompt, ids, index, stream_seed(context.seed, context.round, prompt.prompt_id, index), limit)
            for index in range(self.completions)
        ]

    @torch.inference_mode()
    def _decode(self, lm: CausalLM, new: NewBatch, waiting: deque["_Row"]) -> None:
        """Complete the rows of `waiting`, of which those of one prompt stand together, `batch` at a time."""
        running: _Running | None = None
        refill_at = self.batch * (1 - REFILL_AFTER) if lm.device.type in REFILLED_DEVICES else 0
        while running or waiting:
            if running is None:
                running = _begin(new(), _take(waiting, self.batch))
            elif waiting and running.batch.can_join and len(running.rows) <= refill_at:
                running.join(_begin(new(), _take(waiting, self.batch - len(running.rows))))
            rows, batch, logits = running.rows, running.batch, running.logits
            steps = min(STEPS_PER_CHECK, *(row.limit - len(row.ids) for row in rows))
            uniforms = torch.as_tensor(np.stack([row.uniforms(steps) for row in rows], 1), device=lm.device)
            tokens: list[Tensor] = []
            logps: list[Tensor] = []
            for uniform in uniforms:
                if tokens:
                    logits = batch.advance(tokens[-1])
                token, logp = self.choose(logits, uniform)
                tokens.append(token)
                logps.append(logp)
            alive = self._finish_block(lm, rows, torch.stack(tokens, 1), torch.stack(logps, 1))
            running = running.advanced(alive, tokens[-1]) if alive else None

    def choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each row of `logits` the token that `uniform` in [0, 1) picks, and its log-probability in nats.

        Inverse of the cumulative distribution over the vocabulary's order. The log-probability is at temperature 1
        and before top-k or top-p.
        """
        logits = logits.float()
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
            return token[:, 0], logits.log_softmax(-1).gather(-1, token)[:, 0]
        scaled = logits if self.temperature == 1 else logits / self.temperature
        probs = scaled.softmax(-1)
        # float64: float32 sums over a large vocabulary would shift the bounds of rare tokens.
        bounds = self._truncated(probs).cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(bounds, uniform[:, None] * bounds[:, -1:], right=True)
        token = token.clamp_max(logits.shape[-1] - 1)  # logits that are not finite reach the check after the block
        # A token that was drawn is not rarer than the step of a uniform, so its probability has a logarithm.
        picked = probs.gather(-1, token).log() if self.temperature == 1 else logits.log_softmax(-1).gather(-1, token)
        return token[:, 0], picked[:, 0]

    def _truncated(self, probs: Tensor) -> Tensor:
        if self.top_k == 0 and self.top_p == 1:
            return probs
        if 0 < self.top_k < probs.shape[-1]:
            ranked = probs.topk(self.top_k, dim=-1).values
        else:
            ranked = probs.sort(dim=-1, descending=True).values
        before = ranked.cumsum(-1) - ranked
        kept = (before < self.top_p * ranked.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        least = ranked.gather(-1, kept.clamp_min(1) - 1)
        return probs.masked_fill(probs < least, 0.0)

    def _finish_block(self, lm: CausalLM, rows: list["_Row"], tokens: Tensor, logps: Tensor) -> list[int]:
        """Add a block's tokens, [row step], to `rows`; return the indices of those that go on."""
        block = zip(rows, tokens.tolist(), logps.tolist(), strict=True)
        return [index for index, (row, ids, logp) in enumerate(block) if not self._finish(lm, row, ids, logp)]

    def _finish(self, lm: CausalLM, row: "_Row", ids: list[int], logps: list[float]) -> bool:
        """Add a block's tokens to `row`, up to its end; say whether it has ended."""
        start = len(row.ids)
        row.ids += ids
        row.logps += logps
        end = next((n for n, token in enumerate(ids, start + 1) if token in lm.stop_ids), None)
        if end is not None:
            row.cut(end)
            row.finish_reason = "stop"
        if self.stop and (end := end_of_string(lm, row.prompt_ids, row.ids, start, self.stop)) is not None:
            row.cut(end)
            row.finish_reason = "stop"
        if not np.isfinite(row.logps[start:]).all():
            raise SamplerError(
                f"{lm.path}: the policy's logits are not finite after prompt {row.prompt.prompt_id} "
                f"({row.prompt.source}), token {start}; its weights are damaged or diverged, use another policy"
            )
        return row.finish_reason == "stop" or len(row.ids) >= row.limit


def stream_seed(seed: int, round_: int, prompt_id: str, index: int) -> int:
    """Return the seed of one completion's random stream, in [0, 2^63)."""
    return int(digest_of(seed, round_, prompt_id, index), 16) >> 1


def row_uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """Return the first `count` uniforms in [0, 1) of a completion's stream; a longer draw begins with a shorter one."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@dataclass(slots=True)
class _Row:
    """A completion while it grows."""

    prompt: Prompt
    prompt_ids: list[int]
    index: int
    seed: int
    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = "length"

    stream: NDArray[np.float64] | None = None

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return the next `count` uniforms of the completion's stream."""
        if self.stream is None:
            self.stream = row_uniforms(self.seed, self.limit)
        return self.stream[len(self.ids) : len(self.ids) + count]

    def cut(self, end: int) -> None:
        del self.ids[end:], self.logps[end:]


def _completion(lm: CausalLM, row: _Row, context: RoundContext) -> Completion:
    # An end token need not be a special one, so it is not left to the tokenizer to skip it.
    shown = row.ids[:-1] if row.ids[-1] in lm.stop_ids else row.ids
    return Completion(
        completion_id=digest_of(context.policy.digest, context.round, row.prompt.prompt_id, row.index),
        text=decode_completion(lm.tokenizer, row.prompt_ids, shown),
        token_ids=tuple(row.ids),
        sampler_logps=tuple(row.logps),
        finish_reason=row.finish_reason,
        seed=row.seed,
        source=context.policy.digest,
    )


def _whole(lm: CausalLM, start: Start, row: _Row, context: RoundContext) -> Completion:
    """Return the start's tokens and those of `row` as one completion."""
    rest = _completion(lm, row, context)
    shown = row.ids[:-1] if row.ids[-1] in lm.stop_ids else row.ids
    prompt_ids = row.prompt_ids[: len(row.prompt_ids) - len(start.token_ids)]
    return replace(
        rest,
        completion_id=digest_of(context.policy.digest, context.round, row.prompt.prompt_id, start.token_ids, row.seed),
        text=decode_completion(lm.tokenizer, prompt_ids, [*start.token_ids, *shown]),
        token_ids=(*start.token_ids, *row.ids),
        sampler_logps=None if start.logps is None else (*start.logps, *row.logps),
    )


@dataclass(slots=True)
class _Running:
    """Rows that are decoded together, and the logits of their next tokens, [row vocabulary]."""

    rows: list[_Row]
    batch: DecodingBatch
    logits: Tensor

    def advanced(self, alive: list[int], token: Tensor) -> "_Running":
        """Append a token to each row, after dropping those whose index is not in `alive`."""
        if len(alive) < len(self.rows):
            self.rows = [self.rows[index] for index in alive]
            self.batch.keep(alive)
            token = token[torch.tensor(alive, device=token.device)]
        self.logits = self.batch.advance(token)
        return self

    def join(self, other: "_Running") -> None:
        self.rows += other.rows
        self.batch.join(other.batch, _ahead(self.rows))
        self.logits = torch.cat([self.logits, other.logits])


def _begin(batch: DecodingBatch, rows: list[_Row]) -> _Running:
    prompts: list[list[int]] = []
    prompt_of_row = []
    for row in rows:
        if not prompts or prompts[-1] is not row.prompt_ids:
            prompts.append(row.prompt_ids)
        prompt_of_row.append(len(prompts) - 1)
    return _Running(rows, batch, batch.start(prompts, prompt_of_row, _ahead(rows)))


def _ahead(rows: list[_Row]) -> int:
    return max(row.limit - len(row.ids) for row in rows)


def _take(waiting: deque[_Row], count: int) -> list[_Row]:
    """Take `count` rows; fewer where that leaves those of one prompt together."""
    taken = [waiting.popleft() for _ in range(min(count, len(waiting)))]
    whole = len(taken)
    while waiting and whole and taken[whole - 1].prompt_ids is waiting[0].prompt_ids:
        whole -= 1
    if whole:
        waiting.extendleft(reversed(taken[whole:]))
        del taken[whole:]
    return taken
