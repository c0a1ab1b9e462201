"""The loop, round by round: sample, judge, pair, batch, train, evaluate, gate.

Read `run` from top to bottom. Every stage is a call that returns a finished artifact; where that artifact is on disk
already the call returns at once, so that running is also resuming.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prefloop import ahead, batching, evidence, ledger, reward_run, stages, training, trust
from prefloop.artifact import Artifact, load_artifact, locked, read_json
from prefloop.check.data import data_warnings
from prefloop.combine import NOTHING_PAST, Past
from prefloop.components import Parts, build_parts, filled, key_of
from prefloop.correction import check_corrector, correct
from prefloop.data_needs import check_data, usable_prompts
from prefloop.disk import machine_errors
from prefloop.errors import ConfigError, CorruptArtifact
from prefloop.evaluate.report import write_report
from prefloop.evidence import Evaluation
from prefloop.inputs import held_out, resolve_policy, resolve_prompts
from prefloop.judge.unscored import Unscored
from prefloop.mirror import mirrored
from prefloop.models import causal_lm
from prefloop.models.threads import cores, fastest_threads
from prefloop.prompts.choice import Margins
from prefloop.prompts.store import MadePrompts
from prefloop.protocols import (
    Allotment,
    ChecksPolicy,
    ChecksSampler,
    Progress,
    Quiet,
    RoundContext,
    needs_logps,
    one_sided,
    views_of,
)
from prefloop.recipe import Recipe, dump_yaml, for_round
from prefloop.repair import move_damaged
from prefloop.rows import JudgedGroup, PolicyRef, PreferencePair, Prompt
from prefloop.stages import Draw, Run
from prefloop.team import ALONE, Team
from prefloop.together import check_team, require_same
from prefloop.training import Lineage
from prefloop.watch import Watch, named

PROMPTS = "prompts"
"""Folder of all prompts of a run."""
EVALUATION_ROUND = -1
"""Held-out completions use the random streams of this round for every policy: differences are the policies'."""
EVEN = 50.0
"""Win rate of a policy against itself, in percent."""


@dataclass
class Standing:
    """Who leads. `current` is the last promoted policy; `best` the one with the best held-out win rate.

    `versions` are all that were promoted, the first policy included, oldest first.
    """

    start: PolicyRef
    start_judged: Artifact[JudgedGroup]
    current: PolicyRef
    best: PolicyRef
    best_judged: Artifact[JudgedGroup]
    versions: list[PolicyRef] = field(default_factory=list)
    past: Past = NOTHING_PAST
    pairs: list[Artifact[PreferencePair]] = field(default_factory=list)
    margins: Mapping[str, float] = field(default_factory=dict)


@machine_errors()
def run(  # noqa: PLR0913  all but two are by name
    recipe: Recipe,
    root: Path,
    *,
    origins: Mapping[str, str] | None = None,
    redo: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
    mirror: str | None = None,
) -> dict[str, Any]:
    """Run `recipe` in folder `root`, or go on with what is there, and return the summary (see docs/artifacts.md).

    What of it is damaged is moved to `root`/damaged first, and made again.
    The processes of a `team` call this together, with the same arguments; the main one writes (see docs/scale.md).
    `mirror` is an address that gets a copy of what is finished, and from which a lost folder comes back (see `mirror`).

    Raises:
        ConfigError: a choice cannot be carried out; nothing was done.
        StaleArtifact: the folder holds a stage that was made with other settings, and `redo` is false.
        DataError: prompts, pairs or a model folder cannot be used.
        JudgeError, SamplerError, TrainingDiverged: a stage failed for good; what was finished before is kept.
        MachineFailed: the disk is full, read-only or broken, or memory ran out; the same call goes on.
        Interrupted: `stop()` became true; the same call goes on.
        RankLost: another process of the team failed.

    """
    parts = build_parts(recipe)
    require_same(team, recipe, root)
    for number in range(recipe.rounds):
        its_recipe = for_round(recipe, number)
        check_combination(its_recipe, build_parts(its_recipe))
        check_team(its_recipe, build_parts(its_recipe), team)
    policy = resolve_policy(recipe)
    prompts = resolve_prompts(recipe)
    train = prompts.train
    holdout = held_out(recipe, prompts)
    if isinstance(parts.sampler, ChecksPolicy):
        parts.sampler.check_policy(policy)
    check_data(recipe, policy, train, holdout)
    progress = progress or Quiet()
    own = mirror if team.main else None
    with locked(root) if team.main else nullcontext(), mirrored(own, root, recipe, redo, progress.say) as copies:
        for line in move_damaged(root) if team.main else []:
            progress.say(line)
        copies.begin()
        team.gathered()
        settings = filled(recipe, parts)
        notes = [*prompts.dropped, *data_warnings(recipe, prompts), *judge_warnings(recipe, parts)]
        summary = ledger.new_summary(recipe, policy, settings, notes)
        summary["top_scores"] = trust.top_scores(parts)
        recorder = recorder_for(recipe, root, summary, settings, origins or {})
        recorder.silent = not team.main
        here = Run(root, recipe, parts, progress, stop, recorder.begin, redo, team)
        if team.main:
            here = replace(here, watch=watch_of(here, summary, settings))
        with recorder.marking_failure(), closing(here.watch):
            summary["threads"] = set_threads(recipe, policy, root, team)
            stages.store_prompts(here, root / PROMPTS, prompts.prompts, summary["threads"])
            turns = reward_run.rounds if recipe.trains == reward_run.TRAINS else rounds
            turns(here, policy, train, holdout, summary, recorder.save)
        summary["judging"] = trust.measured(root, summary)
        recorder.finish()
        if team.main:
            write_report(root)
    return summary


def watch_of(here: Run, summary: dict[str, Any], settings: Mapping[str, Any]) -> Watch:
    """Return who tells the recipe's loggers of the run; one that fails is a warning in the summary."""

    def warn(text: str) -> None:
        here.progress.say(text)
        summary["warnings"].append(text)

    kinds = [spec.kind for spec in here.recipe.loggers]
    loggers = named(list(zip(kinds, here.parts.loggers, strict=True)))
    return Watch(here.root, summary["name"], settings, loggers, warn, again=here.redo)


def rounds(
    here: Run,
    policy: PolicyRef,
    prompts: Sequence[Prompt],
    holdout: list[Prompt],
    summary: dict[str, Any],
    save: Callable[[str], None],
) -> None:
    """Measure the policy as it comes, then make every round and tell `summary`; `save` is called after each."""
    standing = _measure_start(here, policy, holdout, summary)
    here.watch.start(summary["start"])
    if here.parts.order.needs_margins:
        measured = stages.measure_margins(here, here.root / "start" / "3-margins", prompts, policy)
        standing.margins = Margins((row.prompt_id, row.margin) for row in measured)
    for number in range(here.recipe.rounds):
        _round(here, number, prompts, holdout, standing, summary)
        here.watch.round(summary["rounds"][-1])
        save("running")


def recorder_for(
    recipe: Recipe, root: Path, summary: dict[str, Any], settings: Mapping[str, Any], origins: Mapping[str, str]
) -> ledger.Recorder:
    """Return who writes `summary.json` and `recipe.yaml` of a run."""
    if recipe.trains == reward_run.TRAINS:
        return reward_run.Recorder(root, summary, dump_yaml(reward_run.kept(settings), origins))
    return ledger.Recorder(root, summary, dump_yaml(settings, origins))


def _measure_start(here: Run, policy: PolicyRef, holdout: list[Prompt], summary: dict[str, Any]) -> Standing:
    """Sample and judge the held-out prompts with the policy as it comes: what every round is compared with."""
    context = RoundContext(here.recipe.seed, EVALUATION_ROUND, policy, policy, scratch=scratch_of(here.root))
    folder = here.root / "start"
    draw = _draw(here, held_out=True)
    samples, judged = ahead.sampled_and_judged(here, folder, holdout, draw, _eval_judge(here), context)
    summary["start"] = evidence.start_facts(here, samples, judged)
    return Standing(policy, judged, policy, policy, judged, versions=[policy])


def _round(
    here: Run,
    number: int,
    prompts: Sequence[Prompt],
    holdout: list[Prompt],
    standing: Standing,
    summary: dict[str, Any],
) -> None:
    """One turn of the loop."""
    recipe, remedy = evidence.remedied(for_round(here.recipe, number), summary["rounds"])
    folder = here.root / f"round-{number:03d}"
    here = replace(here, recipe=recipe, parts=build_parts(recipe))
    by_name = {"initial": standing.start, "previous": standing.current, "best": standing.best}
    start = by_name[recipe.start_from]
    drawn_from = by_name.get(recipe.samples_from, start)
    context = RoundContext(
        recipe.seed, number, drawn_from, standing.start, tuple(standing.versions), scratch_of(here.root)
    )
    here.progress.say(f"round {number}: starts from {_name(start)}{f'; remedy: {remedy}' if remedy else ''}")

    ask = Allotment(number, recipe.rounds, recipe.prompts_per_round, recipe.seed, standing.margins)
    asked = stages.take_prompts(here, folder / "0-prompts", usable_prompts(prompts, here.parts), ask)
    replayed = standing.pairs[max(0, number - recipe.replay) :]
    reference = reference_of(here, start, standing.start)
    scored = ahead.Scored(replayed, reference, start)
    with ahead.scoring(here, folder, scored, _judge(here), context):
        prompts = MadePrompts(asked)
        samples, judged = ahead.sampled_and_judged(here, folder, prompts, _draw(here), _judge(here), context)
    corrected = correct(here, folder / "2b-corrected", judged, _draw(here), _judge(here), context)
    logps = None
    if needs_logps(here.parts.pair_builder):
        logps = evidence.start_logps(here, folder / "2c-logps", corrected, standing.start)
    pairs = stages.pair(here, folder / "3-pairs", corrected, context, logps)
    batches = batching.batch(here, folder / "4-batches", [*replayed, pairs], reference, start)
    lineage = Lineage(number, start, reference, _card(here, number, start, reference), standing.past)
    policy = training.update(here, folder / "5-policy", batches, lineage, recipe.seed + number)
    evaluation = _evaluate(here, folder / "6-report", policy, holdout, standing)
    moved = evidence.measure_displacement(
        here,
        folder / "6-report" / "5-displacement",
        evidence.Trained(start, policy, batches, training.policy_artifact(policy)),
        evaluation,
        evidence.earlier(standing.start_judged, summary, start),
    )
    held_out_round = replace(context, round=EVALUATION_ROUND)
    trust.second_opinion(here, folder / "6-report" / trust.OPINIONS, corrected, pairs, held_out_round)

    standing.pairs.append(pairs)
    facts = evaluation.decision.facts
    if facts["accepted"]:
        standing.current = policy
        standing.versions.append(policy)
        standing.past = Past((*standing.past.modules, policy), (*standing.past.pairs, batches))
        against_best = facts["metrics"].get("win_rate_vs_best")  # absent where the judge scored nothing
        if against_best is not None and against_best["value"] > EVEN:
            standing.best, standing.best_judged = policy, evaluation.judged
            ledger.set_best(summary, policy, here.root)
    done: dict[str, Artifact[Any]] = {
        "samples": samples,
        "judged": judged,
        **({"corrected": corrected} if corrected is not judged else {}),
        "pairs": pairs,
        "batches": batches,
        **evaluation.stages(),
    }
    ledger.add_round(summary, number, done | {"policy": training.policy_artifact(policy)}, evaluation.decision, policy)
    evidence.add_displacement(summary["rounds"][-1], moved, remedy)
    here.progress.say(f"round {number}: {'accepted' if facts['accepted'] else 'refused'}: {facts['why'][0]}")


def _evaluate(here: Run, folder: Path, policy: PolicyRef, holdout: list[Prompt], standing: Standing) -> Evaluation:
    """6-report: the new policy on the held-out prompts, against the start and the best so far, and the decision."""
    context = RoundContext(here.recipe.seed, EVALUATION_ROUND, policy, standing.start, scratch=scratch_of(here.root))
    draw = _draw(here, held_out=True)
    samples, judged = ahead.sampled_and_judged(here, folder, holdout, draw, _eval_judge(here), context)
    logps = evidence.start_logps(here, folder / "3-start-logps", judged, standing.start)
    decision = evidence.decide(
        here, folder / "4-decision", judged, logps, (standing.start_judged, standing.best_judged), policy.round
    )
    return Evaluation(samples, judged, logps, decision)


def scratch_of(root: Path) -> str:
    """Return the folder of a run in which judges keep what they paid for."""
    return str(root / "judge-store")


def reference_of(here: Run, start: PolicyRef, initial: PolicyRef) -> PolicyRef | None:
    """Return the loss's reference in a round that starts from `start`; `None` if the loss needs none."""
    if not here.parts.loss.needs_reference:
        return None
    if here.recipe.reference == "initial":
        return initial
    if here.recipe.reference == "adapter_off" and start.base is not None:
        return PolicyRef(start.base, initial.digest, initial.round)
    return start


def check_combination(recipe: Recipe, parts: Parts) -> None:
    """Refuse choices that contradict each other.

    Raises:
        ConfigError: names the fields and what to change.

    """
    _check_trainer(recipe, parts)
    if recipe.reference == "none" and parts.loss.needs_reference:
        raise ConfigError(
            f"reference: none, but loss.kind {recipe.loss.kind} needs one; set reference to initial or previous"
        )
    if recipe.reference == "adapter_off" and recipe.train.lora is None:
        raise ConfigError(
            "reference: adapter_off needs an adapter to switch off; set train.lora.rank, or another reference"
        )
    if recipe.round_exit == "keep" and recipe.train.lora is None:
        raise ConfigError("round_exit: keep means the LoRA adapter goes on; set train.lora.rank, or leave it out")
    if recipe.round_exit == "combine":
        _check_combine(recipe)
    evidence.check_remedy(recipe, parts)
    evidence.gate_level(recipe, parts, recipe.rounds - 1)
    if getattr(parts.trainer, "needs_adapter", False) and recipe.train.lora is None:
        raise ConfigError(
            f"train.lora: not set, but trainer.kind {recipe.trainer.kind} trains LoRA modules; set train.lora.rank"
        )
    if parts.trainer.needs_reference and not parts.loss.needs_reference:
        raise ConfigError(
            f"trainer.kind: {recipe.trainer.kind} works on the reference, but loss.kind {recipe.loss.kind} has none; "
            "choose a loss with one, such as dpo, or trainer.kind=update"
        )
    check_corrector(recipe, parts)
    check_pairs_fit(recipe, parts)


def _check_trainer(recipe: Recipe, parts: Parts) -> None:
    if recipe.trains == reward_run.TRAINS:
        reward_run.check(recipe)
    elif getattr(parts.trainer, "trains", recipe.trains) != recipe.trains:
        raise ConfigError(
            f"trainer.kind: {recipe.trainer.kind} trains no policy; choose another, or use `prefloop run reward_model`"
        )
    needed = getattr(parts.trainer, "loss_kind", None)
    if needed is not None and recipe.loss.kind != needed:
        raise ConfigError(
            f"loss.kind: {recipe.loss.kind}, but trainer.kind {recipe.trainer.kind} brings its own objective and takes "
            f"loss.kind={needed}, its KL term; set that, or trainer.kind=update"
        )
    if needed is None and getattr(parts.loss, "needs_trainer", False):
        raise ConfigError(
            f"loss.kind: {recipe.loss.kind} is a part of policy-gradient trainers; set trainer.kind=ppo or "
            "group_advantage"
        )


def _check_combine(recipe: Recipe) -> None:
    if recipe.train.lora is None:
        raise ConfigError("round_exit: combine adds up LoRA modules; set train.lora.rank, or another round_exit")
    if recipe.start_from != "initial" or recipe.reference not in ("initial", "none"):
        raise ConfigError(
            "round_exit: combine adds modules of one base, the first policy; set start_from=initial and "
            f"reference=initial (they are {recipe.start_from} and {recipe.reference})"
        )
    given = recipe.combine.coefficients
    if recipe.combine.rule == "given" and len(given or ()) < recipe.rounds:
        raise ConfigError(f"combine.coefficients: give one for each of {recipe.rounds} rounds, got {given}")
    if recipe.combine.rule != "given" and given is not None:
        raise ConfigError(
            f"combine.coefficients: has no effect with combine.rule={recipe.combine.rule}; set rule=given"
        )
    if recipe.combine.rule == "grid" and recipe.rounds != 2:
        raise ConfigError(f"combine.rule: grid is for two modules, and there are {recipe.rounds} rounds; use simplex")


def check_pairs_fit(recipe: Recipe, parts: Parts) -> None:
    """Refuse a loss that cannot read what the pair builder makes.

    Raises:
        ConfigError: names both and what to change.

    """
    loss, builder = parts.loss, parts.pair_builder
    if isinstance(builder, ChecksSampler):
        builder.check_sampler(parts.sampler)
    if loss.consumes not in ("pair", "unpaired"):
        raise ConfigError(f"loss.kind: {recipe.loss.kind} learns from {loss.consumes} data, which nothing makes yet")
    if loss.consumes == "pair" and one_sided(builder):
        raise ConfigError(
            f"loss.kind: {recipe.loss.kind} compares two sides, and pair_builder.kind {recipe.pair_builder.kind} makes "
            "completions without a rival; choose a loss for unpaired data, such as sft, or another pair builder"
        )
    if needs_logps(builder) and recipe.trains == reward_run.TRAINS:
        raise ConfigError(
            f"pair_builder.kind: {recipe.pair_builder.kind} orders pairs by a policy's log-probs here, and trains: "
            "reward_model has none; set pair_builder.by=rating"
        )
    missing = [name for name in views_of(loss) if name not in views_of(builder)]
    if missing:
        raise ConfigError(
            f"loss.kind: {recipe.loss.kind} reads {', '.join(missing)} beside the two sides of a pair, and "
            f"pair_builder.kind {recipe.pair_builder.kind} does not make that; see docs/methods.md for what does"
        )


def judge_warnings(recipe: Recipe, parts: Parts) -> list[str]:
    """Return what a reader of the result should know about its judges."""
    if not parts.pair_builder.needs_scores:
        return []
    again = trust.same_judge(recipe, parts)
    who = {"judge": "The judge that made the training pairs", "model": "The model that judged the training pairs"}
    if not again:
        return []
    return [
        f"{who[again]} also scored the evaluation: a rise may be the judge's taste only. "
        f"Set eval_judge to {'a second judge' if again == 'judge' else 'a judge of another model'} to know more."
    ]


def set_threads(recipe: Recipe, policy: PolicyRef, root: Path | None = None, team: Team = ALONE) -> int:
    """Set the number of CPU threads and, on a CPU, deterministic kernels; return the number.

    `auto` is measured when a run begins. Sums depend on it, so a run that goes on in `root` takes the number that its
    prompts and its summary.json note. Ranks on one machine share its cores, and have the same number.
    """
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    threads: int | str = recipe.threads
    if threads == "auto" and root is not None and team.main:
        threads = _noted_threads(root) or "auto"
    if threads == "auto" and team.main:
        most = max(1, cores() // team.local_size)
        if causal_lm.choose_device(recipe.train.device).type == "cpu":
            lm = causal_lm.load(policy.path, precision="auto", device=recipe.train.device)
            threads = fastest_threads(lm.model, most)
        else:  # nothing to measure; the policy may be larger than one GPU
            threads = most
    threads = int(team.tell(threads))
    torch.set_num_threads(threads)
    return threads


def _noted_threads(root: Path) -> int | None:
    """Return the number of threads with which the run in `root` began; `None` if there is none, or it says nothing."""
    stored: Artifact[Prompt] | None = load_artifact(root / PROMPTS, Prompt)
    if stored is not None and "threads" in stored.facts:
        return int(stored.facts["threads"])
    try:
        return read_json(root / ledger.SUMMARY).get("threads")  # type: ignore[no-any-return]
    except (CorruptArtifact, FileNotFoundError):
        return None  # the file is about to be written anew


def _draw(here: Run, held_out: bool = False) -> Draw:
    sampler = here.parts.eval_sampler if held_out else here.parts.sampler
    spec = (here.recipe.eval_sampler or here.recipe.sampler) if held_out else here.recipe.sampler
    return Draw(sampler, key_of(sampler, spec.kind))


def _judge(here: Run) -> stages.NamedJudge:
    """Return the judge of the training samples; none is asked where the pair rule does not look at scores."""
    if not here.parts.pair_builder.needs_scores:
        return stages.NamedJudge(Unscored(), "unscored")
    assert here.recipe.judge is not None  # build_parts has refused a recipe without one
    return stages.NamedJudge(here.parts.judge, here.recipe.judge.kind, with_gold=here.parts.pair_builder.needs_gold)


def _eval_judge(here: Run) -> stages.NamedJudge:
    spec = here.recipe.eval_judge or here.recipe.judge
    assert spec is not None  # build_parts has refused a recipe without one
    return stages.NamedJudge(here.parts.eval_judge, spec.kind)


def _name(policy: PolicyRef) -> str:
    return "the initial policy" if policy.round < 0 else f"the policy of round {policy.round}"


def _card(here: Run, number: int, start: PolicyRef, reference: PolicyRef | None) -> str:
    recipe = here.recipe
    named = recipe.policy.path if recipe.policy else start.path
    return CARD.format(
        name=recipe.name or recipe.recipe or "prefloop run",
        method=recipe.recipe or "own recipe",
        number=number,
        initial=named,
        start=f"{_name(start)} ({start.digest})",
        reference=f"{_name(reference)} ({reference.digest})" if reference else "none",
        judge=recipe.judge.kind if recipe.judge else "none",
        prompts=recipe.prompts.path if recipe.prompts else "none",
        loss=recipe.loss.kind,
        seed=recipe.seed,
    )


CARD = """---
library_name: transformers
tags: [prefloop, preference-optimization]
---

# {name}, round {number}

Trained by prefloop with the method `{method}`.

| | |
|---|---|
| initial policy | {initial} |
| this round started from | {start} |
| reference of the loss | {reference} |
| loss | {loss} |
| judge | {judge} |
| prompts | {prompts} |
| seed | {seed} |

Whether this round was promoted, and the evidence for it, is in the run's `summary.json`.
"""
