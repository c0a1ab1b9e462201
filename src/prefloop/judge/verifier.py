"""Right or wrong by rule: equal to the gold answer, matching a pattern, the right number, or the user's function."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from numbers import Real
from typing import Any, Literal

from prefloop.errors import ConfigError, DataError, JudgeError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup, Verdict
from prefloop.userfile import import_user, place_of

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = rf"(?:(?<![\w.)\]])[-+])?\$?(?:{_WHOLE}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_ANY_NUMBER = re.compile(_NUMBER)
_FINAL_NUMBER = re.compile(rf"####\s*({_NUMBER})")

_Verdict = tuple[float | None, str | None]


@dataclass(frozen=True)
class Verifier:
    """1.0 for a right completion, 0.0 for a wrong one; `None` with a note where the rule cannot tell.

    - `exact`: the completion equals the prompt's gold answer.
    - `regex`: `pattern` is found in the completion (`re.search`; write `\\A…\\Z` to match all of it). If the pattern
      has a group, what the group caught must equal the gold answer too.
    - `number`: the completion's number equals the gold answer's, compared as decimals: 18, 18.0 and 18.00 are equal.
      The number is the one after `####`, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168), else the last one.
      A completion without a number is wrong.
    - `python`: `function(prompt text, completion text, gold)` of `file` returns a number, true, false, or `None`
      where it cannot tell. It must be deterministic, or a resumed run differs from an uninterrupted one.

    Raises:
        ConfigError: a field is missing, is not read in this mode, or `pattern` or `file` cannot be used.

    """

    mode: Literal["exact", "regex", "number", "python"]
    """The rule."""
    pattern: str | None = None
    """regex only: a Python regular expression with at most one group."""
    file: str | None = None
    """python only: `./my_file.py:function`."""
    ignore_case: bool = False
    """exact and regex only: letters match whatever their case."""
    strip: bool = True
    """exact and regex only: ignore white space around the completion, the caught group and the gold answer."""

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "regex", "number", "python"):
            raise ConfigError(f"judge.mode: must be exact, regex, number or python, got {self.mode!r}")
        for name, value, mode in (("pattern", self.pattern, "regex"), ("file", self.file, "python")):
            if (value is not None) != (self.mode == mode):
                need = f"mode {mode} needs it" if value is None else f"only mode {mode} reads it; leave it out"
                raise ConfigError(f"judge.{name}: {need}, got {value!r} with mode {self.mode}")
        if self.mode in ("number", "python") and (self.ignore_case or not self.strip):
            raise ConfigError(f"judge.ignore_case, judge.strip: mode {self.mode} does not read them; leave them out")
        if self.mode == "regex" and self._pattern.groups > 1:
            raise ConfigError(f"judge.pattern: {self.pattern!r} has more than one group; write (?:…) for the others")
        if self.mode == "python":
            _ = self._function

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order.

        Raises:
            DataError: the rule compares with a gold answer and none of these prompts has one.
            JudgeError: the user's function raised, or returned something that is not a finite number.

        """
        if groups:
            self.check_prompts([group.prompt for group in groups], 0)
        verdicts = []
        for group in groups:
            results = [self._judge(group.prompt, completion) for completion in group.completions]
            verdicts.append(Verdict(tuple(score for score, _ in results), tuple(note for _, note in results)))
        return verdicts

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        try:
            return re.compile(self.pattern or "", re.IGNORECASE if self.ignore_case else 0)
        except re.error as error:
            raise ConfigError(f"judge.pattern: {self.pattern!r} is not a regular expression: {error}") from error

    @cached_property
    def _function(self) -> Callable[[str, str, str | None], Any]:
        function = import_user(self.file or "", "judge.file")
        if not callable(function):
            raise ConfigError(
                f"judge.file: {self.file} is of type {type(function).__name__}; name a function in the file"
            )
        return function

    @property
    def _needs_gold(self) -> bool:
        return self.mode in ("exact", "number") or (self.mode == "regex" and self._pattern.groups > 0)

    def check_prompts(self, prompts: Sequence[Prompt], rounds: int) -> None:
        """Raise DataError if gold answers are compared with and no prompt has one; `rounds` does not matter."""
        if self._needs_gold and all(prompt.gold is None for prompt in prompts):
            raise DataError(
                f"judge verifier, mode {self.mode}: none of {len(prompts)} prompts has a gold answer (the first is "
                f"{prompts[0].source}); name the column that holds it in prompts.gold"
            )

    def _judge(self, prompt: Prompt, completion: Completion) -> _Verdict:
        if self.mode == "python":
            return self._ask_user(prompt, completion)
        if self._needs_gold and prompt.gold is None:
            return None, f"{prompt.source}: the prompt has no gold answer"
        text, gold = completion.text, prompt.gold or ""
        if self.mode == "number":
            return _same_number(text, gold)
        if self.mode == "exact":
            return float(self._normal(text) == self._normal(gold)), None
        found = self._pattern.search(text.strip() if self.strip else text)
        if found is None or not self._pattern.groups:
            return float(found is not None), None
        return float(found[1] is not None and self._normal(found[1]) == self._normal(gold)), None

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text

    def _ask_user(self, prompt: Prompt, completion: Completion) -> _Verdict:
        path, _, name = (self.file or "").rpartition(":")
        where = f"for prompt {prompt.prompt_id} ({prompt.source}), completion {completion.completion_id}"
        try:
            value = self._function(prompt.text, completion.text, prompt.gold)
        except Exception as error:  # the user's function can raise anything; the run stops and says where
            place = place_of(error, path)
            raise JudgeError(f"{place}: {name} raised {type(error).__name__} {where}: {error}") from error
        if value is None:
            return None, f"{self.file} returned None"
        score = _finite(value)
        if score is None:
            raise JudgeError(f"{path}: {name} returned {value!r} {where}; return a finite number, true, false or None")
        return score, None


def _finite(value: object) -> float | None:
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int can be larger than any float
        return None
    return number if math.isfinite(number) else None


def gsm8k_number(text: str) -> str | None:
    """Return the number after the first `####`, without thousands commas, sign and decimals kept; `None` if none.

    The form of GSM8K's answers; the reference code (openai/grade-school-math, `dataset.py`) takes the first too.
    """
    found = _FINAL_NUMBER.search(text.replace("\N{MINUS SIGN}", "-"))
    return _plain(found[1]) if found else None


def last_number(text: str) -> str | None:
    """Return the last number in plain decimal notation, as in `gsm8k_number`; `None` if there is none.

    A minus directly after a letter, digit, point or closing bracket is a subtraction or a dash, not a sign. Fractions
    and exponents are not read as one number.
    """
    found = _ANY_NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").removeprefix("+")


def _same_number(text: str, gold: str) -> _Verdict:
    wanted = gsm8k_number(gold) or last_number(gold)
    if wanted is None:
        return None, f"the gold answer has no number: {gold[-60:]!r}"
    given = gsm8k_number(text) or last_number(text)
    return float(given is not None and Decimal(given) == Decimal(wanted)), None
