"""`prefloop evaluate`: one policy on held-out prompts, with each number of self-revisions beside the others."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop import stages
from prefloop.artifact import locked, write_json
from prefloop.components import build_parts, key_of
from prefloop.errors import ConfigError
from prefloop.evaluate.heldout import Findings, baseline_metrics, candidate_metrics
from prefloop.evaluate.lm_eval import run_tasks
from prefloop.evaluate.summary import metric_json
from prefloop.inputs import held_out, resolve_policy, resolve_prompts
from prefloop.loop import EVALUATION_ROUND, scratch_of, set_threads
from prefloop.protocols import Progress, Quiet, RoundContext
from prefloop.recipe import Recipe
from prefloop.repair import move_damaged
from prefloop.rows import JudgedGroup, Metric
from prefloop.sample.hf import Hf
from prefloop.sample.revise import Revise
from prefloop.stages import Draw, NamedJudge, Run

RESULT = "evaluation.json"


@dataclass(frozen=True)
class Row:
    """What was found with one number of revisions; `None`: the recipe's own sampler."""

    revisions: int | None
    found: Findings


def evaluate(
    recipe: Recipe,
    root: Path,
    revisions: Sequence[int] = (),
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Measure the recipe's policy on its held-out prompts; finished stages in `root` are used again.

    With `revisions`, once for each number, the later ones against the first: win rates are within a prompt. Writes
    `evaluation.json`.

    Raises:
        ConfigError: a choice cannot be carried out, or revisions are asked of a sampler that cannot revise.
        DataError, JudgeError, SamplerError, Interrupted: as `loop.run`.

    """
    parts = build_parts(recipe)
    policy = resolve_policy(recipe)
    prompts = held_out(recipe, resolve_prompts(recipe))
    set_threads(recipe, policy)
    spec = recipe.eval_judge or recipe.judge
    assert spec is not None  # build_parts has refused a recipe without one
    judged: list[tuple[int | None, list[JudgedGroup]]] = []
    with locked(root):
        here = Run(root, recipe, parts, progress or Quiet(), stop, lambda: None)
        for line in move_damaged(root):
            here.progress.say(line)
        context = RoundContext(recipe.seed, EVALUATION_ROUND, policy, policy, scratch=scratch_of(root))
        for number, draw in _draws(recipe, parts.eval_sampler, revisions):
            folder = root / ("plain" if number is None else f"revisions-{number}")
            samples = stages.sample(here, folder / "1-samples", prompts, draw, context)
            judge = NamedJudge(parts.eval_judge, spec.kind)
            judged.append((number, list(stages.judge(here, folder / "2-judged", samples, judge, context))))
        rows = [_measure(number, groups, judged[0][1], recipe.seed) for number, groups in judged]
        write_json(root / RESULT, {"policy": policy.path, "judge": spec.kind, "rows": [_plain(row) for row in rows]})
    return rows


def evaluate_tasks(recipe: Recipe, tasks: Sequence[str]) -> dict[str, Metric]:
    """Measure the recipe's policy on tasks of lm-evaluation-harness.

    Raises:
        ConfigError: the harness is not installed or does not know a task, or there is no such policy.
        DataError: the policy's folder cannot be used, or there are no results.

    """
    return run_tasks(resolve_policy(recipe).path, tasks)


def _draws(recipe: Recipe, sampler: Any, revisions: Sequence[int]) -> list[tuple[int | None, Draw]]:
    kind = (recipe.eval_sampler or recipe.sampler).kind
    if not revisions:
        return [(None, Draw(sampler, key_of(sampler, kind)))]
    if not isinstance(sampler, Hf | Revise):
        raise ConfigError(f"--revisions: sampler.kind {kind} cannot revise; set eval_sampler.kind=revise")
    shared = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Hf) if f.init}
    own = {name: getattr(sampler, name) for name in ("instruction", "template") if hasattr(sampler, name)}
    made = [(number, Revise(revisions=number, **shared, **own)) for number in revisions]
    return [(number, Draw(revise, key_of(revise, "revise"))) for number, revise in made]


def _measure(number: int | None, groups: list[JudgedGroup], first: list[JudgedGroup], seed: int) -> Row:
    if groups is first:
        return Row(number, baseline_metrics(groups, seed=seed))
    found = candidate_metrics(groups, first, first, {}, seed=seed)
    kept = {name: metric for name, metric in found.metrics.items() if not name.endswith("_best")}
    return Row(number, dataclasses.replace(found, metrics=kept))


def _plain(row: Row) -> dict[str, Any]:
    metrics = {name: metric_json(metric) for name, metric in row.found.metrics.items()}
    return {"revisions": row.revisions, "metrics": metrics, "facts": row.found.facts}
