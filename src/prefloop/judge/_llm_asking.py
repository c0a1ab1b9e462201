"""Questions to a judging model, whoever it is: what was answered before is not asked again, and a budget is kept."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prefloop.errors import JudgeError
from prefloop.judge._llm_replies import Reading, Style
from prefloop.judge._llm_store import Facts, Reply, VerdictStore, content_key
from prefloop.judge._llm_templates import Wording
from prefloop.rows import Message

EVERY = 10.0
"""Seconds between two lines in the log on how far the questions are."""
NOTED = 2000
"""Characters of a reply that a note repeats; the store has all of it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A question as a backend sends it: in the first wording that it can use. `seed` is that of its random stream."""

    wordings: tuple[Wording, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no reply, and asking again would bring none. Nothing was paid, nothing is stored."""

    why: str


Keep = Callable[[int, Reply | Refused], None]
"""Takes the answer to the request of an index, in the caller's thread, as soon as it is there."""


@dataclass
class Budget:
    """Calls and tokens that may be used, and those that were. `None`: no limit."""

    max_calls: int | None
    max_tokens: int | None
    calls: int = 0
    tokens: int = 0
    exhausted: str = ""

    def room(self, running: int) -> bool:
        """Return whether one more call may start while `running` have no answer yet; remember it if not."""
        if self.max_calls is not None and self.calls + running >= self.max_calls:
            self.exhausted = f"judge.max_calls: all {self.max_calls} calls are used"
        elif self.max_tokens is not None and self.tokens >= self.max_tokens:
            self.exhausted = f"judge.max_tokens_total: {self.tokens} of {self.max_tokens} tokens are used"
        return not self.exhausted

    def spend(self, reply: Reply) -> None:
        """Count a reply."""
        self.calls += 1
        self.tokens += reply.prompt_tokens + reply.completion_tokens


class Backend(Protocol):
    """A judging model. `name` stands for its weights in keys; `decoding` are the settings on which a reply depends."""

    @property
    def name(self) -> str:
        """What a stored reply is known by."""
        ...

    @property
    def source(self) -> str:
        """What a judgement's completion gives as its source."""
        ...

    @property
    def decoding(self) -> dict[str, object]:
        """Settings on which a reply depends."""
        ...

    @property
    def styles(self) -> tuple[Style, ...]:
        """Styles of reply to ask for, the better first."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """Strings that must not reach the model from within a text."""
        ...

    def messages(self, text: str) -> tuple[Message, ...]:
        """Return the messages in which `text` is sent."""
        ...

    def ask(self, requests: Sequence[Request], keep: Keep, budget: Budget) -> None:
        """Ask all requests for which the budget has room and hand every answer to `keep`.

        Raises:
            ConfigError, JudgeError: it cannot be asked, or has failed for good; answers that came were handed over.

        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its wordings, and what is known of it. `seed` is the run's, `None` where nothing is drawn."""

    wordings: tuple[Wording, ...]
    mode: str
    template: str
    prompt_id: str
    shown: tuple[str, ...]
    repeat: int
    seed: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The verdict of a reply. `reply` is `None` where there was none; `key` then is that of the first wording."""

    key: str
    seed: int
    reading: Reading
    wording: Wording
    reply: Reply | None

    @property
    def note(self) -> str:
        """Why there is no verdict, with the reply as it came."""
        if self.reply is None:
            return f"no verdict: {self.reading.why}"
        return f"no verdict: {self.reading.why}; the reply: {self.reply.text[:NOTED]}"


def read(reply: Reply, wordings: Sequence[Wording]) -> tuple[Wording, Reading]:
    """Return the wording that `reply` answers and its verdict. One that was cut off has none: 1 may be half of 10."""
    wording = next(wording for wording in wordings if wording.style == reply.style)
    if reply.finish_reason != "stop":
        return wording, Reading(
            None, f"the reply did not end by itself ({reply.finish_reason}); raise judge.max_tokens"
        )
    return wording, wording.form.read(reply.text, wording.style)


@dataclass
class Asker:
    """Asks a backend what the store does not know yet."""

    backend: Backend
    store: VerdictStore
    max_calls: int | None
    max_tokens_total: int | None

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answer to each question. Questions of one content and one repeat are asked once.

        Raises:
            ConfigError, JudgeError: the backend cannot be asked, has failed for good, or the budget is used up; the
                replies that came are stored.

        """
        keys = [self._keys(question) for question in questions]
        known: dict[str, Reply | Refused] = {**self.store.find([key for some in keys for key in some])}
        open_ = {some[0]: index for index, some in enumerate(keys) if not any(key in known for key in some)}
        if open_:
            known |= self._ask_open(list(open_), [questions[index] for index in open_.values()])
        return [_answer(question, some, known) for question, some in zip(questions, keys, strict=True)]

    def _ask_open(self, keys: Sequence[str], questions: Sequence[Question]) -> dict[str, Reply | Refused]:
        budget = Budget(self.max_calls, self.max_tokens_total, *self.store.used(self.backend.name))
        answers: dict[str, Reply | Refused] = {}
        pace = _Pace(len(keys), budget)

        def keep(index: int, reply: Reply | Refused) -> None:
            answers[keys[index]] = reply
            if isinstance(reply, Reply):
                key, facts = self._filed(questions[index], reply)
                self.store.add(key, reply, facts)
                budget.spend(reply)
            pace.tell(len(answers))

        requests = [Request(q.wordings, seed_of(key)) for q, key in zip(questions, keys, strict=True)]
        self.backend.ask(requests, keep, budget)
        if budget.exhausted:
            raise JudgeError(
                f"{budget.exhausted}, {len(keys) - len(answers)} questions are left; raise it and give the same "
                "command: what was answered is stored and is not asked again"
            )
        return answers

    def _filed(self, question: Question, reply: Reply) -> tuple[str, Facts]:
        """Return the key of the wording that was answered, and what the store says of the reply."""
        wording, reading = read(reply, question.wordings)
        facts = Facts(
            judge=self.backend.name,
            mode=question.mode,
            template=question.template,
            prompt_id=question.prompt_id,
            shown=question.shown,
            repeat=question.repeat,
            verdict=None if reading.values is None else json.dumps(reading.values),
            why=reading.why,
        )
        return self._key(question, wording), facts

    def _keys(self, question: Question) -> list[str]:
        return [self._key(question, wording) for wording in question.wordings]

    def _key(self, question: Question, wording: Wording) -> str:
        return content_key(
            {
                "judge": self.backend.name,
                "decoding": self.backend.decoding,
                "text": wording.text,
                "style": wording.style,
                "repeat": question.repeat,
                "seed": question.seed,
            }
        )


def seed_of(key: str) -> int:
    """Return the seed of a question's random stream, in [0, 2^31): servers take no larger one."""
    return int(key[:8], 16) >> 1


def _answer(question: Question, keys: Sequence[str], known: dict[str, Reply | Refused]) -> Answer:
    found = next(known[key] for key in keys if key in known)
    if isinstance(found, Refused):
        return Answer(keys[0], seed_of(keys[0]), Reading(None, found.why), question.wordings[0], None)
    wording, reading = read(found, question.wordings)
    return Answer(keys[question.wordings.index(wording)], seed_of(keys[0]), reading, wording, found)


@dataclass
class _Pace:
    """Says in the log how far the questions are."""

    total: int
    budget: Budget
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < EVERY:
            return
        self.told = now
        rate = done / (now - self.began)
        _log.info(
            "judge: %d of %d replies, %.1f a second, %.0f s left, %d tokens so far",
            *(done, self.total, rate, (self.total - done) / rate, self.budget.tokens),
        )
