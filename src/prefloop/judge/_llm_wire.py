"""What comes back from an OpenAI-compatible endpoint as a reply."""

from typing import Any

from prefloop.endpoint import Trouble
from prefloop.judge._llm_store import Reply
from prefloop.judge._llm_templates import Wording


def read_completion(found: Any, wording: Wording) -> Reply | Trouble:
    """Read a chat completion; one without text, such as a refusal, is an empty reply."""
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return Trouble("the response is not a chat completion with one choice", again=True)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return Trouble("the response has no message", again=True)
    text = message.get("content")
    text = text if isinstance(text, str) else ""
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text.encode("utf-8", "replace").decode("utf-8"),  # half a surrogate pair fits into no file
        style=wording.style,
        finish_reason=str(choices[0].get("finish_reason") or "no finish_reason"),
        prompt_tokens=_tokens(usage.get("prompt_tokens"), wording.text),
        completion_tokens=_tokens(usage.get("completion_tokens"), text),
    )


def _tokens(counted: object, text: str) -> int:
    """Return the server's count; where it gives none, a token for every four bytes."""
    if isinstance(counted, int) and not isinstance(counted, bool) and counted >= 0:
        return counted
    return -(-len(text.encode("utf-8", "replace")) // 4)
