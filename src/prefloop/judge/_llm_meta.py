"""Judgements of judgements: which of a completion's judgements is better, as a rating of each.

Meta-Rewarding Language Models, Wu et al. 2024, arXiv:2407.19594: the judging model compares its own judgements two by
two with positions swapped, and the wins become ratings. That a rating is the maximum-likelihood Bradley-Terry strength
was recalled and not found in the paper's text; the prior, a half win and a half loss against a judgement of strength 0,
is ours: without it a judgement that wins always has no finite rating. The paper's weights against position bias are not
here: both orders count the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from prefloop.judge._llm_asking import Answer, Backend, Question
from prefloop.judge._llm_questions import COMPARISON, Asked, Plan, tallies
from prefloop.judge._llm_templates import Material, Template, filled, render
from prefloop.rows import Completion, Judgement

PRIOR = 0.5
"""Wins, and losses, of every judgement against one of strength 0."""


def judgements_of(asked: Asked, answers: Sequence[Answer], backend: Backend) -> list[Judgement]:
    """Return every graded reply as a judgement of its completion; of equal completions only the first has any."""
    return [
        Judgement(
            completion=shown[0],
            messages=backend.messages(answer.wording.text),
            judgement=Completion(
                completion_id=answer.key[:16],
                text=answer.reply.text,
                token_ids=answer.reply.token_ids,
                sampler_logps=answer.reply.logps,
                finish_reason="stop" if answer.reply.finish_reason == "stop" else "length",
                seed=answer.seed,
                source=backend.source,
            ),
            score=None if answer.reading.values is None else fmean(answer.reading.values),
        )
        for shown, answer in zip(asked.shown, answers, strict=True)
        if answer.reply is not None
    ]


@dataclass(frozen=True)
class Contest:
    """The comparisons of one completion's judgements. `members` are their places among the group's judgements."""

    members: tuple[int, ...]
    shown: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]


def contests_of(
    asked: Asked, judgements: Sequence[Judgement], count: int, plan: Plan, template: Template
) -> list[Contest]:
    """Return the questions on the first `count` different judgements, with a verdict, of every completion."""
    rubric = _rubric(plan)
    found = []
    for index in sorted(set(asked.same)):
        members: dict[str, int] = {}
        for place, judgement in enumerate(judgements):
            if judgement.completion == index and judgement.score is not None and len(members) < count:
                members.setdefault(judgement.judgement.text, place)
        orders = tuple(permutations(members.values(), 2))
        questions = tuple(_question(asked, judgements, order, plan, (template, rubric)) for order in orders)
        found.append(Contest(tuple(members.values()), orders, questions))
    return found


def rated(judgements: Sequence[Judgement], contest: Contest, answers: Sequence[Answer]) -> list[Judgement]:
    """Return the judgements with the ratings of a contest; one without a comparison in both orders has none."""
    count = len(contest.members)
    place = {member: number for number, member in enumerate(contest.members)}
    wins = np.zeros((count, count))
    for (first, second), tally in tallies(contest.shown, answers).items():
        if tally.win_prob is not None:
            wins[place[first], place[second]] += tally.win_prob
            wins[place[second], place[first]] += 1.0 - tally.win_prob
    known = (wins + wins.T).sum(1) > 0
    strengths = bradley_terry(wins)
    ratings = {m: float(strengths[number]) for m, number in place.items() if known[number]}
    return [replace(j, rating=ratings.get(number, j.rating)) for number, j in enumerate(judgements)]


def bradley_terry(wins: NDArray[np.float64], tolerance: float = 1e-12) -> NDArray[np.float64]:
    """Return the strengths, natural-log odds, that make `wins` [winner loser] likeliest under `PRIOR`.

    σ(strength_i − strength_j) is the probability that i beats j (Bradley and Terry 1952). Minorization-maximization
    (Hunter 2004, Annals of Statistics 32), whose steps never lower the likelihood.
    """
    games = wins + wins.T
    won = wins.sum(1) + PRIOR
    odds = np.ones(len(wins))
    for _ in range(10_000):
        expected = (games / (odds[:, None] + odds)).sum(1) + 2 * PRIOR / (odds + 1)
        following = won / expected
        moved = np.abs(np.log(following / odds)).max(initial=0.0)
        odds = following
        if moved < tolerance:
            break
    strengths: NDArray[np.float64] = np.log(odds)
    return strengths


def _question(
    asked: Asked, judgements: Sequence[Judgement], order: tuple[int, int], plan: Plan, by: tuple[Template, str]
) -> Question:
    template, rubric = by
    first, second = (judgements[place] for place in order)
    group = asked.group
    material = Material(
        {
            "prompt": [("PROMPT", group.prompt.text)],
            "gold": [("REFERENCE ANSWER", group.prompt.gold or "")],
            "completion": [("COMPLETION", group.completions[first.completion].text)],
            "judgement_a": [("JUDGEMENT A", first.judgement.text)],
            "judgement_b": [("JUDGEMENT B", second.judgement.text)],
            "rubric": [("INSTRUCTIONS OF THE JUDGES", rubric)],
        }
    ).defused(plan.marks)
    wordings = tuple(render(template, material, COMPARISON, style) for style in plan.styles)
    ids = (first.judgement.completion_id, second.judgement.completion_id)
    return Question(wordings, "meta", template.name, group.prompt.prompt_id, ids, 0, plan.seed)


def _rubric(plan: Plan) -> str:
    """Return the grading template without the texts that were put in."""
    return filled(plan.template, {name: f"({name})" for name in plan.template.placeholders} | dict(plan.plain))
