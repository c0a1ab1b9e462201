"""What the parts of a recipe need of the data that the user brings: looked at before any work."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from prefloop import stages
from prefloop.components import Parts, build_parts
from prefloop.errors import DataError
from prefloop.judge.given import Given as GivenScores
from prefloop.judge.unscored import Unscored
from prefloop.prompts.store import index_of, pick
from prefloop.protocols import Allotment, ChecksPrompts, RoundContext
from prefloop.recipe import Recipe, for_round
from prefloop.rows import JudgedGroup, PolicyRef, Prompt
from prefloop.sample.given import Given
from prefloop.stages import NamedJudge, chunks


def check_data(recipe: Recipe, policy: PolicyRef, train: Sequence[Prompt], holdout: Sequence[Prompt]) -> None:
    """Refuse data that lack what the recipe's parts read in some round.

    Raises:
        DataError: says what is missing, in which rows, and in which field or column to give it.

    """
    asked: set[tuple[str, int]] = set()

    def ask(part: object, prompts: Sequence[Prompt]) -> None:
        mark = (repr(part), len(prompts))  # rounds with the same part read the same prompts, often many
        if isinstance(part, ChecksPrompts) and mark not in asked:
            part.check_prompts(prompts, recipe.rounds)
            asked.add(mark)

    parts = build_parts(recipe)
    ask(parts.order, train)
    ask(parts.eval_judge, holdout)
    for number in range(recipe.rounds):
        its = for_round(recipe, number)
        parts = build_parts(its)
        prompts = usable_prompts(train, parts)
        if parts.pair_builder.needs_scores:
            ask(parts.judge, prompts)
        if isinstance(parts.sampler, Given):
            if not parts.order.needs_margins:
                prompts = parts.order(prompts, Allotment(number, recipe.rounds, its.prompts_per_round, recipe.seed, {}))
            part = parts.sampler
            if isinstance(part, ChecksPrompts):
                part.check_prompts(prompts, recipe.rounds)
            # Log-probs are not known yet, and decide which pairs there are, not whether.
            context = RoundContext(recipe.seed, number, policy, policy, (policy,), logps=defaultdict(float))
            _check_given_pairs(its, parts, prompts, context)


def usable_prompts(prompts: Sequence[Prompt], parts: Parts) -> Sequence[Prompt]:
    """Return the training prompts that the pair rule can use.

    Raises:
        DataError: it needs reference answers and no prompt has one.

    """
    if not parts.pair_builder.needs_gold:
        return prompts
    with_gold = pick(prompts, np.flatnonzero(index_of(prompts).has_gold))
    if not with_gold:
        raise DataError(
            "prompts: the pair rule needs a reference answer for each prompt and none has one; name the column that "
            "holds it in prompts.gold"
        )
    return with_gold


def _check_given_pairs(recipe: Recipe, parts: Parts, prompts: Sequence[Prompt], context: RoundContext) -> None:
    """Refuse a round in which the data's own completions and ratings make no pair: both are known already."""
    builder = parts.pair_builder
    if builder.needs_scores and not isinstance(parts.judge, GivenScores):
        return  # nobody knows yet what the judge will say
    judge = parts.judge if builder.needs_scores else Unscored()
    named = NamedJudge(judge, "given", with_gold=builder.needs_scores and builder.needs_gold)

    def groups() -> Iterator[JudgedGroup]:
        for part in chunks(prompts, recipe.prompts_per_part):
            yield from stages.judge_part(parts.sampler(part, context), named, context)

    if next(iter(builder(groups(), context)), None) is not None:
        return
    rated = [{c.score for c in prompt.candidates if c.score is not None} for prompt in prompts]
    fewer = f"set rounds={context.round}, or " if context.round else ""
    raise DataError(
        f"prompts: the completions that the data bring make no pairs in round {context.round} (pair_builder.kind "
        f"{recipe.pair_builder.kind}). Of {len(prompts)} prompts {rated.count(set())} have no ratings and "
        f"{sum(len(scores) == 1 for scores in rated)} rate all completions alike; none has more than "
        f"{max(len(prompt.candidates) for prompt in prompts)} completions. To go on, {fewer}give different numbers in "
        "the column `scores`, or choose another judge.kind"
    )
