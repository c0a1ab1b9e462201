"""Completions that rows bring along: TRL's preference columns, paired or not, or a list of completions with scores."""

from collections.abc import Mapping
from itertools import takewhile
from sys import float_info
from typing import Any

from prefloop.errors import DataError
from prefloop.rows import Candidate

LARGEST = float_info.max
"""The largest score: neither infinity nor NaN is below it, nor an integer of a thousand digits."""


def candidates(place: str, row: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """Return the completions of a row; none where it brings none.

    They are `completions` with `scores`; or one `completion` whose `label` is true (1) or false (0), TRL's unpaired
    format; or `chosen` (1) and `rejected` (0).

    Raises:
        DataError: the columns do not fit together; the message names place and key.

    """
    if row.get("completions") is not None:
        return _rated(place, row)
    if is_labelled(row):
        return (Candidate(_text(place, "completion", row["completion"]), float(row["label"])),)
    if row.get("chosen") is None or row.get("rejected") is None:
        return ()
    rated = (("chosen", 1.0), ("rejected", 0.0))
    return tuple(Candidate(_text(place, key, row[key]), score) for key, score in rated)


def is_labelled(row: Mapping[str, Any]) -> bool:
    """Return whether a row is of TRL's unpaired format; a `label` that is not true or false is something else."""
    return row.get("completion") is not None and isinstance(row.get("label"), bool)


def with_explicit_prompt(place: str, row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """Return `row` with the prompt that its conversations `chosen` and `rejected` share, if it has none of its own.

    Raises:
        DataError: the two conversations share no beginning.

    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if column in row or "messages" in row or not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
    if not shared:
        raise DataError(f"{place}: chosen and rejected begin differently, so they hold no common prompt; add a prompt")
    return {**row, column: shared, "chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}


def _rated(place: str, row: Mapping[str, Any]) -> tuple[Candidate, ...]:
    texts, scores = row["completions"], row.get("scores")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise DataError(f"{place}: completions must be a list, and scores a list of as many numbers")
    return tuple(
        Candidate(_text(place, f"completions[{index}]", text), _score(place, index, score))
        for index, (text, score) in enumerate(zip(texts, scores, strict=True))
    )


def _score(place: str, index: int, score: Any) -> float | None:
    if score is None:
        return None
    if isinstance(score, (int, float)) and not isinstance(score, bool) and abs(score) <= LARGEST:
        return float(score)
    raise DataError(f"{place}: scores[{index}] must be a finite number or null, got {repr(score)[:60]}")


def _text(place: str, key: str, value: Any) -> str:
    """Return a completion's text; of a conversation the one message of the assistant.

    Raises:
        DataError: it is neither.

    """
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise DataError(f"{place}: {key} must be text or one message of the assistant; several turns are not read")
        value = value[0].get("content")
    if not isinstance(value, str):
        raise DataError(f"{place}: {key} must be text, got {type(value).__name__}")
    return clean(place, key, value)


def clean(place: str, key: str, text: str) -> str:
    """Return `text`, which can be tokenized and stored.

    Raises:
        DataError: it has a null character or half a surrogate pair.

    """
    if "\0" in text:
        raise DataError(f"{place}: {key} has a null character at position {text.index(chr(0)) + 1}; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {key} has half a surrogate pair at position {error.start + 1}; correct the \\u escape"
        ) from error
    return text
