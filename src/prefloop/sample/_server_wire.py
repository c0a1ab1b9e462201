"""What is asked of an OpenAI-compatible endpoint for a completion, and how its answer is read."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefloop.endpoint import Trouble
from prefloop.rows import VERBATIM, Message

LEVELS = 3
"""How much is asked for beside the text: 0: log-probs and token ids as vLLM gives them; 1: log-probs; 2: nothing."""
LEVEL_REFUSED = (400, 415, 422, 501)
"""Status with which servers say that they do not know a field of the request."""
NO_FILTERS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM and SGLang take these from the folder's generation_config.json where a request does not say them."""
CUT_OFF = ("abort", "error")
"""What vLLM and SGLang call the end of a completion that the server gave up."""
_TOKEN_ID = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True, slots=True)
class Wanted:
    """`count` completions of one prompt. `limit` is the most tokens of each; `seed` that of the first."""

    messages: tuple[Message, ...]
    count: int
    limit: int
    seed: int

    @property
    def chat(self) -> bool:
        """Whether the prompt goes through the server's chat template."""
        return not (len(self.messages) == 1 and self.messages[0].role == VERBATIM)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One completion as the server gave it. `seed` is the request's; `prompt_ids` is what it made of the prompt."""

    text: str
    finish_reason: str
    seed: int
    token_ids: tuple[int, ...] | None
    logps: tuple[float, ...] | None
    prompt_ids: tuple[int, ...] | None


def request_of(wanted: Wanted, decoding: dict[str, Any], level: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the client's call, without the model. Fields beyond OpenAI's go into `extra_body`.

    `extra` are such fields that are sent in any case.
    """
    options: dict[str, Any] = {**decoding, "max_tokens": wanted.limit, "seed": wanted.seed}
    if wanted.count > 1:
        options["n"] = wanted.count
    if level < LEVELS - 1:
        options["logprobs"] = True if wanted.chat else 1
    if level == 0:
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, **NO_FILTERS, **extra}
    if extra:
        options["extra_body"] = extra
    if wanted.chat:
        return options | {"messages": [{"role": m.role, "content": m.content} for m in wanted.messages]}
    return options | {"prompt": wanted.messages[0].content}


def read(found: Any, wanted: Wanted) -> list[Drawn] | Trouble:
    """Return the completions of a response, at least one and at most as many as were asked for."""
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not 1 <= len(choices) <= wanted.count:
        return Trouble(f"the response has not 1 to {wanted.count} choices", again=True, status=200)
    if any(isinstance(choice, dict) and choice.get("finish_reason") in CUT_OFF for choice in choices):
        return Trouble("the server gave up a completion", again=True, status=200)
    drawn = [_choice(choice, found, wanted) for choice in choices]
    known = [one for one in drawn if one is not None]
    if len(known) < len(drawn):
        return Trouble("the response has a choice without text", again=True, status=200)
    return known


def _choice(choice: Any, response: dict[str, Any], wanted: Wanted) -> Drawn | None:
    if not isinstance(choice, dict):
        return None
    chat = wanted.chat
    message = choice.get("message") if chat else choice
    if not isinstance(message, dict):
        return None
    text = message.get("content" if chat else "text")
    if text is None and chat:
        text = ""  # a refusal, or nothing but an end token
    if not isinstance(text, str):
        return None
    names, logps = _logps(choice.get("logprobs"), chat)
    ids = _ids(choice.get("token_ids"))
    if ids is None:
        ids = _named_ids(names)
    return Drawn(
        text=text.encode("utf-8", "replace").decode("utf-8"),  # half a surrogate pair fits into no file
        finish_reason="stop" if choice.get("finish_reason") == "stop" else "length",
        seed=wanted.seed,
        token_ids=ids,
        logps=logps if ids is not None and logps is not None and len(logps) == len(ids) else None,
        prompt_ids=_ids(choice.get("prompt_token_ids", response.get("prompt_token_ids"))),
    )


def _logps(found: Any, chat: bool) -> tuple[list[Any], tuple[float, ...] | None]:
    """Return the tokens' names and their log-probs, in nats; none where any is missing or no number."""
    if not isinstance(found, dict):
        return [], None
    if chat:
        content = found.get("content")
        rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
        names, values = [row.get("token") for row in rows], [row.get("logprob") for row in rows]
    else:
        names, values = _list(found.get("tokens")), _list(found.get("token_logprobs"))
    logps = tuple(float(v) for v in values if isinstance(v, int | float) and math.isfinite(v))
    return list(names), logps if logps and len(logps) == len(values) else None


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _ids(found: Any) -> tuple[int, ...] | None:
    if not isinstance(found, list) or not found:
        return None
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
        return None
    return tuple(found)


def _named_ids(names: Sequence[Any]) -> tuple[int, ...] | None:
    """Return the ids of tokens that are named `token_id:17`; a name that is text says no id for certain."""
    matches = [_TOKEN_ID.fullmatch(name) if isinstance(name, str) else None for name in names]
    ids = tuple(int(match[1]) for match in matches if match is not None)
    return ids if ids and len(ids) == len(matches) else None
