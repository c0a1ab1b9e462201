"""One OpenAI-compatible endpoint over HTTP: its address, key and model list, and what comes back from a request.

Requests go through the official `openai` client. Repeating them is left to the caller and not to the client: so that
a stop takes effect between two attempts, and a long Retry-After is kept to.
"""

import importlib
import importlib.util
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from prefloop.errors import ConfigError

FIRST_DELAY = 0.5
"""Seconds before the second attempt; doubled for each further one, and cut by up to a quarter at random."""
LONGEST_DELAY = 30.0
"""Seconds that one wait takes at most, unless the server asks for more."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds up to which a server's Retry-After is waited for."""
CONNECT_WITHIN = 10.0
"""Seconds in which a connection must stand, however long a reply may take."""
MOST_SAID = 500
"""Characters of a server's own words that are repeated."""
FATAL = (401, 403, 404)
"""Status with which a server refuses the key, or does not know the model."""
_OUTAGE = (408, 409, 425, 429)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an attempt brought no reply. `again`: another may; `after`: seconds that the server asks to wait."""

    why: str
    again: bool
    after: float | None = None
    status: int | None = None


@dataclass(frozen=True)
class Address:
    """An endpoint. The key is read from the environment, sent to `base_url` only, and never shown.

    `place` and `field` are the recipe's names of what holds the address, such as judge and base_url. `timeout` is
    the seconds to wait for the server's next bytes.

    Raises:
        ConfigError: the `openai` package or the named variable is missing, or the address is none.

    """

    base_url: str
    api_key_env: str | None
    timeout: float
    place: str
    field: str = "base_url"

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.named}: must be like http://127.0.0.1:8000/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"{self.named}: holds a key or password; put it into an environment variable and name "
                f"that in {self.place}.api_key_env"
            )
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(self._no_package)
        self.key()

    @property
    def named(self) -> str:
        """The setting that holds the address."""
        return f"{self.place}.{self.field}"

    @property
    def _no_package(self) -> str:
        return f"{self.named}: an endpoint needs the `openai` package: pip install 'prefloop[server]'"

    def key(self) -> str | None:
        """Return the key; `None` where none is sent.

        Raises:
            ConfigError: the variable is not set.

        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"{self.place}.api_key_env: the environment variable {self.api_key_env} is not set; put the key for "
                f"{self.base_url} there"
            )
        return key

    @cached_property
    def _library(self) -> Any:
        try:
            return importlib.import_module("openai")
        except ImportError as error:
            raise ConfigError(self._no_package) from error

    def client(self) -> Any:
        """Return a client of the official package, to be used as a context. It repeats nothing by itself."""
        host = urlsplit(self.base_url).hostname or ""
        local = host in ("localhost", "::1") or host.startswith("127.")
        client = self._library.OpenAI(
            api_key=self.key() or "none",  # without one the client would take OPENAI_API_KEY, meant for another host
            base_url=self.base_url,
            timeout=self._library.Timeout(self.timeout, connect=min(self.timeout, CONNECT_WITHIN)),
            max_retries=0,
            http_client=self._library.DefaultHttpxClient(trust_env=False) if local else None,  # this machine, no proxy
        )
        if not host.endswith("openai.com"):
            client.organization = client.project = None  # from the environment, and nobody else's business
        return client

    @property
    def root(self) -> str:
        """Where the paths of the server itself begin: the address without /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def called(self, call: Callable[[], Any]) -> Any:
        """Return the JSON of the raw response that `call` brings, or `Trouble`."""
        return self._tried(lambda: json.loads(call().content))

    def get(self, client: Any, path: str) -> Any:
        """Return what a path of the server says, JSON or text, or `Trouble`."""
        return self._tried(lambda: client.get(self.root + path, cast_to=object))

    def post(self, client: Any, path: str, body: Mapping[str, Any]) -> Any:
        """Return what a path of the server answers to `body`, JSON or text, or `Trouble`."""
        return self._tried(lambda: client.post(self.root + path, cast_to=object, body=body))

    def _tried(self, call: Callable[[], Any]) -> Any:
        errors = self._library
        try:
            return call()
        except errors.APITimeoutError as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                return Trouble("no connection could be made in time", again=True)
            return Trouble(f"no reply within {self.timeout:g} s", again=True)
        except errors.APIConnectionError as error:
            return Trouble(self._clean(f"{error} {error.__cause__ or ''}"), again=True)
        except errors.APIStatusError as error:
            return self._trouble(error.status_code, error.response.headers, error.body)
        except (ValueError, RecursionError):
            return Trouble("the response is not JSON", again=True, status=200)

    def listed(self, client: Any) -> list[dict[str, Any]] | Trouble:
        """Return the models that the endpoint lists, each with an id; none where its list is not in the common form."""
        found = self.called(lambda: client.models.with_raw_response.list())
        if isinstance(found, Trouble):
            # Not every server has a list, and one that is loading says 503.
            return replace(found, again=found.again and found.status in (None, 429, 503))
        data = found.get("data") if isinstance(found, dict) else None
        rows = data if isinstance(data, list) else []
        return [item for item in rows if isinstance(item, dict) and "id" in item]

    def offered(self, client: Any) -> list[str] | Trouble:
        """Return the names of the models that the endpoint lists."""
        found = self.listed(client)
        return found if isinstance(found, Trouble) else [str(item["id"]) for item in found]

    def key_refused(self, found: Trouble) -> str:
        """Return what to say of a key that the endpoint does not take, or of none."""
        named = f"the key in {self.api_key_env}" if self.api_key_env else "no key (name its variable in api_key_env)"
        return f"{self.place}.api_key_env: {self.base_url} refuses {named}: {found.why}"

    def _trouble(self, status: int, headers: Any, body: Any) -> Trouble:
        code = body.get("code") if isinstance(body, dict) else None
        again = (status in _OUTAGE or status >= 500) and code != "insufficient_quota"
        said = _said(body)
        why = self._clean(f"HTTP {status}: {said}" if said else f"HTTP {status}")
        if code == "insufficient_quota":
            return Trouble(why, again=True, after=float("inf"), status=status)
        return Trouble(why, again, retry_after(headers) if again else None, status)

    def _clean(self, text: str) -> str:
        """Return one short line without the key, which some servers repeat."""
        key = self.key()
        line = " ".join(text.split())
        return (line.replace(key, "***") if key else line)[:MOST_SAID]


def _said(body: Any) -> str:
    """Return what an error's body says; the client's own text leaves out what is not in OpenAI's form."""
    if isinstance(body, dict):
        body = next((body[name] for name in ("message", "detail", "error") if body.get(name)), body)
    return body if isinstance(body, str) else json.dumps(body) if body else ""


def offer(models: Sequence[str]) -> str:
    """Return the end of a sentence that names what an endpoint has."""
    more = ", …" if len(models) > 10 else ""
    return f"; it offers {', '.join(sorted(models)[:10])}{more}" if models else ""


def delay_after(number: int, found: Trouble) -> float | None:
    """Return the seconds to wait after attempt `number`, from 0, that brought `found`; `None`: longer than we wait."""
    if found.after is not None:
        return found.after if found.after <= LONGEST_RETRY_AFTER else None
    return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(number, 30)) * (1 - random.random() / 4))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait: a number or a date."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None
