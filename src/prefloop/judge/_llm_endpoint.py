"""A judging model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, `transformers serve`, or hosted.

Requests go through the official `openai` client. Repeating them is done here and not by the client: so that a stop
takes effect between two attempts, and a long Retry-After is kept to.
"""

import importlib
import importlib.util
import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import urlsplit

from prefloop.errors import ConfigError, JudgeError, PrefloopError
from prefloop.judge._llm_asking import Budget, Keep, Refused, Request
from prefloop.judge._llm_replies import Style
from prefloop.judge._llm_store import Reply
from prefloop.judge._llm_templates import Wording
from prefloop.judge._llm_wire import Trouble, read_completion, retry_after
from prefloop.rows import Message

FIRST_DELAY = 0.5
"""Seconds before the second attempt; doubled for each further one, and cut by up to a quarter at random."""
LONGEST_DELAY = 30.0
"""Seconds that one wait takes at most, unless the server asks for more."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds up to which a server's Retry-After is waited for."""
REFUSALS = 3
"""Refusals of a server that has answered nothing yet after which it is asked no more."""
NO_PACKAGE = "judge.base_url: an endpoint needs the `openai` package: pip install 'prefloop[server]'"
_SCHEMA_REFUSED = (400, 404, 415, 422, 501)
"""Status with which servers say that they know no JSON schema."""
_FATAL = (401, 403, 404)
_OUTAGE = (408, 409, 425, 429)


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
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"judge.base_url: must be like http://127.0.0.1:8000/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "judge.base_url: holds a key or password; put it into an environment variable and name "
                "that in judge.api_key_env"
            )
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(NO_PACKAGE)
        self._key()

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
        with self._connected() as self._client:
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

    @cached_property
    def _library(self) -> Any:
        try:
            return importlib.import_module("openai")
        except ImportError as error:
            raise ConfigError(NO_PACKAGE) from error

    def _connected(self) -> Any:
        host = urlsplit(self.base_url).hostname or ""
        local = host in ("localhost", "::1") or host.startswith("127.")
        client = self._library.OpenAI(
            api_key=self._key() or "none",  # without one the client would take OPENAI_API_KEY, meant for another host
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=0,
            http_client=self._library.DefaultHttpxClient(trust_env=False) if local else None,  # this machine, no proxy
        )
        if not host.endswith("openai.com"):
            client.organization = client.project = None  # from the environment, and nobody else's business
        return client

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"judge.api_key_env: the environment variable {self.api_key_env} is not set; put the key for "
                f"{self.base_url} there"
            )
        return key

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
        if found.status in _FATAL:
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
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2**number) * (1 - random.random() / 4)
            if found.after is not None:
                if found.after > LONGEST_RETRY_AFTER:
                    return found
                delay = found.after
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
        found = self._called(
            lambda: self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": message.role, "content": message.content} for message in sent],
                max_tokens=self.max_tokens,
                **options,
            )
        )
        return found if isinstance(found, Trouble) else read_completion(found, wording)

    def _called(self, call: Callable[[], Any]) -> Any:
        """Return the JSON of a response, or what went wrong."""
        errors = self._library
        try:
            return json.loads(call().content)
        except errors.APITimeoutError:
            return Trouble(f"no reply within {self.timeout:g} s", again=True)
        except errors.APIConnectionError as error:
            return Trouble(self._clean(f"{error} {error.__cause__ or ''}"), again=True)
        except errors.APIStatusError as error:
            return self._trouble(error.status_code, error.response.headers, error.body, str(error))
        except (ValueError, RecursionError):
            return Trouble("the response is not JSON", again=True, status=200)

    def _trouble(self, status: int, headers: Any, body: Any, text: str) -> Trouble:
        code = body.get("code") if isinstance(body, dict) else None
        again = (status in _OUTAGE or status >= 500) and code != "insufficient_quota"
        why = self._clean(f"HTTP {status}: {text}")
        if code == "insufficient_quota":
            return Trouble(why, again=True, after=float("inf"), status=status)
        return Trouble(why, again, retry_after(headers) if again else None, status)

    def _clean(self, text: str) -> str:
        """Return one short line without the key, which some servers repeat."""
        key = self._key()
        line = " ".join(text.split())
        return (line.replace(key, "***") if key else line)[:300]

    def _fatal(self, found: Trouble) -> str:
        if found.status == 404:
            return f"judge.model: {self.base_url} does not answer for {self.model!r} ({found.why}){self._offer()}"
        named = f"the key in {self.api_key_env}" if self.api_key_env else "no key (name its variable in api_key_env)"
        return f"judge.api_key_env: {self.base_url} refuses {named}: {found.why}"

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
                f"judge.model: {self.base_url} has no {self.model!r}{_offer(found)}; if it takes models that it does "
                "not list, set judge.check_model=false"
            )
        self._checked = True

    def _offered(self) -> list[str] | Trouble:
        found = self._called(lambda: self._client.models.with_raw_response.list())
        if isinstance(found, Trouble):
            # Not every server has a list, and one that is loading says 503.
            return replace(found, again=found.again and found.status in (None, 429, 503))
        data = found.get("data") if isinstance(found, dict) else None
        return [str(item["id"]) for item in data or () if isinstance(item, dict) and "id" in item]

    def _offer(self) -> str:
        found = self._offered()
        return "" if isinstance(found, Trouble) else _offer(found)


def _offer(models: Sequence[str]) -> str:
    more = ", …" if len(models) > 10 else ""
    return f"; it offers {', '.join(sorted(models)[:10])}{more}" if models else ""


def _hand_over(future: Answering, running: dict[Answering, int], keep: Keep) -> PrefloopError | None:
    """Give a finished answer to `keep`; return what went wrong for good, if anything did."""
    index = running.pop(future)
    error = future.exception()
    if error is None:
        keep(index, future.result())
    elif not isinstance(error, PrefloopError):
        raise error
    return error
