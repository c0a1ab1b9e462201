"""Instructions as data bring them, `instruction_id_list` and `kwargs`, and whether a text follows them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from prefloop.constraints import form, lengths, wording
from prefloop.constraints.textparts import loose_readings
from prefloop.errors import DataError
from prefloop.rows import Prompt

Criterion = Literal["strict", "loose"]

TYPES: Mapping[str, type[Any]] = {
    "change_case:capital_word_frequency": wording.CapitalWordFrequency,
    "change_case:english_capital": wording.EnglishCapital,
    "change_case:english_lowercase": wording.EnglishLowercase,
    "combination:repeat_prompt": form.RepeatPrompt,
    "combination:two_responses": form.TwoResponses,
    "detectable_content:number_placeholders": form.NumberPlaceholders,
    "detectable_content:postscript": form.Postscript,
    "detectable_format:constrained_response": form.ConstrainedResponse,
    "detectable_format:json_format": form.JsonFormat,
    "detectable_format:multiple_sections": form.MultipleSections,
    "detectable_format:number_bullet_lists": form.NumberBulletLists,
    "detectable_format:number_highlighted_sections": form.NumberHighlightedSections,
    "detectable_format:title": form.Title,
    "keywords:existence": wording.Existence,
    "keywords:forbidden_words": wording.ForbiddenWords,
    "keywords:frequency": wording.Frequency,
    "keywords:letter_frequency": wording.LetterFrequency,
    "language:response_language": wording.ResponseLanguage,
    "length_constraints:nth_paragraph_first_word": lengths.NthParagraphFirstWord,
    "length_constraints:number_paragraphs": lengths.NumberParagraphs,
    "length_constraints:number_sentences": lengths.NumberSentences,
    "length_constraints:number_words": lengths.NumberWords,
    "punctuation:no_comma": wording.NoComma,
    "startend:end_checker": form.EndPhrase,
    "startend:quotation": form.Quotation,
}
"""Every instruction type, by the id that data give it; a prefix `en:` before the id is ignored."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt: its type and what checks it."""

    type: str
    check: Callable[[str], bool]

    def followed(self, text: str, criterion: Criterion = "strict") -> bool:
        """Return whether `text` follows; a blank text follows nothing.

        strict: the text as it is. loose: any of its eight readings (`textparts.loose_readings`).
        """
        readings = loose_readings(text) if criterion == "loose" else (text,)
        return any(reading.strip() and self.check(reading) for reading in readings)


def instructions_of(row: Mapping[str, Any], place: str) -> tuple[Instruction, ...]:
    """Return the instructions of a row in IFEval's format.

    Args:
        row: has `instruction_id_list`, and `kwargs` with one object for each of its ids. Keyword arguments that are
            null count as absent, as in the hub's copy of the data.
        place: where the row comes from, for messages.

    Raises:
        DataError: a key is missing, an id is unknown, or keyword arguments are not those of the type.
        ConfigError: an instruction needs the language detector and it is not installed.

    """
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not (isinstance(ids, list) and isinstance(kwargs, list) and ids and len(ids) == len(kwargs)):
        raise DataError(f"{place}: instruction_id_list and kwargs must be lists of the same length, at least 1")
    pairs = enumerate(zip(ids, kwargs, strict=True), 1)
    return tuple(_built(name, values, f"{place}: instruction {number}") for number, (name, values) in pairs)


def gold_of(row: Mapping[str, Any]) -> str:
    """Return the instructions of a row as one JSON text: what a prompt's gold answer holds for `instructions_in_gold`.

    Example:
        >>> gold_of({"prompt": "…", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
        '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}'

    """
    return json.dumps({key: row[key] for key in ("instruction_id_list", "kwargs")}, ensure_ascii=False)


def instructions_in_gold(prompt: Prompt) -> tuple[Instruction, ...]:
    """Return the instructions in a prompt's gold answer, none if it holds something else.

    Raises:
        DataError: it is a JSON object with the key `instruction_id_list`, but not one that `instructions_of` can read.
        ConfigError: an instruction needs the language detector and it is not installed.

    """
    if prompt.gold is None or "instruction_id_list" not in prompt.gold:
        return ()
    try:
        row = json.loads(prompt.gold)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(row, dict) or "instruction_id_list" not in row:
        return ()
    return instructions_of(row, prompt.source)


def _built(name: object, values: object, place: str) -> Instruction:
    bare = str(name).removeprefix("en:")
    if bare not in TYPES:
        near = get_close_matches(bare, TYPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TYPES)}"
        raise DataError(f"{place}: no instruction type {name!r}; {hint}")
    if not isinstance(values, Mapping):
        raise DataError(f"{place}, {bare}: kwargs must be an object, got {values!r}")
    made = TYPES[bare]
    known = [field.name for field in dataclasses.fields(made)]
    given = {key: value for key, value in values.items() if value is not None}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise DataError(f"{place}, {bare}: unknown kwargs {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    try:
        return Instruction(bare, _adapter(bare).validate_python(given))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(f"{place}, {bare}: {faults}") from None


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(TYPES[name])
