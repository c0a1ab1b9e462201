"""A judging model in this process: a `transformers` folder, or the policy itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.errors import ConfigError, JudgeError
from prefloop.judge._llm_asking import Budget, Keep, Refused, Request
from prefloop.judge._llm_replies import Style
from prefloop.judge._llm_store import Reply
from prefloop.models.causal_lm import CausalLM, decode_completion, encode_prompt, load, quiet
from prefloop.models.decoding import decoding
from prefloop.models.decoding_batch import DecodingBatch
from prefloop.models.decoding_llama import LeanStep, lean_step
from prefloop.rows import TRAIN, VERBATIM, Message, Prompt, prompt_id

STEPS_PER_CHECK = 8
"""Tokens decoded between two looks for finished replies; one look costs a transfer from the accelerator."""


@dataclass(slots=True)
class Row:
    """A reply while it grows. `index` is its request's; `limit` counts tokens, the end token included."""

    index: int
    prompt_ids: tuple[int, ...]
    limit: int
    uniforms: NDArray[np.float64]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Local:
    """One model in this process.

    `path` is a `save_pretrained` folder or hub id, `setting` what named it. `temperature` 0 takes the most
    probable token. A reply has a random stream of its own and does not depend on the others beside it, up to rounding.
    """

    path: str
    setting: str
    temperature: float
    max_tokens: int
    batch: int
    precision: str
    device: str

    @cached_property
    def lm(self) -> CausalLM:
        """The loaded model.

        Raises:
            ConfigError: no such folder or hub id, or a model without a key-value cache.
            DataError: not a causal language model.

        """
        try:
            lm = load(self.path, precision=self.precision, device=self.device)
        except ConfigError as error:
            raise ConfigError(f"{self.setting}: {str(error).removeprefix('policy: ')}") from error
        if "past_key_values" not in signature(lm.model.forward).parameters:
            raise ConfigError(
                f"{self.setting}: {lm.model.config.model_type} models keep no key-value cache, which judging in this "
                "process needs; serve the model and set judge.base_url"
            )
        return lm

    @property
    def name(self) -> str:
        """Digest of the weights: the same model is the same judge, whatever its folder is called."""
        return self.lm.digest

    @property
    def source(self) -> str:
        """Digest of the weights."""
        return self.lm.digest

    @property
    def decoding(self) -> dict[str, object]:
        """Settings on which a reply depends."""
        dtype = str(self.lm.model.dtype).removeprefix("torch.")
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "precision": dtype}

    @property
    def styles(self) -> tuple[Style, ...]:
        """Nothing makes a model in this process write JSON, so its last line is the verdict."""
        return ("text",)

    @property
    def marks(self) -> tuple[str, ...]:
        """The tokenizer's special tokens: a completion that spells one must not end the judge's turn."""
        tokenizer = self.lm.tokenizer
        added = [str(token) for token in tokenizer.get_added_vocab()]
        return tuple(sorted({*map(str, tokenizer.all_special_tokens), *added}))

    def messages(self, text: str) -> tuple[Message, ...]:
        """Return the prompt that holds `text`: a user's turn, or plain text where there is no chat template."""
        if self.lm.tokenizer.chat_template:
            return (Message("user", text),)
        return (Message(VERBATIM, f"{text}\n\n"),)

    def ask(self, requests: Sequence[Request], keep: Keep, budget: Budget) -> None:
        """Answer requests batch by batch, the shortest first, while the budget has room.

        Raises:
            DataError: a request cannot be tokenized.
            JudgeError: the model's logits are not finite.

        """
        rows = []
        for index, request in enumerate(requests):
            ids = self._encoded(request.wordings[0].text)
            limit = min(self.max_tokens, self._longest - len(ids))
            if limit < 1:
                keep(index, Refused(f"the question has {len(ids)} tokens, the judge takes {self._longest}"))
                continue
            rows.append(Row(index, ids, limit, stream(request.seed, limit)))
        rows.sort(key=lambda row: (len(row.prompt_ids), row.prompt_ids))
        reach = max((len(row.prompt_ids) + row.limit for row in rows), default=0)
        with decoding(self.lm.model):
            lean = lean_step(self.lm.model, reach) if rows else None
            for start in range(0, len(rows), self.batch):
                some = [row for number, row in enumerate(rows[start : start + self.batch]) if budget.room(number)]
                if not some:
                    return
                generate(self.lm, lean, some, self.temperature)
                for row in some:
                    keep(row.index, self._reply(row))

    @cached_property
    def _longest(self) -> int:
        # Some architectures, such as ALiBi's, have no longest length.
        positions = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        return 10**9 if positions is None else int(positions)

    def _encoded(self, text: str) -> tuple[int, ...]:
        messages = self.messages(text)
        prompt = Prompt(prompt_id(messages), messages, None, TRAIN, "judge")
        with quiet():  # the tokenizer warns of a question that is too long, which then is not asked
            return tuple(encode_prompt(self.lm.tokenizer, prompt))

    def _reply(self, row: Row) -> Reply:
        # An end token need not be a special one, so it is not left to the tokenizer to skip it.
        shown = row.ids[:-1] if row.ids[-1] in self.lm.stop_ids else row.ids
        text = decode_completion(self.lm.tokenizer, row.prompt_ids, shown)
        return Reply(
            text=text.encode("utf-8", "replace").decode("utf-8"),
            style="text",
            finish_reason=row.finish_reason,
            prompt_tokens=len(row.prompt_ids),
            completion_tokens=len(row.ids),
            token_ids=tuple(row.ids),
            logps=tuple(row.logps),
        )


def stream(seed: int, count: int) -> NDArray[np.float64]:
    """Return the first `count` uniforms in [0, 1) of a random stream; a longer one begins with a shorter one."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


@torch.inference_mode()
def generate(lm: CausalLM, lean: LeanStep | None, rows: Sequence[Row], temperature: float) -> None:
    """Complete `rows`, of which those of one prompt stand together; a prompt is computed once for its rows."""
    prompts: list[tuple[int, ...]] = []
    prompt_of_row: list[int] = []
    for ids, same in groupby(rows, key=lambda row: row.prompt_ids):
        prompts.append(ids)
        prompt_of_row += [len(prompts) - 1] * len(list(same))
    alive = list(rows)
    batch = DecodingBatch(lm.model, lean)
    logits = batch.start(prompts, prompt_of_row, max(row.limit for row in rows))
    while True:
        steps = min(STEPS_PER_CHECK, *(row.limit - len(row.ids) for row in alive))
        uniforms = np.stack([row.uniforms[len(row.ids) : len(row.ids) + steps] for row in alive], 1)
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        for uniform in torch.as_tensor(uniforms, device=lm.device):
            if tokens:
                logits = batch.advance(tokens[-1])
            token, logp = choose(logits, uniform, temperature)
            tokens.append(token)
            logps.append(logp)
        block = zip(alive, torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), strict=True)
        going = [number for number, (row, ids, logp) in enumerate(block) if not _finished(lm, row, ids, logp)]
        if not going:
            return
        last = tokens[-1]
        if len(going) < len(alive):
            alive = [alive[number] for number in going]
            batch.keep(going)
            last = last[torch.tensor(going, device=last.device)]
        logits = batch.advance(last)


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return for each row of `logits` the token that `uniform` picks, and its log-prob at temperature 1, nats."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        # float64: float32 sums over a large vocabulary would shift the bounds of rare tokens.
        bounds = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(bounds, uniform[:, None] * bounds[:, -1:], right=True)
        token = token.clamp_max(logits.shape[-1] - 1)
    return token[:, 0], logits.log_softmax(-1).gather(-1, token)[:, 0]


def _finished(lm: CausalLM, row: Row, ids: list[int], logps: list[float]) -> bool:
    """Add a block's tokens to `row`, up to its end; say whether it has ended."""
    if not np.isfinite(logps).all():
        raise JudgeError(f"{lm.path}: the judge's logits are not finite; its weights are damaged or diverged")
    start = len(row.ids)
    row.ids += ids
    row.logps += logps
    end = next((number for number, token in enumerate(ids, start + 1) if token in lm.stop_ids), None)
    if end is not None:
        del row.ids[end:], row.logps[end:]
        row.finish_reason = "stop"
    return end is not None or len(row.ids) >= row.limit
