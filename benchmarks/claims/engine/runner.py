"""One job from start to end: make the run, measure its policies, keep the numbers. Called in worker processes."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.engine import worlds
from benchmarks.claims.engine.data import prompts_file
from benchmarks.claims.engine.records import PLAIN, Arm, Claim, Job, Sizes
from benchmarks.claims.engine.reward import reward_model
from benchmarks.claims.engine.start import tuned_policy
from prefloop import loop
from prefloop.artifact import file_digest
from prefloop.components import build
from prefloop.errors import TrainingDiverged
from prefloop.evaluate.heldout import repetition
from prefloop.inputs import resolve_policy, resolve_prompts
from prefloop.launch import read_recipe
from prefloop.models.causal_lm import folder_digest, forget
from prefloop.protocols import RoundContext
from prefloop.recipe import Recipe, Spec
from prefloop.rows import PolicyRef, Prompt, digest_of

MEASURED = "measured.json"
PART = 64
"""Prompts sampled together."""
QUICK_TOKENS = 8
"""Length of a story in a smoke test; a sum has to reach its answer."""


def job_of(claim: Claim, arm: Arm, rate: float, seed: int, sizes: Sizes) -> Job:
    """Return the run of an arm: a tuning seed is measured on validation prompts, any other on the reported ones."""
    return Job(
        recipe=arm.recipe,
        settings=(*worlds.BASE, *claim.common, *arm.settings, *(worlds.QUICK if sizes.quick else ())),
        judge=claim.judge,
        judges=claim.judges(),
        world=claim.world,
        data=claim.data,
        start=claim.start,
        new_tokens=QUICK_TOKENS if sizes.quick and claim.world == "stories" else claim.new_tokens,
        rate=rate,
        seed=seed,
        split="validation" if seed in sizes.tuning_seeds else "report",
        sizes=sizes,
        eval_sampler=arm.eval_sampler,
        revisions=arm.revisions,
    )


def folder_of(job: Job, out: Path) -> Path:
    """Return the job's run folder; jobs of several claims that are the same run share it."""
    named = {name: worlds.JUDGES[name] for name in {job.judge, *job.judges}}
    key = asdict(job)
    if job.eval_sampler == PLAIN:
        del key["eval_sampler"]
    if not job.revisions:
        del key["revisions"]
    text = json.dumps([key, named], sort_keys=True)
    parts = {path.name: file_digest(path) for path in worlds.PARTS.glob("*.py") if path.name in text}
    return out / "runs" / f"{job.recipe}-{digest_of(text, parts)[:10]}-seed-{job.seed}"


def recipe_of(job: Job, out: Path) -> tuple[Recipe, dict[str, str]]:
    """Return the job's recipe; makes its data file if it has one."""
    limit = worlds.LIMIT_QUICK if job.sizes.quick else None
    prompts = worlds.WORLDS[job.world]
    if job.data != "prompts":
        prompts = prompts_file(job.data, job.seed, out / "data", job.new_tokens, limit)
    policy = worlds.WORLDS[job.world]
    if job.start == "tuned":
        policy = tuned_policy(out / "data", worlds.HOLDOUT, limit)
    settings = [
        f"policy={policy}",
        f"prompts.path={prompts}",
        *worlds.judge_settings(job.judge, given=job.data != "prompts", made=_made(job, out, limit)),
        f"{'eval_sampler' if job.data != 'prompts' else 'sampler'}.max_new_tokens={job.new_tokens}",
        *(worlds.resolve(setting) for setting in job.settings),
        f"train.learning_rate={job.rate}",
        f"seed={job.seed}",
    ]
    return read_recipe(job.recipe, settings)


def _made(job: Job, out: Path, limit: int | None) -> str:
    """Return the folder of a training judge that is made for each seed; makes it if it is not there."""
    if job.judge not in worlds.MADE:
        return ""
    rated = prompts_file(worlds.MADE[job.judge], job.seed, out / "data", job.new_tokens, limit)
    return reward_model(Path(rated), job.seed, out / "data", worlds.HOLDOUT)


def work(job: Job, out: Path) -> float:
    """Do a job unless its numbers are there; return the seconds it took.

    Raises:
        PrefloopError: the run failed other than by divergence, which is a result and kept as one.

    """
    folder = folder_of(job, out)
    if (folder / MEASURED).exists():
        return 0.0
    began = time.monotonic()
    recipe, origins = recipe_of(job, out)
    try:
        summary = loop.run(recipe, folder, origins=origins)
        found = measure(job, recipe, folder, summary)
    except TrainingDiverged as error:
        found = {"diverged": str(error).replace(str(folder), folder.name)}
    forget()
    found["seconds"] = round(time.monotonic() - began, 1)
    found["job"] = asdict(job)
    _write(folder / MEASURED, found)
    drop_weights(folder)
    return float(found["seconds"])


def measure(job: Job, recipe: Recipe, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return scores of held-out completions of the start and each round's policy, and what was spent."""
    rounds = summary["rounds"]
    promoted = [entry["accepted"] for entry in rounds]
    prompts = held_out(job, recipe)
    start = Path(resolve_policy(recipe).path)
    paths = [start, *(folder / entry["policy"]["path"] for entry in rounds)]
    if job.split == "validation":  # only the end decides about a learning rate
        last = max((index for index, accepted in enumerate(promoted, 1) if accepted), default=0)
        paths, promoted = [start, paths[last]], [True]
    looks = [(path, job.eval_sampler) for path in paths]
    if job.revisions:
        revised = [{"kind": "revise", "revisions": number} for number in job.revisions]
        looks = [(start, job.eval_sampler), *((paths[-1], sampler) for sampler in revised)]
        promoted = [True] * len(revised)
    return {
        "promoted": promoted,
        "policies": [look(job, recipe, path, prompts, sampler) for path, sampler in looks],
        "kl": [entry["metrics"]["kl_policy_start"]["value"] for entry in rounds],
        "completions": sum(entry["facts"]["samples"]["completions"] for entry in rounds),
        "pairs": sum(entry["facts"]["batches"]["pairs"] for entry in rounds) * recipe.train.epochs,
        "updates": sum(entry["facts"]["policy"]["steps"] for entry in rounds),
    }


def held_out(job: Job, recipe: Recipe) -> list[Prompt]:
    """Return the prompts of the job's split: by id, the first are for validation (and the run's gate), the rest for
    the report.
    """
    ordered = sorted(resolve_prompts(recipe).holdout, key=lambda p: p.prompt_id)
    border = worlds.HELD_OUT_QUICK if job.sizes.quick else job.sizes.validation
    chosen = ordered[:border] if job.split == "validation" else ordered[border : border + job.sizes.report]
    return chosen[: worlds.HELD_OUT_QUICK] if job.sizes.quick else chosen


def look(
    job: Job, recipe: Recipe, path: Path, prompts: Sequence[Prompt], eval_sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what held-out completions of one policy score, by judge and prompt, and how they look."""
    policy = PolicyRef(str(path), folder_digest(path), round=-1)
    context = RoundContext(recipe.seed, loop.EVALUATION_ROUND, policy, policy)
    settings = {**eval_sampler, "completions": job.sizes.completions, "max_new_tokens": job.new_tokens}
    sampler = build("eval_sampler", Spec.model_validate(settings))
    parts = [prompts[first : first + PART] for first in range(0, len(prompts), PART)]
    groups = [group for part in parts for group in sampler(part, context)]
    completions = [c for group in groups for c in group.completions]
    scores = {}
    for name in job.judges:
        judge = build("eval_judge", Spec.model_validate(worlds.judge_spec(name)))
        verdicts = judge(groups, context)
        scores[name] = [[None if s is None else round(s, 5) for s in verdict.scores] for verdict in verdicts]
    return {
        "scores": scores,
        "length": mean(len(c.token_ids or ()) for c in completions),
        "repetition": mean(repetition(c.text) for c in completions),
        "stopped": mean(100.0 * (c.finish_reason == "stop") for c in completions),
    }


def drop_weights(folder: Path) -> None:
    """Remove the weights of a measured run, 4 MB for each round: its numbers and its report stay."""
    for weights in folder.glob("round-*/5-policy/*.safetensors"):
        weights.unlink()


def _write(path: Path, found: dict[str, Any]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(found) + "\n", encoding="utf-8")
    unfinished.replace(path)
