"""Scores by a reward model: any sequence classifier that transformers can read from safetensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from prefloop.errors import ConfigError, DataError
from prefloop.models.causal_lm import (
    TEMPLATE_FAULTS,
    check_folder,
    choose_device,
    choose_dtype,
    load_tokenizer,
    locate,
    make_room,
    quiet,
)
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Prompt, SampleGroup, Verdict


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier in evaluation mode. `label` is the logit to read, `max_length` counts tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: int
    max_length: int | None


@dataclass(frozen=True)
class RewardModel:
    """One logit of a sequence classifier that reads prompt and completion.

    A text longer than the model takes is cut where its tokenizer cuts, and a note says so. A completion has no score,
    and a note, if the chat template refuses it, if it has no tokens, or if the logit is not finite. The model is loaded
    on first use and kept.

    Raises:
        ConfigError: a field is out of range; on loading: no such folder or hub id, no such label or device.
        DataError: on loading: no safetensors, no tokenizer, or not a trained classifier.

    """

    path: str
    """Folder or hub id of the classifier."""
    label: int | str | None = None
    """Number or name of the logit that is the score. Default: the only one; a model with several needs a choice."""
    input: Literal["auto", "chat", "concat"] = "auto"
    """chat: prompt and completion through the tokenizer's chat template. concat: prompt text and completion joined as
    plain text. auto: chat for a conversational prompt if the tokenizer has a template, else concat."""
    batch_tokens: int = 8192
    """At most this many tokens in one forward pass, padding included; a longer single row goes alone."""
    max_length: int | None = None
    """Texts of more tokens than this are cut. Default: what model and tokenizer say they take."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one; or cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("judge.path: empty; name a folder or hub id of a sequence classifier")
        if self.input not in ("auto", "chat", "concat"):
            raise ConfigError(f"judge.input: must be auto, chat or concat, got {self.input!r}")
        if self.batch_tokens < 1:
            raise ConfigError(f"judge.batch_tokens: must be ≥ 1, got {self.batch_tokens!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"judge.max_length: must be ≥ 2, got {self.max_length!r}")

    @cached_property
    def classifier(self) -> Classifier:
        """The loaded model. A preflight check may ask for it before there is anything to score."""
        try:
            folder = locate(self.path)
        except ConfigError as error:
            raise ConfigError(f"judge.path: {str(error).removeprefix('policy: ')}") from error
        check_folder(folder)
        device = choose_device(self.device)
        with quiet():
            tokenizer = load_tokenizer(folder)
            model = load_classifier(folder, choose_dtype(self.precision, device)).to(device).eval()
        return Classifier(
            model, tokenizer, _label(model, self.label, folder), longest_text(model, tokenizer, self.max_length, folder)
        )

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order. Rows are scored in batches of similar length.

        Raises:
            ConfigError: `input` is chat and the tokenizer has no chat template.

        """
        rows = [self._encode(group.prompt, completion) for group in groups for completion in group.completions]
        notes = [note for _, note in rows]
        scores: list[float | None] = [None] * len(rows)
        for batch in batches_of([ids for ids, _ in rows], self.batch_tokens):
            logits = _logits(self.classifier, [rows[index][0] for index in batch])
            for index, logit in zip(batch, logits, strict=True):
                if logit.isfinite():
                    scores[index] = float(logit)
                else:
                    notes[index] = f"the reward model's logit is {float(logit)}"
        return _verdicts(groups, scores, notes)

    def _encode(self, prompt: Prompt, completion: Completion) -> tuple[list[int], str | None]:
        """Return token ids, none if there can be no score, and a note."""
        tokenizer, limit = self.classifier.tokenizer, self.classifier.max_length
        try:
            text, is_rendered = self._text(prompt, completion)
        except TEMPLATE_FAULTS as error:
            return [], f"the reward model's chat template refuses the messages: {error}"
        # A rendered chat has its special tokens already; adding them again would double the first one.
        options: dict[str, Any] = {"add_special_tokens": not is_rendered, "verbose": False}
        ids = list(tokenizer(text, **options)["input_ids"])
        if not ids:
            return [], "prompt and completion have no tokens"
        if limit is None or len(ids) <= limit:
            return ids, None
        cut = list(tokenizer(text, truncation=True, max_length=limit, **options)["input_ids"])
        return cut, f"cut from {len(ids)} to {limit} tokens for the reward model"

    def _text(self, prompt: Prompt, completion: Completion) -> tuple[str, bool]:
        tokenizer = self.classifier.tokenizer
        is_plain = len(prompt.messages) == 1 and prompt.messages[0].role == VERBATIM
        if self.input == "chat" and not tokenizer.chat_template:
            raise ConfigError(f"judge.input: the tokenizer of {self.path} has no chat template; use concat or auto")
        if self.input == "concat" or (self.input == "auto" and (is_plain or not tokenizer.chat_template)):
            return prompt.text + ("" if is_plain else "\n") + completion.text, False
        messages = [{"role": "user" if is_plain else m.role, "content": m.content} for m in prompt.messages]
        messages.append({"role": "assistant", "content": completion.text})
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), True


def load_classifier(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a trained sequence classifier from safetensors.

    Raises:
        DataError: the folder holds none, or one without a trained head.

    """
    make_room()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise DataError(
            f"{folder}: not a sequence classifier that transformers can read ({reason}); give a reward model's folder"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"{folder}: has no trained value for {', '.join(missing[:3])}; a language model without a reward head "
            "cannot score: give a trained reward model"
        )
    return model


def _label(model: PreTrainedModel, label: int | str | None, folder: Path) -> int:
    names = {int(index): str(name) for index, name in model.config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    found = [index for index, name in names.items() if label in (index, name)]
    if len(found) != 1:
        known = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
        raise ConfigError(f"judge.label: choose the logit that is the score; {folder} has {known}; got {label!r}")
    return found[0]


def longest_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None, folder: Path
) -> int | None:
    """Return the most tokens of one text, `wanted` where given; `None`: no limit is known.

    Raises:
        ConfigError: `wanted` is more than the model takes.

    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Tokenizers without a limit say a number near 1e30.
    known = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and limit < 10**9]
    if wanted is not None and known and wanted > min(known):
        raise ConfigError(f"judge.max_length: {folder} takes at most {min(known)} tokens, got {wanted}")
    return wanted if wanted is not None else min(known, default=None)


def batches_of(rows: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Yield the indices of rows that go together: the longest first, so that too large a budget fails at once."""
    batch: list[int] = []
    for index in sorted((i for i, row in enumerate(rows) if row), key=lambda i: (-len(rows[i]), i)):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _logits(classifier: Classifier, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the chosen logit of each row, float32 on the CPU."""
    return all_logits(classifier.model, rows)[:, classifier.label]


@torch.inference_mode()
def all_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits `[row label]`, float32 on the CPU. Rows are padded on the right and masked."""
    config = model.config.get_text_config()
    had_pad = config.pad_token_id is not None
    if not had_pad:
        # A decoder reads its logit at the last token that is not the padding token, and refuses a batch without one.
        # Any id that ends no row makes that the row's last token, as it is for a row alone.
        last = {row[-1] for row in rows}
        config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[config.pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    try:
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    finally:
        if not had_pad:
            config.pad_token_id = None
    found: torch.Tensor = logits.float().cpu()
    return found


def _verdicts(
    groups: Sequence[SampleGroup], scores: Sequence[float | None], notes: Sequence[str | None]
) -> list[Verdict]:
    verdicts = []
    start = 0
    for group in groups:
        end = start + len(group.completions)
        verdicts.append(Verdict(tuple(scores[start:end]), tuple(notes[start:end])))
        start = end
    return verdicts
