"""Sampling in this process with `transformers` models: no server, any architecture, the same tokens on every run.

A prompt is computed once for its K completions. Every completion has a random stream of its own, so its tokens do
not depend on the prompts it shares a batch with (beyond the rounding of floating-point sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import PRECISIONS, CausalLM, decode_completion, encode_prompt, load
from prefloop.models.decoding import DECODING_ATTENTION, RoomyLayer, decoding
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup, digest_of

STEPS_PER_CHECK = 8
"""Tokens decoded between two looks for finished completions; one look costs a transfer from the accelerator."""


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
    """Completions decoded together. ≥ 1; default 64. More is faster until memory ends; results are the same."""
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
        lm = load(context.policy.path, precision=self.precision, device=self.device)
        if "past_key_values" not in signature(lm.model.forward).parameters:
            raise ConfigError(
                f"sampler (sample/hf.py): {lm.model.config.model_type} models keep no key-value cache, which this "
                "sampler needs; choose another policy, or a sampler that asks a server"
            )
        rows = [row for prompt in prompts for row in self._rows(lm, prompt, context)]
        # Prompts of one length need no padding; the sort is stable, so the rows of a prompt stay together.
        waiting = sorted(rows, key=lambda row: len(row.prompt_ids))
        with decoding(lm.model):
            for begin in range(0, len(waiting), self.batch):
                self._decode(lm, waiting[begin : begin + self.batch])
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

    def _rows(self, lm: CausalLM, prompt: Prompt, context: RoundContext) -> list["_Row"]:
        ids = encode_prompt(lm.tokenizer, prompt)
        limit = self.max_new_tokens
        # Some architectures, such as ALiBi's, have no longest length.
        longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None:
            limit = min(limit, longest - len(ids))
        if limit < 1:
            raise SamplerError(
                f"prompt {prompt.prompt_id} ({prompt.source}): {len(ids)} tokens, but the policy takes {longest} in "
                "all, so no room is left for a completion; shorten or drop this prompt"
            )
        entries = lm.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= entries:
            raise SamplerError(
                f"prompt {prompt.prompt_id} ({prompt.source}): token id {max(ids)}, but the policy knows {entries} "
                f"tokens; {lm.path} has another model's tokenizer, put its own there"
            )
        return [
            _Row(prompt, ids, index, stream_seed(context.seed, context.round, prompt.prompt_id, index), limit)
            for index in range(self.completions)
        ]

    @torch.inference_mode()
    def _decode(self, lm: CausalLM, rows: list["_Row"]) -> None:
        """Complete `rows`, of which those of one prompt stand together, in one batch."""
        uniforms = torch.as_tensor(
            np.stack([row_uniforms(row.seed, self.max_new_tokens) for row in rows]), device=lm.device
        )
        batch = _Batch(lm, rows)
        logits = batch.prefill()
        step = 0
        while True:
            steps = min(STEPS_PER_CHECK, *(row.limit - step for row in batch.rows))
            tokens: list[Tensor] = []
            logps: list[Tensor] = []
            for index in range(step, step + steps):
                if tokens:
                    logits = batch.advance(tokens[-1])
                token, logp = self.choose(logits, uniforms[:, index])
                tokens.append(token)
                logps.append(logp)
            step += steps
            alive = self._finish_block(lm, batch.rows, torch.stack(tokens, 1), torch.stack(logps, 1))
            if not alive:
                return
            last = tokens[-1]
            if len(alive) < len(batch.rows):
                kept = torch.tensor(alive, device=lm.device)
                batch.keep(kept)
                last, uniforms = last[kept], uniforms[kept]
            logits = batch.advance(last)

    def choose(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each row of `logits` the token that `uniform` in [0, 1) picks, and its log-probability in nats.

        Inverse of the cumulative distribution over the vocabulary's order. The log-probability is at temperature 1
        and before top-k or top-p.
        """
        logp = logits.float().log_softmax(-1)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            scaled = logp if self.temperature == 1 else (logp / self.temperature).log_softmax(-1)
            # float64: float32 sums over a large vocabulary would shift the bounds of rare tokens.
            bounds = self._truncated(scaled.exp()).cumsum(-1, dtype=torch.float64)
            token = torch.searchsorted(bounds, uniform[:, None] * bounds[:, -1:], right=True)[:, 0]
            token = token.clamp_max(logits.shape[-1] - 1)  # logits that are not finite reach the check after the block
        return token, logp.gather(-1, token[:, None])[:, 0]

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
        if self.stop and (end := self._end_of_string(lm, row, start)) is not None:
            row.cut(end)
            row.finish_reason = "stop"
        if not np.isfinite(row.logps[start:]).all():
            raise SamplerError(
                f"{lm.path}: the policy's logits are not finite after prompt {row.prompt.prompt_id} "
                f"({row.prompt.source}), token {start}; its weights are damaged or diverged, use another policy"
            )
        return row.finish_reason == "stop" or len(row.ids) >= row.limit

    def _end_of_string(self, lm: CausalLM, row: "_Row", start: int) -> int | None:
        """Return after how many tokens, more than `start`, a stop string stands in the text; else `None`."""
        # A token is at least one byte of text, so no match that ends after `start` begins before this one.
        first = max(0, start - max(len(text.encode()) for text in self.stop))
        before = [*row.prompt_ids, *row.ids[:first]]

        def complete(end: int) -> bool:
            text = decode_completion(lm.tokenizer, before, row.ids[first:end])
            return any(stop in text for stop in self.stop)

        if not complete(len(row.ids)):
            return None
        return next(end for end in range(start + 1, len(row.ids) + 1) if complete(end))


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


class _Batch:
    """The rows that are decoded together, with their key-value cache."""

    def __init__(self, lm: CausalLM, rows: list[_Row]) -> None:
        self.rows = rows
        self.model = lm.model
        self.device = lm.device
        self.cache = DynamicCache(config=lm.model.config)
        self.cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        # One kind of attention over all positions: the mask of a step is the same for every layer.
        every = all(type(layer) is RoomyLayer for layer in self.cache.layers)
        self.plain = every and lm.model.config._attn_implementation == DECODING_ATTENTION
        self.mask: Tensor | None = None
        # Architectures without these arguments count positions themselves, or have none.
        self.takes = signature(lm.model.forward).parameters.keys() & {"position_ids", "logits_to_keep"}

    def prefill(self) -> Tensor:
        """Compute every prompt once; return the logits of the first token for each row, [row vocabulary]."""
        prompts: list[list[int]] = []
        prompt_of_row = []
        for row in self.rows:
            if not prompts or prompts[-1] is not row.prompt_ids:
                prompts.append(row.prompt_ids)
            prompt_of_row.append(len(prompts) - 1)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        self.width = int(lengths.max())
        padding = self.width - lengths[:, None]
        if self.width > int(lengths.min()):
            reach = self.width + max(row.limit for row in self.rows)
            self.mask = torch.arange(reach, device=self.device) >= padding
        padded = [[0] * (self.width - len(ids)) + ids for ids in prompts]
        positions = (torch.arange(self.width, device=self.device) - padding).clamp_min(0)
        logits = self._forward(torch.tensor(padded, device=self.device), positions)
        if self.mask is not None and self.plain:
            # What the model would make of the mask at every step, made once.
            self.mask = torch.zeros_like(self.mask, dtype=self.model.dtype).masked_fill(~self.mask, -torch.inf)
            self.mask = self.mask[:, None, None]
        self.positions = lengths[:, None] - 1
        repeats = torch.tensor(prompt_of_row, device=self.device)
        self._select(repeats)
        return logits[repeats]

    def advance(self, token: Tensor) -> Tensor:
        """Append one token to each row; return the logits of the next, [row vocabulary]."""
        self.width += 1
        self.positions = self.positions + 1
        return self._forward(token[:, None], self.positions)

    def keep(self, alive: Tensor) -> None:
        """Drop every row whose index is not in `alive`."""
        self.rows = [self.rows[index] for index in alive.tolist()]
        self._select(alive)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask[..., : self.width],
            past_key_values=self.cache,
            use_cache=True,
            **{name: options[name] for name in self.takes},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _select(self, indices: Tensor) -> None:
        self.cache.reorder_cache(indices)
        self.positions = self.positions[indices]
        if self.mask is not None:
            self.mask = self.mask[indices]
