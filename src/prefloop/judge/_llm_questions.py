"""Which questions a group of completions needs, and what the answers say of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from statistics import fmean

from prefloop.judge._llm_asking import Answer, Question
from prefloop.judge._llm_replies import Choice, Form, Ranking, Style
from prefloop.judge._llm_templates import Material, Template, render
from prefloop.rows import Completion, Prompt, SampleGroup, Verdict

COMPARISON = Form(("verdict",), Choice(("A", "B", "tie")))
"""The form of an answer that compares two texts."""
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the completions of a ranking are called."""


@dataclass(frozen=True)
class Plan:
    """How a group is asked about. `grade` is the form of a grade; `seed` the run's, `None` where nothing is drawn."""

    mode: str
    template: Template
    grade: Form
    repeats: int
    styles: tuple[Style, ...]
    marks: tuple[str, ...]
    seed: int | None
    plain: Mapping[str, str] = field(default_factory=dict)

    def question(self, prompt: Prompt, shown: Sequence[Completion], repeat: int) -> Question:
        """Return the question that shows the completions in this order."""
        material = self.material(prompt, {self.mode: [completion.text for completion in shown]})
        form = {"grade": self.grade, "compare": COMPARISON}.get(self.mode)
        if form is None:
            form = Form(("ranking",), Ranking(tuple(NAMES[: len(shown)])))
        wordings = tuple(render(self.template, material, form, style, self.plain) for style in self.styles)
        ids = tuple(completion.completion_id for completion in shown)
        return Question(wordings, self.mode, self.template.name, prompt.prompt_id, ids, repeat, self.seed)

    def material(self, prompt: Prompt, texts: Mapping[str, Sequence[str]]) -> Material:
        """Return the prompt and `texts`, by the kind of question, under the placeholders of a template."""
        found = {"prompt": [("PROMPT", prompt.text)]}
        if "gold" in self.template.placeholders:
            found["gold"] = [("REFERENCE ANSWER", prompt.gold or "")]
        if "grade" in texts:
            found["completion"] = [("COMPLETION", text) for text in texts["grade"]]
        if "compare" in texts:
            for letter, text in zip("AB", texts["compare"], strict=True):
                found[f"completion_{letter.lower()}"] = [(f"COMPLETION {letter}", text)]
        if "rank" in texts:
            found["completions"] = [(f"COMPLETION {n}", text) for n, text in zip(NAMES, texts["rank"], strict=False)]
        return Material(found).defused(self.marks)


@dataclass(frozen=True)
class Asked:
    """What is asked about one group.

    `same[i]` is the first completion with the text of completion i: equal texts are asked about once. `shown` are the
    completions of each question, in the order shown. `refusal` says why nothing is asked, where that is so.
    """

    group: SampleGroup
    same: tuple[int, ...]
    shown: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]
    refusal: str = ""


def asked_of(group: SampleGroup, plan: Plan) -> Asked:
    """Return the questions about one group."""
    texts = [completion.text for completion in group.completions]
    same = tuple(texts.index(text) for text in texts)
    refusal = _refusal(group, plan)
    if refusal:
        return Asked(group, same, (), (), refusal)
    placed = [(shown, repeat) for shown in _orders(sorted(set(same)), plan.mode) for repeat in range(plan.repeats)]
    questions = [
        plan.question(group.prompt, [group.completions[index] for index in shown], repeat) for shown, repeat in placed
    ]
    return Asked(group, same, tuple(shown for shown, _ in placed), tuple(questions))


def _refusal(group: SampleGroup, plan: Plan) -> str:
    if group.prompt.media or any(completion.media for completion in group.completions):
        return "this judge reads text only, and here are images or videos"
    if "gold" in plan.template.placeholders and group.prompt.gold is None:
        return f"template {plan.template.name} shows a reference answer, and the prompt has none"
    if plan.mode != "grade" and len(group.completions) < 2:
        return "there is no other completion to compare it with"
    if plan.mode == "rank" and len(group.completions) > len(NAMES):
        return f"at most {len(NAMES)} completions can be ranked at once; use judge.mode=compare"
    return ""


def _orders(distinct: Sequence[int], mode: str) -> Iterator[tuple[int, ...]]:
    """Yield what each question shows: one; every two in both orders; or all, forward and backward."""
    if mode == "grade":
        yield from ((index,) for index in distinct)
    elif mode == "compare":
        yield from permutations(distinct, 2)
    elif len(distinct) > 1:
        yield tuple(distinct)
        yield tuple(distinct)[::-1]


def verdict_of(asked: Asked, answers: Sequence[Answer], mode: str) -> Verdict:
    """Return what the answers, one for each question, say of the group."""
    if asked.refusal:
        count = len(asked.group.completions)
        return Verdict((None,) * count, (f"no verdict: {asked.refusal}",) * count)
    return _graded(asked, answers) if mode == "grade" else compared(asked.same, tallies(asked.shown, answers))


def _graded(asked: Asked, answers: Sequence[Answer]) -> Verdict:
    scores: dict[int, float | None] = {}
    notes: dict[int, str | None] = {}
    for index in set(asked.same):
        mine = [answer for shown, answer in zip(asked.shown, answers, strict=True) if shown == (index,)]
        grades = [fmean(answer.reading.values) for answer in mine if answer.reading.values is not None]
        silent = [answer for answer in mine if answer.reading.values is None]
        scores[index] = fmean(grades) if grades else None
        notes[index] = silent[0].note if not grades else None
        if grades and silent:
            notes[index] = f"{len(silent)} of {len(mine)} replies without verdict"
    return Verdict(tuple(scores[i] for i in asked.same), tuple(notes[i] for i in asked.same))


@dataclass
class Tally:
    """Votes on whether one text beats another: 1, ½ or 0, apart for the two orders in which they were shown."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def win_prob(self) -> float | None:
        """Mean over both orders, each counting half; `None` if one has no vote: half the truth may be the order's."""
        if not self.forward or not self.backward:
            return None
        return (fmean(self.forward) + fmean(self.backward)) / 2

    @property
    def flips(self) -> bool:
        """Whether the winner changes with the order."""
        if not self.forward or not self.backward:
            return False
        return (fmean(self.forward) - 0.5) * (fmean(self.backward) - 0.5) < 0


def tallies(shown: Sequence[tuple[int, ...]], answers: Sequence[Answer]) -> dict[tuple[int, int], Tally]:
    """Count the votes of comparisons and rankings, for every two of the indices shown, the lower first."""
    found: dict[tuple[int, int], Tally] = {}
    for order, answer in zip(shown, answers, strict=True):
        for (a, first), (b, second) in combinations(enumerate(order), 2):
            tally = found.setdefault((min(first, second), max(first, second)), Tally())
            if answer.reading.values is None:
                tally.notes.append(answer.note)
                continue
            wins = _first_wins(answer.reading.values[0], a, b)
            if first < second:
                tally.forward.append(wins)
            else:
                tally.backward.append(1.0 - wins)
    return found


def _first_wins(value: str | tuple[int, ...], a: int, b: int) -> float:
    """Return 1, ½ or 0 for what was shown at place a against what was shown later, at place b."""
    if isinstance(value, str):
        return {"A": 1.0, "B": 0.0, "tie": 0.5}[value]
    return 0.5 if value[a] == value[b] else float(value[a] < value[b])


def compared(same: Sequence[int], found: Mapping[tuple[int, int], Tally]) -> Verdict:
    """Return what the votes on every two different texts say of a group; `same` as in `Asked`."""

    def beats(i: int, j: int) -> float | None:
        first, second = same[i], same[j]
        if first == second:
            return 0.5
        probability = found[min(first, second), max(first, second)].win_prob
        return 1.0 - probability if probability is not None and first > second else probability

    everyone = range(len(same))
    scores: list[float | None] = []
    notes: list[str | None] = []
    for i in everyone:
        known = [p for p in (beats(i, j) for j in everyone if j != i) if p is not None]
        scores.append(fmean(known) if known else None)
        mine = [tally for pair, tally in found.items() if same[i] in pair]
        notes.append(_note(mine, len(known)))
    table = [[0.5 if i == j else beats(i, j) for j in everyone] for i in everyone]
    rows = [tuple(p for p in row if p is not None) for row in table]
    whole = all(len(row) == len(same) for row in rows)
    return Verdict(tuple(scores), tuple(notes), tuple(rows) if whole else None)


def _note(mine: Sequence[Tally], known: int) -> str | None:
    """Say of one completion why it has no score, or how many of its comparisons are flawed."""
    if not known:
        return next(note for tally in mine for note in tally.notes)
    silent = sum(tally.win_prob is None for tally in mine)
    flips = sum(tally.flips for tally in mine)
    said = [
        *([f"{silent} of {len(mine)} comparisons without verdict in both orders"] if silent else []),
        *([f"{flips} of {len(mine)} comparisons change their winner with the order"] if flips else []),
    ]
    return "; ".join(said) or None
