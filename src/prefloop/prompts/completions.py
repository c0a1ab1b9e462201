"""The completions that rows bring along, row by row: what `prefloop credit` reads of a file."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from prefloop.errors import DataError
from prefloop.prompts.candidates import candidates, with_explicit_prompt
from prefloop.prompts.dataset import messages_and_gold, read_rows
from prefloop.rows import TRAIN, Candidate, Prompt, prompt_id

Named = tuple[str, Candidate]
"""What a row calls a completion, and the completion."""


def read_completions(
    path: str, *, column: str = "prompt", limit: int | None = None
) -> Iterator[tuple[Prompt, tuple[Named, ...]]]:
    """Yield each row's prompt with its completions; rows of one prompt stay apart, in the order of the file.

    Row shapes are those of `dataset.read_prompts`: `chosen` and `rejected`; one `completion` (or any other column of
    gold answers), with or without a `label`; or `completions` with `scores`.

    Raises:
        ConfigError: no such source, or a source of unknown type.
        DataError: a row cannot be used, or holds no completion; the message names file, line and key.

    """
    for place, row in islice(read_rows(path), limit):
        row = with_explicit_prompt(place, row, column)
        messages, answer = messages_and_gold(place, row, column, None)
        prompt = Prompt(prompt_id(messages), messages, answer, TRAIN, place)
        found = candidates(place, row)
        if not found and answer is not None:
            found = (Candidate(answer, None),)
        if not found:
            raise DataError(f"{place}: no completion; give chosen and rejected, completion, or completions and scores")
        yield prompt, tuple(zip(_names(row, len(found)), found, strict=True))


def _names(row: Mapping[str, Any], count: int) -> list[str]:
    if row.get("completions") is not None:
        return [f"completion {number}" for number in range(1, count + 1)]
    return ["chosen", "rejected"] if count == 2 else ["completion"]
