"""`prefloop evaluate`: one policy on held-out prompts, with each number of revisions or beams beside the others."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefloop import stages
from prefloop.artifact import locked, write_json
from prefloop.components import build_parts, key_of
from prefloop.errors import ConfigError
from prefloop.evaluate import benchmarks
from prefloop.evaluate.heldout import Findings, baseline_metrics, candidate_metrics
from prefloop.evaluate.lm_eval import run_tasks
from prefloop.evaluate.report import write_report
from prefloop.evaluate.summary import metric_json
from prefloop.inputs import held_out, resolve_policy, resolve_prompts
from prefloop.ledger import SUMMARY
from prefloop.loop import EVALUATION_ROUND, scratch_of, set_threads
from prefloop.models.causal_lm import choose_device
from prefloop.protocols import Progress, Quiet, RoundContext
from prefloop.recipe import Recipe
from prefloop.repair import move_damaged
from prefloop.rows import JudgedGroup, Metric
from prefloop.sample.beam import Beam
from prefloop.sample.guided import Guided
from prefloop.sample.hf import Hf
from prefloop.sample.revise import Revise
from prefloop.stages import Draw, NamedJudge, Run

RESULT = "evaluation.json"


@dataclass(frozen=True)
class Row:
    """What was found with one number of revisions or of beams; both `None`: the recipe's own sampler."""

    revisions: int | None
    found: Findings
    beams: int | None = None

    @property
    def label(self) -> str:
        """The row's name in words."""
        if self.beams is not None:
            return f"{self.beams} beam{'s' if self.beams > 1 else ''}"
        return "the run's own" if self.revisions is None else f"revised {self.revisions} times"


def evaluate(
    recipe: Recipe,
    root: Path,
    revisions: Sequence[int] = (),
    beams: Sequence[int] = (),
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Measure the recipe's policy on its held-out prompts; finished stages in `root` are used again.

    With `revisions` or `beams`, once for each number, the later ones against the first: win rates are within a prompt.
    Writes `evaluation.json`.

    Raises:
        ConfigError: a choice cannot be carried out, both are given, or a sampler cannot revise or search.
        DataError, JudgeError, SamplerError, Interrupted: as `loop.run`.

    """
    parts = build_parts(recipe)
    variants = _variants(recipe, parts.eval_sampler, revisions, beams)
    policy = resolve_policy(recipe)
    prompts = held_out(recipe, resolve_prompts(recipe))
    set_threads(recipe, policy)
    spec = recipe.eval_judge or recipe.judge
    assert spec is not None  # build_parts has refused a recipe without one
    judged: list[tuple[_Variant, list[JudgedGroup]]] = []
    with locked(root):
        here = Run(root, recipe, parts, progress or Quiet(), stop, lambda: None)
        for line in move_damaged(root):
            here.progress.say(line)
        context = RoundContext(recipe.seed, EVALUATION_ROUND, policy, policy, scratch=scratch_of(root))
        for variant in variants:
            folder = root / variant.folder
            samples = stages.sample(here, folder / "1-samples", prompts, variant.draw, context)
            judge = NamedJudge(parts.eval_judge, spec.kind)
            judged.append((variant, list(stages.judge(here, folder / "2-judged", samples, judge, context))))
        rows = [_measure(variant, groups, judged[0][1], recipe.seed) for variant, groups in judged]
        write_json(root / RESULT, {"policy": policy.path, "judge": spec.kind, "rows": [_plain(row) for row in rows]})
    return rows


def evaluate_tasks(
    recipe: Recipe, tasks: Sequence[str], root: Path, *, include: Path | None = None, limit: int | None = None
) -> dict[str, Metric]:
    """Measure the recipe's policy on tasks of lm-evaluation-harness, and keep the results in `root`.

    Where `root` is a run's folder, they stand in its report, which is written anew.

    Args:
        recipe: names the policy.
        tasks: names of tasks or groups.
        root: a run's folder, or any other; `benchmarks.json` is written into it.
        include: folder with task files of your own.
        limit: only that many documents of each task.

    Raises:
        ConfigError: the harness is not installed or does not know a task, or there is no such policy.
        DataError: the policy's folder cannot be used, or there are no results.

    """
    policy = resolve_policy(recipe)
    # Left to itself the harness would take a GPU even where there is none.
    device = str(choose_device(recipe.train.device))
    folder = None if include is None else str(include)
    found = run_tasks(policy.path, tasks, include_path=folder, limit=limit, device=device)
    few = "" if limit is None else f", at most {limit} documents of each task"
    benchmarks.keep(root, policy, f"lm_eval {version('lm_eval')}{few}", found)
    if (root / SUMMARY).is_file():
        write_report(root)
    return found


@dataclass(frozen=True)
class _Variant:
    """One way to make the completions, and the folder of its results."""

    folder: str
    draw: Draw
    revisions: int | None = None
    beams: int | None = None


def _variants(recipe: Recipe, sampler: Any, revisions: Sequence[int], beams: Sequence[int]) -> list[_Variant]:
    kind = (recipe.eval_sampler or recipe.sampler).kind
    if revisions and beams:
        raise ConfigError("--beams, --revisions: vary one at a time; call evaluate once for each")
    for name, numbers in (("--revisions", revisions), ("--beams", beams)):
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"{name}: {', '.join(map(str, numbers))} has a number twice; name each once")
    if beams:
        return _searching(kind, sampler, beams)
    if revisions:
        return _revising(kind, sampler, revisions)
    if isinstance(sampler, Guided) and not sampler.reference:
        raise ConfigError(
            "eval_sampler.reference: not set; a policy that is measured by itself has no first policy of a run, so "
            "name the model that it was trained against"
        )
    return [_Variant("plain", Draw(sampler, key_of(sampler, kind)))]


def _revising(kind: str, sampler: Any, revisions: Sequence[int]) -> list[_Variant]:
    if not isinstance(sampler, Hf | Revise):
        raise ConfigError(f"--revisions: sampler.kind {kind} cannot revise; set eval_sampler.kind=revise")
    shared = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Hf) if f.init}
    own = {name: getattr(sampler, name) for name in ("instruction", "template") if hasattr(sampler, name)}
    made = [(number, Revise(revisions=number, **shared, **own)) for number in revisions]
    return [
        _Variant(f"revisions-{number}", Draw(revise, key_of(revise, "revise")), revisions=number)
        for number, revise in made
    ]


def _searching(kind: str, sampler: Any, beams: Sequence[int]) -> list[_Variant]:
    """Return a search with each number of beams; length, end and device are those of the run's own sampler."""
    if not isinstance(sampler, Hf | Revise | Beam):
        raise ConfigError(f"--beams: sampler.kind {kind} cannot search in this process; set eval_sampler.kind=beam")
    names = ("max_new_tokens", "stop", "batch", "precision", "device")
    shared = {name: getattr(sampler, name) for name in names}
    made = [(number, Beam(completions=1, beams=number, **shared)) for number in beams]
    return [_Variant(f"beams-{number}", Draw(beam, key_of(beam, "beam")), beams=number) for number, beam in made]


def _measure(variant: _Variant, groups: list[JudgedGroup], first: list[JudgedGroup], seed: int) -> Row:
    if groups is first:
        return Row(variant.revisions, baseline_metrics(groups, seed=seed), variant.beams)
    found = candidate_metrics(groups, first, first, {}, seed=seed)
    kept = {name: metric for name, metric in found.metrics.items() if not name.endswith("_best")}
    return Row(variant.revisions, dataclasses.replace(found, metrics=kept), variant.beams)


def _plain(row: Row) -> dict[str, Any]:
    metrics = {name: metric_json(metric) for name, metric in row.found.metrics.items()}
    return {"revisions": row.revisions, "beams": row.beams, "metrics": metrics, "facts": row.found.facts}
