"""Preferences by a model that reads two completions at once, as published pairwise preference models do."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Literal

from prefloop.errors import ConfigError, DataError
from prefloop.judge._llm_questions import Tally, compared
from prefloop.judge._llm_store import Facts, InMemory, Reply, VerdictStore, content_key, open_file
from prefloop.judge._odds import log_odds, word_ids, word_logps
from prefloop.judge.reward_model import all_logits, batches_of, load_classifier, longest_text
from prefloop.models.causal_lm import (
    check_folder,
    choose_device,
    choose_dtype,
    encode_prompt,
    folder_digest,
    load,
    load_tokenizer,
    locate,
    quiet,
)
from prefloop.protocols import RoundContext
from prefloop.rows import TRAIN, VERBATIM, Message, Prompt, SampleGroup, Verdict, prompt_id

FILE = "verdicts.sqlite"
"""Name of the store in `RoundContext.scratch`, the one of `judge/llm.py`."""
RLHFLOW = "[CONTEXT] {{context}} [RESPONSE A] {{a}} [RESPONSE B] {{b}} \n"
PLACES = ("context", "prompt", "a", "b")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_NO_VERDICT = "no verdict: the two completions are longer together than the model takes, or its output is not finite"

Ask = Callable[[Sequence[str]], list[float | None]]
"""Returns for each text the log-odds that the completion shown first is the better one; `None`: no verdict."""


@dataclass(frozen=True)
class PreferenceModel:
    """P(y₁ beats y₂ | x) of a model that reads both completions in one text; every two, in both orders, averaged.

    - `words`: a causal language model is asked with `template` and P is what it gives to the word `A` against `B` as
      the next one: σ(log π(A) − log π(B)). The default template and the words are those of RLHFlow's
      pair-preference-model (Dong et al. 2024, RLHF Workflow, arXiv:2405.07863), as its model card shows them; its turns
      are rendered as there.
    - `classifier`: a sequence classifier reads the text. One logit: P is its σ. Two labels, first and second is better:
      their softmax. Three, the last a tie: the tie counts half. That order of the labels is our choice; the model's
      own must be the same.

    `win_prob` is the mean over both orders and the score of a completion the mean of its win probabilities against the
    others, in [0, 1]. A pair that is longer than the model takes has no verdict: cutting it would cut one side. Models
    that need code of their own, such as PairRM, cannot be loaded. A completion that writes like the template can fool
    such a model; nothing here prevents that.

    Raises:
        ConfigError: a field is out of range, or on loading: no such folder, hub id or device.
        DataError: on loading: no safetensors or tokenizer, another kind of model, or one token for both words.

    """

    path: str
    """Folder or hub id of the model."""
    head: Literal["words", "classifier"] = "words"
    """What the preference is read off."""
    template: str = RLHFLOW
    """The text, with {{a}} and {{b}} for the completions and {{context}} (the prompt's turns as RLHFlow writes them) or
    {{prompt}} (its plain text). With a chat template it becomes the user's turn."""
    words: tuple[str, str] = ("A", "B")
    """words: what the model says where the first completion is better, and where the second one is."""
    bos: bool = True
    """words: begin with the tokenizer's beginning-of-sequence token, if it has one. RLHFlow's own code leaves it out:
    set false for its models."""
    max_length: int | None = None
    """classifier: pairs of more tokens than this have no verdict. Default: what model and tokenizer say they take."""
    batch_tokens: int = 8192
    """At most this many tokens in one forward pass, padding included; a longer single pair goes alone."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one; or cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        named = set(_PLACEHOLDER.findall(self.template))
        for name, holds, rule in (
            ("path", bool(self.path), "a folder or hub id of a preference model"),
            ("head", self.head in ("words", "classifier"), "words or classifier"),
            ("template", {"a", "b"} <= named, "a text with {{a}} and {{b}} for the two completions"),
            ("template", bool(named & {"context", "prompt"}), "a text with {{context}} or {{prompt}}"),
            ("template", named <= set(PLACES), f"a text with no other placeholders than {', '.join(PLACES)}"),
            ("words", all(self.words) and self.words[0] != self.words[1], "two different words"),
            ("max_length", self.max_length is None or self.max_length >= 2, "≥ 2"),
            ("batch_tokens", self.batch_tokens >= 1, "≥ 1"),
        ):
            if not holds:
                raise ConfigError(
                    f"judge.{name} (judge/preference_model.py): must be {rule}, got {getattr(self, name)!r}"
                )
        if self.head == "words" and self.max_length is not None:
            raise ConfigError("judge.max_length: only judge.head=classifier reads it; leave it out")
        if self.head == "classifier" and not self.bos:
            raise ConfigError("judge.bos: only judge.head=words reads it; leave it out")

    @cached_property
    def _memory(self) -> InMemory:
        return InMemory()

    @contextmanager
    def _opened(self, context: RoundContext) -> Iterator[VerdictStore]:
        if context.scratch is None:
            yield self._memory
            return
        with open_file(Path(context.scratch, FILE)) as file:
            yield file

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order. What the run has stored is not computed again."""
        if not groups:
            return []
        with self._opened(context) as store:
            odds = self._answered(groups, store)
        return [self._verdict(group, odds) for group in groups]

    def _texts(self, group: SampleGroup) -> dict[tuple[int, int], str]:
        """Return what is asked about every two different completions, by their places, in both orders."""
        if group.prompt.media or any(completion.media for completion in group.completions):
            return {}
        same = _same(group)
        parts = {"prompt": group.prompt.text, "context": turns(group.prompt)}
        shown = {i: group.completions[i].text for i in same}
        return {
            (i, j): filled(self.template, {**parts, "a": shown[i], "b": shown[j]})
            for i, j in permutations(sorted(set(same)), 2)
        }

    def _answered(self, groups: Sequence[SampleGroup], store: VerdictStore) -> dict[str, float | None]:
        """Return the log-odds of each text, those that the store does not hold computed and put there."""
        shown = self._shown_by(groups)
        keys = {text: self._key(text) for text in shown}
        stored = store.find(list(dict.fromkeys(keys.values())))
        found: dict[str, float | None] = {text: _read(stored[key]) for text, key in keys.items() if key in stored}
        fresh = [text for text in keys if text not in found]
        odds = self._ask(fresh) if fresh else []
        for text, value in zip(fresh, odds, strict=True):
            found[text] = value
            if value is not None:
                prompt, ids = shown[text]
                letter = "A" if value > 0 else "B" if value < 0 else "tie"
                facts = Facts(
                    judge=self._name,
                    mode="compare",
                    template=self.head,
                    prompt_id=prompt,
                    shown=ids,
                    repeat=0,
                    verdict=json.dumps([letter]),
                    why="",
                )
                store.add(keys[text], Reply(json.dumps(value), "text", "stop", 0, 0), facts)
        return found

    def _shown_by(self, groups: Sequence[SampleGroup]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return the prompt and the completions, in the order shown, of each text."""
        return {
            text: (group.prompt.prompt_id, tuple(group.completions[i].completion_id for i in places))
            for group in groups
            for places, text in self._texts(group).items()
        }

    def _verdict(self, group: SampleGroup, odds: Mapping[str, float | None]) -> Verdict:
        same, count = _same(group), len(group.completions)
        if group.prompt.media or any(completion.media for completion in group.completions):
            return _silent(count, "no verdict: this judge reads text only, and here are images or videos")
        if count < 2:
            return _silent(count, "no verdict: there is no other completion to compare it with")
        tallies: dict[tuple[int, int], Tally] = {}
        for (i, j), text in self._texts(group).items():
            tally = tallies.setdefault((min(i, j), max(i, j)), Tally())
            value = odds[text]
            if value is None:
                tally.notes.append(_NO_VERDICT)
            elif i < j:
                tally.forward.append(_sigmoid(value))
            else:
                tally.backward.append(_sigmoid(-value))
        return compared(same, tallies)

    @cached_property
    def _folder(self) -> Path:
        try:
            return locate(self.path)
        except ConfigError as error:
            raise ConfigError(f"judge.path: {str(error).removeprefix('policy: ')}") from error

    @cached_property
    def _name(self) -> str:
        return folder_digest(self._folder)

    def _key(self, text: str) -> str:
        settings = [self.head, self.words, self.bos, self.max_length, self.precision, self.device]
        return content_key({"judge": self._name, "preference": settings, "text": text})

    @cached_property
    def _ask(self) -> Ask:
        return self._by_words() if self.head == "words" else self._by_classifier()

    def _by_words(self) -> Ask:
        lm = load(str(self._folder), precision=self.precision, device=self.device)
        words = word_ids(lm, self.words)

        def encoded(text: str) -> tuple[int, ...]:
            messages = (Message("user" if lm.tokenizer.chat_template else VERBATIM, text),)
            with quiet():  # the tokenizer warns of a text that is too long, which then has no verdict
                ids = encode_prompt(lm.tokenizer, Prompt(prompt_id(messages), messages, None, TRAIN, "judge"))
            first = lm.tokenizer.bos_token_id
            return tuple(ids[1:] if not self.bos and ids[0] == first and len(ids) > 1 else ids)

        def ask(texts: Sequence[str]) -> list[float | None]:
            logps = word_logps(lm, [encoded(text) for text in texts], words, self.batch_tokens)
            return [None if pair is None else log_odds(pair) for pair in logps]

        return ask

    def _by_classifier(self) -> Ask:
        check_folder(self._folder)
        device = choose_device(self.device)
        with quiet():
            tokenizer = load_tokenizer(self._folder)
            model = load_classifier(self._folder, choose_dtype(self.precision, device)).to(device).eval()
        if len(model.config.id2label) > 3:
            raise DataError(
                f"{self._folder}: a classifier of {len(model.config.id2label)} labels; a pairwise one has one, two "
                "(first, second) or three (first, second, tie)"
            )
        limit = longest_text(model, tokenizer, self.max_length, self._folder)

        def encoded(text: str) -> list[int]:
            is_chat = bool(tokenizer.chat_template)
            if is_chat:
                text = str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False))
            ids = list(tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"])
            return ids if limit is None or len(ids) <= limit else []

        def ask(texts: Sequence[str]) -> list[float | None]:
            rows = [encoded(text) for text in texts]
            found: list[float | None] = [None] * len(rows)
            for batch in batches_of(rows, self.batch_tokens):
                logits = all_logits(model, [rows[index] for index in batch])
                for index, row in zip(batch, logits.tolist(), strict=True):
                    found[index] = first_wins(row)
            return found

        return ask


def first_wins(logits: Sequence[float]) -> float | None:
    """Return the log-odds that the first is better, from one, two or three logits; `None` if one is not finite.

    Example:
        >>> first_wins([0.5]), first_wins([2.0, 1.5]), first_wins([1.0, 1.0, 7.0])
        (0.5, 0.5, 0.0)

    """
    if not all(map(math.isfinite, logits)):
        return None
    if len(logits) < 3:
        return logits[0] - (logits[1] if len(logits) == 2 else 0.0)
    first, second, tie = (math.exp(value - max(logits)) for value in logits)
    return math.log(first + tie / 2) - math.log(second + tie / 2) if tie else logits[0] - logits[1]


def turns(prompt: Prompt) -> str:
    """Return a prompt's turns as RLHFlow's preference models read them."""
    who = ["user" if message.role in ("user", VERBATIM) else message.role for message in prompt.messages]
    said = (f"\n<turn> {name}\n {message.content}" for name, message in zip(who, prompt.messages, strict=True))
    return "\n" + "".join(said) + "\n"


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Put `parts` in place of the placeholders, once: what they hold is not searched for more."""
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], template)


def _same(group: SampleGroup) -> tuple[int, ...]:
    """Return for each completion the first one with its text."""
    texts = [completion.text for completion in group.completions]
    return tuple(texts.index(text) for text in texts)


def _silent(count: int, why: str) -> Verdict:
    return Verdict((None,) * count, (why,) * count)


def _read(reply: Reply) -> float:
    return float(json.loads(reply.text))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))
