"""Problems of the sums world: chains of additions and subtractions, and solutions with mistakes, from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

TERMS = (4, 5, 6)
FIRST = (10, 99)
LATER = (2, 9)
MOST = 99
FORGETS = {2: 0.05, 3: 0.05, 4: 0.1, 5: 0.1, 6: 0.15, 7: 0.2, 8: 0.6, 9: 0.7}
"""How often the careless writer forgets a carry or a borrow, by the digit added or taken away. Above one half the
wrong result is the more probable one, so that greedy solutions are wrong too; below, sampled ones are at times."""
OFF_BY_ONE, WRONG_SIGN = 0.03, 0.01


def random_question(rng: random.Random, terms: int) -> str:
    """A question of `terms` numbers, the first of two digits, the others of one; no running value leaves 0 to 99."""
    value = rng.randint(*FIRST)
    text = str(value)
    for _ in range(terms - 1):
        number = rng.randint(*LATER)
        sign = rng.choice(
            [sign for sign, after in (("+", value + number), ("-", value - number)) if 0 <= after <= MOST]
        )
        value += number if sign == "+" else -number
        text += f"{sign}{number}"
    return f"Q: {text}=?\n"


def questions(seed: int, without: AbstractSet[str] = frozenset()) -> Iterator[str]:
    """Endless different questions, none of `without`; 4, 5 and 6 numbers take turns."""
    rng, seen = random.Random(seed), set(without)
    while True:
        for terms in TERMS:
            question = random_question(rng, terms)
            while question in seen:
                question = random_question(rng, terms)
            seen.add(question)
            yield question


def careless_solution(question: str, rng: random.Random) -> str:
    """A worked solution of a writer who makes mistakes and goes on with their results.

    The writer forgets a carry or a borrow, the more often the larger the digit (`FORGETS`), is off by one (`OFF_BY_ONE`
    of the steps), or takes the wrong sign (`WRONG_SIGN`). The text is written again where a running value would leave 0
    to 99.
    """
    first, *rest = re.split("([+-])", question.removeprefix("Q: ").removesuffix("=?\n"))
    while True:
        value, lines = int(first), []
        for index, (sign, digit) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1):
            after = _careless_result(value, sign, int(digit), rng)
            lines.append(f"Step {index}: {value}{sign}{digit}={after}\n")
            value = after
            if not 0 <= value <= MOST:
                break
        else:
            return "".join(lines) + f"Answer: {value}"


def _careless_result(value: int, sign: str, digit: int, rng: random.Random) -> int:
    if rng.random() < WRONG_SIGN:
        sign = "-" if sign == "+" else "+"
    right = value + digit if sign == "+" else value - digit
    if right // 10 != value // 10 and rng.random() < FORGETS[digit]:
        return right - 10 if sign == "+" else right + 10
    if rng.random() < OFF_BY_ONE:
        return right + rng.choice((-1, 1))
    return right
