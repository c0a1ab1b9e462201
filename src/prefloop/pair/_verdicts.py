"""A file of people's verdicts on pairs. Not a pair rule: no `kind` names this file.

One JSON object a line; other keys than these are not read:

    {"pair_id": "…", "verdict": "right"}                              left: the pair's chosen side, right: its rejected
    {"prompt_id": "…", "left": "text", "right": "text", "verdict": "tie"}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.errors import ConfigError, DataError

VERDICTS = ("left", "right", "tie", "both_bad")
KEEP, FLIP, DROP = "keep", "flip", "drop"
"""What a verdict does to a pair."""
_FIELD = "pair_builder.corrections"
_MOST_NAMED = 5

TextKey = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class Verdict:
    """One line. `left` is the left side's text; `None` where the line names a pair by its id."""

    line: int
    name: str
    verdict: str
    left: str | None


@dataclass(frozen=True)
class VerdictFile:
    """The lines of a file, by what they name."""

    path: str
    by_id: Mapping[str, Verdict]
    by_text: Mapping[TextKey, Verdict]

    def of(self, prompt_id: str, pair_ids: tuple[str, str], texts: tuple[str, str]) -> tuple[str | None, set[int]]:
        """Return what people say of a pair, `None` where they say nothing, and the numbers of the lines that do.

        Args:
            prompt_id: the pair's prompt.
            pair_ids: id of the pair, and of the same one with its sides exchanged.
            texts: its chosen and its rejected text.

        Raises:
            DataError: two lines disagree.

        """
        known = [(self.by_id.get(name), place == 0) for place, name in enumerate(pair_ids)]
        by_text = self.by_text.get((prompt_id, frozenset(texts)))
        known.append((by_text, by_text is not None and by_text.left == texts[0]))
        said = {row.line: _meaning(row.verdict, chosen_left) for row, chosen_left in known if row is not None}
        if len(set(said.values())) > 1:
            lines = " and ".join(map(str, sorted(said)))
            raise DataError(f"{self.path}: lines {lines} disagree on one pair; keep one of them")
        return next(iter(said.values()), None), set(said)

    def require_known(self, used: set[int]) -> None:
        """Refuse a file with lines that no pair answered to; `used` are the line numbers that one did.

        Raises:
            DataError: names the first such pairs.

        """
        rows = (*self.by_id.values(), *self.by_text.values())
        unknown = sorted((row.line, row.name) for row in rows if row.line not in used)
        if unknown:
            named = ", ".join(f"{name} (line {line})" for line, name in unknown[:_MOST_NAMED])
            more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
            raise DataError(
                f"{self.path}: this round has no pair {named}{more}; remove these lines. A file is for the pairs of "
                f"one round: name one for each round in per_round: {{{_FIELD}: [round-0.jsonl, null]}}"
            )


def read_verdicts(named: str) -> VerdictFile:
    """Read a file of verdicts.

    Raises:
        ConfigError: there is no such file.
        DataError: a line is not one of the two shapes, or judges a pair that an earlier one judges.

    """
    path = Path(named)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(
            f"{_FIELD}: {named} cannot be read ({error.strerror}); name a JSONL file of verdicts"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{named}: not UTF-8 at byte {error.start}; write it as UTF-8") from error
    by_id: dict[str, Verdict] = {}
    by_text: dict[TextKey, Verdict] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(f"{named}:{number}", line)
        if "pair_id" in row:
            found = Verdict(number, row["pair_id"], row["verdict"], None)
            first = by_id.setdefault(row["pair_id"], found)
        else:
            found = Verdict(number, f"of prompt {row['prompt_id']}", row["verdict"], row["left"])
            first = by_text.setdefault((row["prompt_id"], frozenset((row["left"], row["right"]))), found)
        if first is not found:
            raise DataError(f"{named}:{number}: judges the pair of line {first.line} again; keep one of the two")
    return VerdictFile(named, by_id, by_text)


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({str(error)[:80]}); put one object on each line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be an object, got {type(row).__name__}")
    if row.get("verdict") not in VERDICTS:
        raise DataError(f"{place}: verdict must be one of {', '.join(VERDICTS)}, got {row.get('verdict')!r}")
    needed = ("pair_id",) if "pair_id" in row else ("prompt_id", "left", "right")
    for key in needed:
        if not isinstance(row.get(key), str):
            raise DataError(
                f"{place}: {key} must be a string, got {row.get(key)!r}; a pair is named by pair_id, or by prompt_id "
                "with the texts left and right"
            )
    if "pair_id" not in row and row["left"] == row["right"]:
        raise DataError(f"{place}: left and right are the same text; remove the line")
    return row


def _meaning(verdict: str, chosen_left: bool) -> str:
    if verdict in ("tie", "both_bad"):
        return DROP
    return KEEP if (verdict == "left") == chosen_left else FLIP
