"""Prompts of another distribution: the policy that a run ended with against its start, beside the run's own holdout.

Everything but the prompts is as in the run's own evaluation: sampler, judge, seed. Results lie in folders of their own,
so that a run that was measured before is not touched, and the same call makes nothing twice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefloop import evidence, stages
from prefloop.artifact import Artifact
from prefloop.components import build_parts, key_of
from prefloop.errors import DataError
from prefloop.evaluate import heldout
from prefloop.evaluate.compare_data import Measured
from prefloop.evaluate.summary import metric_json
from prefloop.inputs import MIN_HOLDOUT, embedded_prompts, resolve_policy
from prefloop.loop import EVALUATION_ROUND, scratch_of
from prefloop.prompts.choice import first_by_id
from prefloop.prompts.dataset import read_prompts
from prefloop.prompts.store import ids_of, pick
from prefloop.protocols import Progress, RoundContext
from prefloop.recipe import Recipe
from prefloop.rows import JudgedGroup, PolicyRef, Prompt, digest_of
from prefloop.stages import Draw, NamedJudge, Run

FOLDER = "ood"


@dataclass(frozen=True)
class Outside:
    """The second set of prompts: what it is called, the prompts, and what was left out, in words."""

    name: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]


def read_outside(path: str, known: Iterable[str], most: int) -> Outside:
    """Return the prompts of `path` that are no prompts of the runs, at most `most`, chosen by id.

    Args:
        path: a source as `prompts.path` takes it, with the prompt in the column `prompt` or `messages`.
        known: ids of the runs' own prompts, trained on or held out.
        most: how many are kept.

    Raises:
        ConfigError: there is no such source.
        DataError: a row cannot be used, or too few prompts are left.

    """
    found = read_prompts(str(embedded_prompts(path) or path))
    inside = set(known)
    outside = np.array([name not in inside for name in ids_of(found.prompts)])
    other = first_by_id(pick(found.prompts, np.flatnonzero(outside)), None)
    shared = len(found.prompts) - len(other)
    if len(other) < MIN_HOLDOUT:
        raise DataError(
            f"--ood: {path} has {len(other)} prompts that the methods do not have themselves, and {MIN_HOLDOUT} are "
            "needed; give prompts of another distribution"
        )
    notes = [f"{path}: {shared} prompts are the methods' own too and left out."] if shared else []
    return Outside(path, tuple(other[:most]), tuple(notes))


@dataclass(frozen=True)
class Bench:
    """Where and with whom it is measured: the comparison's folder, the prompts, and whom to tell."""

    root: Path
    outside: Outside
    progress: Progress
    stop: Callable[[], bool]
    redo: bool = False

    def measure(self, recipe: Recipe, run: Measured, folder: Path, summary: Mapping[str, Any]) -> Measured:
        """Return what a finished run's end policy and its start do on these prompts; a run that failed stays failed.

        Raises:
            ConfigError, DataError, JudgeError, SamplerError, Interrupted: as `loop.run`.

        """
        if run.ended is None:
            return run
        start = resolve_policy(recipe)
        here = Run(self.root, recipe, build_parts(recipe), self.progress, self.stop, lambda: None, self.redo)
        before = self._judged(here, self.root / FOLDER / f"start-{_settings(here)}", start, start)
        own = self.root / FOLDER / run.folder
        end = _end(folder, summary, start)
        groups, metrics = before, _own(before, recipe.seed)
        if end.digest != start.digest:
            groups = self._judged(here, own, end, start)
            logps = evidence.start_logps(here, own / "3-start-logps", groups, start)
            under_start = {row.completion_id: row.token_logps for row in logps}
            metrics = _against(list(groups), list(before), under_start, recipe.seed)
        judge, sampling = _how(list(groups))
        ended = replace(
            run.ended,
            scores=_scores(groups),
            start=_scores(before),
            judge=judge,
            sampling=sampling,
            metrics=metrics,
            curve=(),
        )
        return replace(run, ended=ended)

    def _judged(self, here: Run, folder: Path, policy: PolicyRef, start: PolicyRef) -> Artifact[JudgedGroup]:
        recipe = here.recipe
        context = RoundContext(recipe.seed, EVALUATION_ROUND, policy, start, scratch=scratch_of(self.root))
        draw = Draw(here.parts.eval_sampler, key_of(here.parts.eval_sampler, _sampler_kind(recipe)))
        samples = stages.sample(here, folder / "1-samples", list(self.outside.prompts), draw, context)
        judge = NamedJudge(here.parts.eval_judge, _judge_kind(recipe))
        return stages.judge(here, folder / "2-judged", samples, judge, context)


def _settings(here: Run) -> str:
    """Return a name for how the start is measured: runs that do it alike share the result."""
    recipe = here.recipe
    sampler = key_of(here.parts.eval_sampler, _sampler_kind(recipe))
    judge = key_of(here.parts.eval_judge, _judge_kind(recipe))
    return f"seed-{recipe.seed}-{digest_of(sampler, judge, recipe.prompts_per_part)}"


def _sampler_kind(recipe: Recipe) -> str:
    return (recipe.eval_sampler or recipe.sampler).kind


def _judge_kind(recipe: Recipe) -> str:
    spec = recipe.eval_judge or recipe.judge
    assert spec is not None  # build_parts has refused a recipe without one
    return spec.kind


def _end(folder: Path, summary: Mapping[str, Any], start: PolicyRef) -> PolicyRef:
    """Return the policy in force at a run's end: the last that its gate promoted, or the start."""
    accepted = [entry for entry in summary["rounds"] if entry["accepted"]]
    if not accepted:
        return start
    last = accepted[-1]
    return PolicyRef(str(folder / last["policy"]["path"]), last["policy"]["digest"], last["round"])


def _own(groups: Iterable[JudgedGroup], seed: int) -> dict[str, Any]:
    found = heldout.baseline_metrics(list(groups), seed=seed)
    return {name: metric_json(metric) for name, metric in found.metrics.items()}


def _against(
    groups: Sequence[JudgedGroup],
    before: Sequence[JudgedGroup],
    under_start: Mapping[str, Sequence[float] | None],
    seed: int,
) -> dict[str, Any]:
    found = heldout.candidate_metrics(groups, start=before, best=before, start_logps=under_start, seed=seed)
    return {name: metric_json(metric) for name, metric in found.metrics.items() if not name.endswith("_best")}


def _scores(groups: Iterable[JudgedGroup]) -> dict[str, tuple[float | None, ...]]:
    return {group.prompt.prompt_id: group.scores for group in groups}


def _how(groups: Sequence[JudgedGroup]) -> tuple[str, str]:
    """Return judge and sampling in words."""
    ways = sorted({f"temperature {g.temperature:g}, top-p {g.top_p:g}" for g in groups})
    return " and ".join(sorted({g.judge for g in groups})), " and ".join(ways)
