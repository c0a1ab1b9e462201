"""Prompts from a file, a folder or a hub data set. Rows are read one by one; bad rows are refused by file and line.

Every source is first turned into places and plain rows (`read_rows`), then into prompts (`read_prompts`).
"""

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefloop.columns import UNREADABLE, batches
from prefloop.constraints.instructions import gold_of
from prefloop.errors import ConfigError, DataError
from prefloop.prompts._collected import Collected
from prefloop.prompts.candidates import candidates, clean, is_labelled, with_explicit_prompt
from prefloop.prompts.store import index_of, pick
from prefloop.remote import fetched, is_address
from prefloop.rows import HOLDOUT, TRAIN, VERBATIM, Message, Prompt, prompt_id

FILE_TYPES = (".jsonl", ".json", ".parquet", ".txt")
"""The files that can be read. `.json` holds one object a line, or one array of objects."""
LONGEST_LINE = 64 * 2**20
"""Bytes of the longest line of a file; in `.json`, where one line may hold the whole array, there is no limit."""
GOLD_COLUMNS = ("gold", "answer", "completion", "chosen")
"""Where a gold answer is looked for when no column is named: the first of these that holds one."""

_HUB = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>\w[\w.-]*))?")
_OTHER_FILE_TYPES = (".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".xlsx", ".yaml", ".yml", ".md", ".pkl")

Row = tuple[str, Mapping[str, Any]]
"""A place, such as `prompts.jsonl:12`, and what stands there."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, without duplicates. `dropped` says in words what was left out."""

    prompts: Sequence[Prompt]
    dropped: tuple[str, ...] = ()

    @property
    def train(self) -> Sequence[Prompt]:
        """The prompts to train on."""
        return pick(self.prompts, np.flatnonzero(~index_of(self.prompts).held_out))

    @property
    def holdout(self) -> Sequence[Prompt]:
        """The prompts that are only evaluated on."""
        return pick(self.prompts, np.flatnonzero(index_of(self.prompts).held_out))


def read_prompts(
    path: str,
    *,
    column: str = "prompt",
    gold: str | None = None,
    split: str = "train",
    holdout: float = 0.2,
    limit: int | None = None,
) -> PromptSet:
    """Read prompts, with a gold answer where the source has one. Any number of them takes little memory: see `store`.

    Sources: see `read_rows`. Row shapes are those of Hugging Face and TRL data sets:

    - `column` holds a string: a plain-text prompt, one message of role `rows.VERBATIM`.
    - `column` holds a list of `{role, content}`: a conversation. In a column other than `prompt`, a last message
      of the assistant is not part of the prompt but its gold answer.
    - the row has no `prompt` column but `messages`: that conversation, read in the same way.

    Completions that a row holds become the prompt's candidates: `chosen` and `rejected` with the scores 1 and 0
    (without a `prompt` column both are conversations, and what they share at the beginning is the prompt), or a list
    `completions` with as many numbers in `scores`. In rows with `completion` and a `label` that is true or false, TRL's
    unpaired format, the label is the score, 1 or 0; such rows of one prompt are put together, and a completion that is
    labelled false is no gold answer.

    A string in the column `source` is kept as the name of the data set that the row comes from.

    The gold answer is text, a number, or a list of messages whose last content counts. Empty or null means none.

    A prompt is held out if its id, as a fraction of 2^64, is below `holdout`: it stays on its side whatever prompts
    are added or removed.

    Args:
        path: the source.
        column: name of the column with the prompt.
        gold: name of the column with the gold answer. Default: the first of `GOLD_COLUMNS` that holds one.
        split: which split of a data set that has several.
        holdout: share of held-out prompts, in (0, 0.9].
        limit: read at most this many rows, duplicates included. Default: all.

    Raises:
        ConfigError: no such source, a source of unknown type, or an argument out of range.
        DataError: the source has no prompts, or a row cannot be used; the message names file, line and key.

    """
    if not 0 < holdout <= 0.9:
        raise ConfigError(f"prompts.holdout: must be above 0 and at most 0.9, got {holdout!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"prompts.limit: must be ≥ 1, got {limit!r}")
    found = Collected()
    gold_column_seen = False
    for place, row in islice(read_rows(path, split), limit):
        gold_column_seen |= gold in row
        row = with_explicit_prompt(place, row, column)
        messages, answer = messages_and_gold(place, row, column, gold)
        identity = prompt_id(messages)
        number = found.place_of(identity)
        if number == len(found):
            origin, own = origin_of(place, row), candidates(place, row)
            side = side_of(identity, holdout)
            found.add(Prompt(identity, messages, answer, side, place, candidates=own, origin=origin))
        elif is_labelled(row):
            found.add_to(number, candidates(place, row), answer)
        else:
            found.note_repeat(number, place, answer)
    if not found:
        raise DataError(f"{path}: holds no prompts; add at least one row")
    if gold is not None and not gold_column_seen:
        raise DataError(f"{path}: no row has the column {gold!r} that prompts.gold names; correct the name")
    return PromptSet(found.finish(), found.repeats.describe())


def origin_of(place: str, row: Mapping[str, Any]) -> str | None:
    """Return the name of the data set that a row says it comes from.

    Raises:
        DataError: it cannot be stored.

    """
    return clean(place, "source", row["source"]) if isinstance(row.get("source"), str) else None


def side_of(identity: str, holdout: float) -> str:
    """Return whether the prompt with this id is held out: the id, as a fraction of 2^64, is below `holdout`."""
    return HOLDOUT if int(identity, 16) / 2**64 < holdout else TRAIN


def read_rows(path: str, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a source, each with its place.

    - `.jsonl`, `.json`: one JSON object a line, blank lines skipped; or, in `.json`, one array of objects.
    - `.txt`: one prompt a line under the key `prompt`, blank lines skipped, nothing else changed.
    - `.parquet`, or a folder of them: rows are counted from 1 in each file. If a folder has files whose names
      start with the split's name, as on the hub, only those are read.
    - a folder written by `datasets.save_to_disk`, or the name of a hub data set as `owner/name` or
      `owner/name:config`: needs the `hf-data` extra. A local file or folder of the same name comes first.
    - any of these files or folders at an address such as `s3://bucket/prompts.parquet`: see `remote`.

    Raises:
        ConfigError: no such source, or a source of unknown type.
        DataError: a file cannot be decoded.

    """
    if is_address(path):
        yield from _fetched_rows(path, split)
        return
    source = Path(path).expanduser()
    if path and source.is_dir():
        yield from _folder_rows(source, split)
    elif source.exists():
        yield from _file_rows(source)
    elif _looks_like_file(path):
        raise ConfigError(f"prompts.path: no file or folder {path!r} in {Path.cwd()}; check the name")
    else:
        yield from _hub_rows(path, split)


def _fetched_rows(address: str, split: str) -> Iterator[Row]:
    """Yield the rows of a source somewhere else; places and errors name the address, not the copy."""
    with fetched(address) as copy:
        try:
            for place, row in read_rows(str(copy), split):
                yield place.replace(str(copy), address), row
        except (ConfigError, DataError) as error:
            raise type(error)(str(error).replace(str(copy), address)) from error


def _looks_like_file(path: str) -> bool:
    return Path(path).suffix.lower() in (*FILE_TYPES, *_OTHER_FILE_TYPES) or _HUB.fullmatch(path) is None


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _saved_rows(folder, split)
        return
    parts = sorted(part for part in folder.glob("*.parquet") if not part.name.startswith((".", "_")))
    of_split = [part for part in parts if re.match(rf"{re.escape(split)}[-.]", part.name)]
    if not parts:
        raise ConfigError(
            f"prompts.path: {folder} is a folder without .parquet files and not written by datasets.save_to_disk; "
            f"name a file ({', '.join(FILE_TYPES)}) or another folder"
        )
    for part in of_split or parts:
        yield from _parquet_rows(part)


def _file_rows(file: Path) -> Iterator[Row]:
    kind = file.suffix.lower()
    if kind not in FILE_TYPES:
        raise ConfigError(f"prompts.path: cannot read {file}: its type must be one of {', '.join(FILE_TYPES)}")
    if kind == ".parquet":
        yield from _parquet_rows(file)
    elif kind == ".txt":
        yield from ((place, {"prompt": text}) for place, text in _lines(file))
    else:
        yield from _json_rows(file, array_allowed=kind == ".json")


def _lines(file: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[str, str]]:
    """Yield place and text of every line that is not blank. Only `\\n` and `\\r\\n` end a line."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(longest + 1), b""), 1):
                if line.isspace():
                    continue
                place = f"{file}:{number}"
                if len(line) > longest:
                    raise DataError(f"{place}: longer than {longest} bytes, more than any model reads; shorten it")
                text = _decoded(place, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                if text.strip():
                    yield place, text.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"prompts.path: {file} cannot be read ({error.strerror}); check it") from error


def _decoded(place: str, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} is not valid UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _json_rows(file: Path, array_allowed: bool) -> Iterator[Row]:
    lines = _lines(file, sys.maxsize - 1 if array_allowed else LONGEST_LINE)
    first = next(lines, None)
    if first is None:
        return
    if array_allowed and first[1].lstrip().startswith("["):
        yield from _array_rows(file, first, lines)
        return
    for place, text in chain([first], lines):
        yield place, _object(place, _parsed(place, text))


def _array_rows(file: Path, first: tuple[str, str], rest: Iterable[tuple[str, str]]) -> Iterator[Row]:
    text = "\n".join([first[1], *(line for _, line in rest)])
    for number, item in enumerate(_parsed(str(file), text), 1):
        place = f"{file}:item {number}"
        yield place, _object(place, item)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg} at {where}); write one JSON object a line") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{place}: JSON that cannot be read ({error}); remove the line") from error


def _object(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{place}: must be a JSON object such as {{"prompt": …}}, got {_shown(value)}')
    return value


def _parquet_rows(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches(file, 256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except UNREADABLE as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise DataError(f"{file}: not a readable Parquet file after row {number} ({reason}); write it again") from error


def _hub_library(path: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"prompts.path: {path} needs the `datasets` package: pip install 'prefloop[hf-data]'"
        ) from error


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    library = _hub_library(f"{folder} (written by datasets.save_to_disk)")
    try:
        data = library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{folder}: datasets.load_from_disk cannot read it ({error}); save it again") from error
    if (folder / "dataset_dict.json").exists():
        if split not in data:
            raise ConfigError(f"prompts.split: {folder} has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    yield from ((f"{folder}:{number}", row) for number, row in enumerate(data, 1))


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    library = _hub_library(path)
    named = _HUB.fullmatch(path)
    assert named is not None
    try:
        data = library.load_dataset(named["name"], named["config"], split=split)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"prompts.path: no file or folder {path!r}, and no data set of that name could be had from the hub, split "
            f"{split!r} ({type(error).__name__}: {reason}); for a local file give a path that exists"
        ) from error
    yield from ((f"{path}/{split}:{number}", row) for number, row in enumerate(data, 1))


def messages_and_gold(
    place: str, row: Mapping[str, Any], column: str, gold: str | None
) -> tuple[tuple[Message, ...], str | None]:
    """Return the prompt of a row, and its gold answer or `None`: see `read_prompts`.

    Raises:
        DataError: the row has no such column, or it holds no prompt.

    """
    name = "messages" if column == "prompt" and "prompt" not in row else column
    if name not in row:
        raise DataError(f"{place}: no column {column!r} (columns: {_columns(row)}); name yours in prompts.column")
    messages = _messages(place, name, row[name])
    answer: str | None = None
    if messages and messages[-1].role == "assistant":
        if name == "prompt":
            raise DataError(
                f"{place}: prompt ends with a message of the assistant; end it with the user's, and put the answer "
                "into a column `gold`, or name the column `messages`"
            )
        messages, answer = messages[:-1], messages[-1].content or None
    if not messages or not messages[-1].content.strip():
        raise DataError(f"{place}: {name} is an empty prompt; give it text or remove the row")
    if gold is not None:
        answer = _gold(place, gold, row.get(gold))
    elif answer is None and "instruction_id_list" in row:  # IFEval: what a constraints judge checks
        answer = _instructions(place, row)
    elif answer is None:
        bad = "completion" if is_labelled(row) and not row["label"] else None
        named = [key for key in GOLD_COLUMNS if key in row and key != bad]
        found = [_gold(place, key, row[key]) for key in named if _is_gold(row[key])]
        answer = found[0] if found else None
    return messages, answer


def _columns(row: Mapping[str, Any]) -> str:
    named = ", ".join(str(name)[:40] for name in islice(row, 20))
    return f"{named}, …" if len(row) > 20 else named or "none"


def _instructions(place: str, row: Mapping[str, Any]) -> str:
    if "kwargs" not in row:
        raise DataError(f"{place}: instruction_id_list without kwargs; give one object for each instruction")
    try:
        return clean(place, "kwargs", gold_of(row))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{place}: instruction_id_list and kwargs must be plain JSON values ({error})") from error


def _messages(place: str, key: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(VERBATIM, clean(place, key, value)),)
    if isinstance(value, list):
        return tuple(_message(place, f"{key}[{index}]", item) for index, item in enumerate(value))
    raise DataError(f"{place}: {key} must be a string or a list of messages, got {_shown(value)}")


def _message(place: str, key: str, value: Any) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise DataError(f"{place}: {key} must have the keys role and content, got {_shown(value)}")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or role in ("", VERBATIM):
        raise DataError(f"{place}: {key}.role must be system, user, assistant or tool, got {_shown(role)}")
    if not isinstance(content, str):
        raise DataError(f"{place}: {key}.content must be a string, got {_shown(content)}")
    if value.get("tool_calls"):
        raise DataError(f"{place}: {key} has tool_calls, which are not read; remove the row or write them as content")
    return Message(clean(place, f"{key}.role", role), clean(place, f"{key}.content", content))


def _is_gold(value: Any) -> bool:
    """Whether a column that nobody named holds a gold answer."""
    last = _last_content(value)
    return isinstance(last, (str, int, float)) and not isinstance(last, bool) and last != ""


def _gold(place: str, key: str, value: Any) -> str | None:
    last = _last_content(value)
    if last is None or last == "":
        return None
    if isinstance(last, bool) or not isinstance(last, (str, int, float)):
        raise DataError(f"{place}: {key} must be a string, a number or a list of messages, got {_shown(value)}")
    return clean(place, key, str(last))


def _last_content(value: Any) -> Any:
    is_messages = isinstance(value, list) and value and isinstance(value[-1], dict)
    return value[-1].get("content") if is_messages else value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
