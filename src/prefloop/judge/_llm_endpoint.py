"""A judging model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, `transformers serve`, or hosted."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from prefloop.endpoint import FATAL, Address, Trouble, delay_after, offer
from prefloop.errors import ConfigError, JudgeError, PrefloopError
from prefloop.judge._llm_asking import Budget, Keep, Refused, Request
from prefloop.judge._llm_replies import Style
from prefloop.judge._llm_store import Reply
from prefloop.judge._llm_templates import Wording
from prefloop.judge._llm_wire import read_completion
from prefloop.rows import Message

REFUSALS = 3
"""Refusals of a server that has answered nothing yet after which it is asked no more."""
_SCHEMA_REFUSED = (400, 404, 415, 422, 501)
"""Status with which servers say that they know no JSON schema."""
Answering = Future[Reply | Refused]
"""A request under way."""


@dataclass
class Endpoint:
    """One model at one address. The key is read from the environment, sent to `base_url` only, and never shown.

    Raises:
        ConfigError: the `openai` package or the named variable is missing, or the address is none.

    """

    model: str
    base_url: str
    api_key_env: str | None
    temperature: float | None
    max_tokens: int
    reply: Literal["auto", "json", "text"]
    concurrency: int
    timeout: float
    retries: int
    max_failures: int
    check_model: bool
    _answered: int = 0
    _refused: int = 0
    _failed: int = 0
    _schema: bool | None = None
    _checked: bool = False
    _client: Any = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._address = Address(self.base_url, self.api_key_env, self.timeout, "judge")

    @property
    def name(self) -> str:
        """Address and model: a model's name alone may mean other weights elsewhere."""
        return f"{self.base_url.rstrip('/')} {self.model}"

    @property
    def source(self) -> str:
        """The model's name."""
        return self.model

    @property
    def decoding(self) -> dict[str, object]:
        """Settings on which a reply depends."""
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}

    @property
    def styles(self) -> tuple[Style, ...]:
        """JSON first where the server takes a schema."""
        return ("json", "text") if self.reply == "auto" else (self.reply,)

    @property
    def marks(self) -> tuple[str, ...]:
        """Nothing is known of the server's tokenizer; common chat marks are defused anyway."""
        return ()

    def messages(self, text: str) -> tuple[Message, ...]:
        """Return the messages in which `text` is sent: one user's turn, which every chat template takes."""
        return (Message("user", text),)

    def ask(self, requests: Sequence[Request], keep: Keep, budget: Budget) -> None:
        """Ask up to `concurrency` requests at a time and hand over every answer as it arrives.

        Raises:
            ConfigError: the endpoint does not offer the model.
            JudgeError: the endpoint cannot be reached, or keeps failing; see `max_failures`.

        """
        self._stop.clear()
        self._answered = max(self._answered, budget.calls)
        with self._address.client() as self._client:
            self._check_model()
            self._ask_all(iter(enumerate(requests)), keep, budget)

    def _ask_all(self, waiting: Iterator[tuple[int, Request]], keep: Keep, budget: Budget) -> None:
        running: dict[Answering, int] = {}
        finished: SimpleQueue[Answering] = SimpleQueue()
        trouble: PrefloopError | None = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while trouble is None and len(running) < self.concurrency:
                        index, request = next(waiting, (0, None))
                        if request is None or not budget.room(len(running)):
                            waiting = iter(())
                            break
                        future = pool.submit(self._answer, request)
                        running[future] = index
                        future.add_done_callback(finished.put)
                    if not running:
                        break
                    trouble = _hand_over(finished.get(), running, keep) or trouble
                    if trouble is not None:
                        self._stop.set()
            except BaseException:
                self._stop.set()
                for future in wait(running).done:  # what is under way was paid for
                    _hand_over(future, running, keep)
                raise
        if trouble is not None:
            raise trouble

    def _answer(self, request: Request) -> Reply | Refused:
        """Ask until there is a reply, a refusal, or no hope left. Runs in a thread of its own."""
        found: Reply | Trouble = self._tried(lambda: self._styled(request))
        with self._lock:
            return self._judged(found)

    def _judged(self, found: Reply | Trouble) -> Reply | Refused:
        """Count an outcome; raise if there is no sense in going on."""
        if isinstance(found, Reply):
            self._answered += 1
            return found
        if found.status in FATAL:
            raise JudgeError(self._fatal(found))
        if not found.again:
            self._refused += 1
            if not self._answered and self._refused >= REFUSALS:
                raise JudgeError(f"judge.base_url: {self.base_url} refuses every request: {found.why}")
            return Refused(f"the endpoint refuses it: {found.why}")
        self._failed += 1
        if self._failed > self.max_failures:
            raise JudgeError(
                f"judge.base_url: {self.base_url} fails after {self.retries + 1} attempts: {found.why}; see to the "
                "server and give the same command, what was answered is stored (judge.max_failures lets some pass)"
            )
        return Refused(f"{self.retries + 1} attempts failed: {found.why}")

    def _tried(self, attempt: Callable[[], Any]) -> Any:
        """Repeat an attempt, with growing waits, while it brings trouble that may pass."""
        for number in range(self.retries + 1):
            found = attempt()
            if not isinstance(found, Trouble) or not found.again or number == self.retries:
                return found
            delay = delay_after(number, found)
            if delay is None:
                return found
            if self._stop.wait(delay):
                return found
        raise AssertionError("unreachable")

    def _styled(self, request: Request) -> Reply | Trouble:
        """Ask with a JSON schema; where the server refuses that and takes the same without, remember it."""
        first = request.wordings[0]
        if first.style == "text":
            return self._attempt(first, request.seed, schema=False)
        fallback = request.wordings[-1]
        if self._schema is not False:
            found = self._attempt(first, request.seed, schema=True)
            if isinstance(found, Reply):
                self._schema = True
            if isinstance(found, Reply) or self._schema or found.status not in _SCHEMA_REFUSED:
                return found
        plain = self._attempt(fallback, request.seed, schema=False)
        if isinstance(plain, Reply):
            self._schema = False
        return plain

    def _attempt(self, wording: Wording, seed: int, schema: bool) -> Reply | Trouble:
        options: dict[str, Any] = {}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.temperature != 0:
            options["seed"] = seed
        if schema:
            described = {"name": "verdict", "strict": True, "schema": wording.form.schema()}
            options["response_format"] = {"type": "json_schema", "json_schema": described}
        sent = self.messages(wording.text)
        found = self._address.called(
            lambda: self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": message.role, "content": message.content} for message in sent],
                max_tokens=self.max_tokens,
                **options,
            )
        )
        return found if isinstance(found, Trouble) else read_completion(found, wording)

    def _fatal(self, found: Trouble) -> str:
        if found.status == 404:
            return f"judge.model: {self.base_url} does not answer for {self.model!r} ({found.why}){self._offer()}"
        return self._address.key_refused(found)

    def _check_model(self) -> None:
        """Refuse a model that the endpoint's list does not have; an endpoint without a list is asked right away."""
        if self._checked or not self.check_model or Path(self.model).is_dir():
            return
        found = self._tried(self._offered)
        if isinstance(found, Trouble):
            if found.status in (401, 403):
                raise JudgeError(self._fatal(found))
            if found.status is None:
                raise JudgeError(
                    f"judge.base_url: {self.base_url} cannot be used: {found.why}; start the server and give the same "
                    "command, or correct judge.base_url"
                )
        elif found and self.model not in found:
            raise ConfigError(
                f"judge.model: {self.base_url} has no {self.model!r}{offer(found)}; if it takes models that it does "
                "not list, set judge.check_model=false"
            )
        self._checked = True

    def _offered(self) -> list[str] | Trouble:
        return self._address.offered(self._client)

    def _offer(self) -> str:
        found = self._offered()
        return "" if isinstance(found, Trouble) else offer(found)


def _hand_over(future: Answering, running: dict[Answering, int], keep: Keep) -> PrefloopError | None:
    """Give a finished answer to `keep`; return what went wrong for good, if anything did."""
    index = running.pop(future)
    error = future.exception()
    if error is None:
        keep(index, future.result())
    elif not isinstance(error, PrefloopError):
        raise error
    return error
