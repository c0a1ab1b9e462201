"""`prefloop check`: what can be known before any work, from the data files up to a judge's verdicts on a few pairs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefloop.check.data import trains_on_data
from prefloop.check.finding import Finding, counted
from prefloop.check.judging import judge_findings
from prefloop.check.model import draw, model_findings, pairs_of
from prefloop.check.space import space_findings
from prefloop.check.tokens import encode, token_findings
from prefloop.components import Parts, build_parts
from prefloop.errors import PrefloopError
from prefloop.inputs import policy_folder, resolve_policy, resolve_prompts
from prefloop.models import causal_lm
from prefloop.protocols import RoundContext
from prefloop.recipe import Recipe, distinct_rounds, for_round
from prefloop.rows import SampleGroup

PROBE = 20
"""Prompts that are sampled and judged."""


def policy_findings(
    recipe: Recipe, out: Path, combination: Callable[[Recipe, Parts], None], forward: bool = True
) -> Iterator[Finding]:
    """Yield what the model folder shows, with `forward` what its forward pass and the judge do; see docs/check.md.

    `combination` refuses settings that contradict each other (`loop.check_combination`); `out` is where the run would
    be. A fault that stops the checks is an error among the findings.
    """
    try:
        parts = build_parts(recipe)
        for number in distinct_rounds(recipe):
            its_recipe = for_round(recipe, number)
            combination(its_recipe, build_parts(its_recipe))
        yield Finding("parts", "info", "every part can be built, and they fit together")
        yield from _policy(recipe, parts, out, forward)
    except PrefloopError as error:
        yield Finding("stopped", "error", str(error), advice="correct this, then check again")


def _policy(recipe: Recipe, parts: Parts, out: Path, forward: bool) -> Iterator[Finding]:
    folder = policy_folder(recipe)
    tokenizer = causal_lm.load_tokenizer(folder)
    prompts = resolve_prompts(recipe)
    yield Finding("policy", "info", str(folder))
    encoded, refused = encode(tokenizer, prompts.prompts)
    yield from counted("prompts_refused", refused, "prompts cannot be encoded", "see the first one", "error")
    if not encoded:
        return
    yield from token_findings(recipe, tokenizer, encoded, trains_on_data(recipe))
    longest = max(len(one.ids) for one in encoded)
    yield from space_findings(recipe, folder, out, longest, (len(prompts.train), len(prompts.holdout)))
    if not forward:
        return
    policy = resolve_policy(recipe)
    context = RoundContext(recipe.seed, 0, policy, policy, (policy,))
    asked = [p for p in prompts.train if p.candidates or not trains_on_data(recipe)][:PROBE]
    probe = draw(parts, asked, context)
    if not trains_on_data(recipe):
        yield _cut(probe.groups)
    lm = causal_lm.load(str(folder), precision="auto", device=recipe.train.device)
    yield from model_findings(recipe, parts, str(folder), pairs_of(probe, encoded, lm))
    judges = {"judge": parts.judge} if parts.pair_builder.needs_scores else {}
    if (recipe.eval_judge is not None or not judges) and not trains_on_data(recipe):
        judges["eval_judge"] = parts.eval_judge
    for name, judge in judges.items():
        yield from judge_findings(name, judge, probe.groups, context)


def _cut(groups: Sequence[SampleGroup]) -> Finding:
    ends = [c.finish_reason for g in groups for c in g.completions]
    cut = sum(end == "length" for end in ends)
    bad = cut > len(ends) / 2
    return Finding(
        "cut_completions",
        "info",
        f"{cut} of {len(ends)} completions reached sampler.max_new_tokens; they are trained on without an end token",
        cut,
        advice="raise sampler.max_new_tokens if they should end" if bad else "",
    )
