"""The stages of a round. Each reads artifacts, writes one artifact, and does nothing if that is already there."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefloop.artifact import Artifact, Building, Key, load_artifact, open_artifact
from prefloop.components import Parts, key_of
from prefloop.errors import DataError, Interrupted
from prefloop.evaluate import heldout
from prefloop.evaluate.summary import metric_json
from prefloop.models import adapters, causal_lm
from prefloop.models.logps import TokenGroup, choose_layout, completion_logps
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import Allotment, Judge, Progress, RoundContext, Sampler
from prefloop.recipe import Recipe
from prefloop.rows import (
    TRAIN,
    Completion,
    CompletionScore,
    JudgedGroup,
    PolicyRef,
    PreferencePair,
    Prompt,
    PromptMargin,
    SampleGroup,
    StepLog,
    TokenizedPair,
    Verdict,
    digest_of,
    gold_completion,
)
from prefloop.train.job import Job
from prefloop.train.reference import Encoding, rows_of, sampler_gap, score_reference, tokenize_pairs

R = TypeVar("R")
T = TypeVar("T")

PAIRS_PER_PART = 512
SPOT_CHECKS = 16
"""Pairs on which the sampler's log-probs are compared with live ones of the same policy."""
SAMPLER_GAP = 1e-3
"""Largest difference of one token's log-prob, nats, up to which the sampler's are used as the reference's."""
_WITHOUT_EFFECT = ("checkpoint_every", "log_every")
"""Training settings that do not change the policy."""


@dataclass(frozen=True)
class Run:
    """What every stage needs to know: where, by which recipe, with which parts, and whom to tell."""

    root: Path
    recipe: Recipe
    parts: Parts
    progress: Progress
    stop: Callable[[], bool]
    redo: bool = False

    def open(self, path: Path, key: Key, record: type[R] | None) -> Artifact[R] | Building[R]:
        """Open an artifact of this run."""
        return open_artifact(path, key, record, replace=self.redo)

    def check_stop(self, where: str) -> None:
        """Raise `Interrupted` if the run was asked to stop; `where` names what is finished."""
        if self.stop():
            raise Interrupted(f"{where}: stopped; what is finished is on disk")


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut `items` into lists of `size`; the last may be shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def write_parts(
    run: Run,
    building: Building[R],
    inputs: Sequence[Sequence[T]],
    make: Callable[[Sequence[T]], Iterable[R]],
    label: str,
    count: Callable[[Iterable[R]], Mapping[str, Any]] | None = None,
) -> Artifact[R]:
    """Make one part from each of `inputs`, those that are missing, and finish the artifact with what `count` says."""
    began = time.monotonic()
    total = sum(len(part) for part in inputs)
    done = sum(len(part) for index, part in enumerate(inputs) if building.has_part(index))
    run.progress.start(label, total, "rows", done)
    for index, part in enumerate(inputs):
        if building.has_part(index):
            continue
        building.write_part(index, make(part))
        run.progress.advance(len(part))
        run.check_stop(f"{label}, part {index + 1} of {len(inputs)}")
    run.progress.finish()
    facts = count(row for part in building.parts() for row in part) if count else {}
    return building.finish(facts, seconds=time.monotonic() - began)


def store_prompts(run: Run, path: Path, prompts: Sequence[Prompt]) -> Artifact[Prompt]:
    """prompts: every prompt of the run with its split, so that a later change of the file is noticed."""
    opened = run.open(
        path, Key("all-prompts", {}, {"prompts": digest_of([(p.prompt_id, p.split) for p in prompts])}), Prompt
    )
    if isinstance(opened, Artifact):
        return opened
    opened.write_part(0, prompts)
    return opened.finish({"train": sum(p.split == TRAIN for p in prompts), "prompts": len(prompts)})


def measure_margins(run: Run, path: Path, prompts: Sequence[Prompt], start: PolicyRef) -> Artifact[PromptMargin]:
    """margins: how much likelier the first policy finds each prompt's best candidate than its worst.

    Raises:
        DataError: a prompt has no two candidates with different scores.

    """
    inputs = {"prompts": digest_of([(p.prompt_id, [c.text for c in p.candidates]) for p in prompts])}
    key = Key("margins", {"layout": run.recipe.train.layout}, {**inputs, "start": start.digest})
    opened = run.open(path, key, PromptMargin)
    if isinstance(opened, Artifact):
        return opened
    lm = causal_lm.load(start.path, precision="auto", device=run.recipe.train.device)
    layout, _ = layout_of(run, lm.model)

    def make(part: Sequence[Prompt]) -> list[PromptMargin]:
        groups = [_best_and_worst(lm, prompt) for prompt in part]
        with torch.inference_mode():
            totals = completion_logps(lm.model, groups, layout=layout).total.tolist()
        return [
            PromptMargin(prompt.prompt_id, start.digest, totals[2 * i] - totals[2 * i + 1])
            for i, prompt in enumerate(part)
        ]

    return write_parts(run, opened, chunks(prompts, run.recipe.prompts_per_part), make, "margins under start")


def _best_and_worst(lm: causal_lm.CausalLM, prompt: Prompt) -> TokenGroup:
    rated = sorted((c.score, c.text) for c in prompt.candidates if c.score is not None)
    if len(rated) < 2 or rated[0][0] == rated[-1][0]:
        raise DataError(
            f"{prompt.source}: needs two completions with different scores to measure its difficulty; give chosen and "
            "rejected, or set order.kind=shuffled"
        )
    sides = (rated[-1][1], rated[0][1])
    encoded = tuple(tuple(causal_lm.encode_completion(lm.tokenizer, text, stop=True)) for text in sides)
    return TokenGroup(tuple(causal_lm.encode_prompt(lm.tokenizer, prompt)), encoded)


def take_prompts(run: Run, path: Path, prompts: Sequence[Prompt], ask: Allotment) -> Artifact[Prompt]:
    """0-prompts: the prompts that the recipe's order gives to round `ask.round`."""
    order = run.parts.order
    settings = {
        "order": key_of(order, run.recipe.order.kind),
        "prompts_per_round": ask.per_round,
        "seed": ask.seed,
        "round": ask.round,
        "rounds": ask.rounds if order.needs_margins else None,
    }
    inputs = {"prompts": digest_of([p.prompt_id for p in prompts])}
    if order.needs_margins:
        inputs["margins"] = digest_of(sorted(ask.margins.items()))
    opened = run.open(path, Key("prompts", settings, inputs), Prompt)
    if isinstance(opened, Artifact):
        return opened
    opened.write_part(0, order(prompts, ask))
    return opened.finish()


@dataclass(frozen=True)
class Draw:
    """Who samples, and what its settings are called in a key."""

    sampler: Sampler
    settings: dict[str, Any]


def sample(run: Run, path: Path, prompts: Sequence[Prompt], draw: Draw, context: RoundContext) -> Artifact[SampleGroup]:
    """1-samples: completions of each prompt by `context.policy`."""
    settings = {
        "sampler": draw.settings,
        "seed": context.seed,
        "round": context.round,
        "prompts_per_part": run.recipe.prompts_per_part,
    }
    inputs = {"prompts": digest_of([p.prompt_id for p in prompts]), "policy": context.policy.digest}
    opened = run.open(path, Key("samples", settings, inputs), SampleGroup)
    if isinstance(opened, Artifact):
        return opened
    parts = chunks(prompts, run.recipe.prompts_per_part)
    return write_parts(run, opened, parts, lambda part: draw.sampler(part, context), "sample", _sample_facts)


def _sample_facts(groups: Iterable[SampleGroup]) -> dict[str, int]:
    facts = Counter(prompts=0, completions=0, tokens=0)
    for group in groups:
        facts["prompts"] += 1
        facts["completions"] += len(group.completions)
        facts["tokens"] += sum(len(c.token_ids or ()) for c in group.completions)
    return dict(facts)


@dataclass(frozen=True)
class NamedJudge:
    """A judge and its kind. `with_gold`: it judges the prompts' reference answers beside the completions."""

    judge: Judge
    kind: str
    with_gold: bool = False


def judge(
    run: Run, path: Path, samples: Artifact[SampleGroup], named: NamedJudge, context: RoundContext
) -> Artifact[JudgedGroup]:
    """2-judged: every completion with its score; the prompts' gold answers too, where `named` says so."""
    settings = {"judge": key_of(named.judge, named.kind), "with_gold": named.with_gold}
    opened = run.open(path, Key("judged", settings, {"samples": samples.digest}), JudgedGroup)
    if isinstance(opened, Artifact):
        return opened
    parts = list(samples.parts())

    def make(found: Sequence[SampleGroup]) -> Iterator[JudgedGroup]:
        groups = [_with_gold(g) for g in found] if named.with_gold else found
        verdicts = named.judge(groups, context)
        return (_judged(g, v, named.kind) for g, v in zip(groups, verdicts, strict=True))

    return write_parts(run, opened, parts, make, "judge")


def _with_gold(group: SampleGroup) -> SampleGroup:
    if group.prompt.gold is None:
        return group
    return replace(group, completions=(*group.completions, gold_completion(group.prompt)))


def _judged(group: SampleGroup, verdict: Verdict, judge_name: str) -> JudgedGroup:
    return JudgedGroup(
        prompt=group.prompt,
        completions=group.completions,
        policy=group.policy,
        round=group.round,
        temperature=group.temperature,
        top_p=group.top_p,
        scores=verdict.scores,
        win_prob=verdict.win_prob,
        judge=judge_name,
        notes=verdict.notes,
    )


def pair(run: Run, path: Path, judged: Artifact[JudgedGroup], context: RoundContext) -> Artifact[PreferencePair]:
    """3-pairs: chosen against rejected.

    Raises:
        DataError: no group has a usable difference.

    """
    settings = {
        "pair_builder": key_of(run.parts.pair_builder, run.recipe.pair_builder.kind),
        "seed": context.seed,
        "round": context.round,
    }
    opened = run.open(path, Key("pairs", settings, {"judged": judged.digest}), PreferencePair)
    if isinstance(opened, Artifact):
        return opened
    pairs = list(run.parts.pair_builder(judged, context))
    facts = _judging_facts(judged)
    if not pairs:
        raise DataError(
            f"{path}: no pairs: {facts['groups_with_equal_scores']} of {facts['groups']} groups have equal scores, "
            f"{facts['completions_without_score']} completions have no score. Raise sampler.completions or "
            "sampler.temperature, or choose a judge that tells completions apart; `prefloop show` gives examples"
        )
    for index, part in enumerate(chunks(pairs, PAIRS_PER_PART)):
        opened.write_part(index, part)
    return opened.finish({**facts, "pairs": len(pairs)})


def _judging_facts(judged: Iterable[JudgedGroup]) -> dict[str, int]:
    facts = Counter(groups=0, groups_with_equal_scores=0, completions=0, completions_without_score=0)
    for group in judged:
        known = {score for score in group.scores if score is not None}
        facts["groups"] += 1
        facts["completions"] += len(group.scores)
        facts["groups_with_equal_scores"] += len(known) == 1
        facts["completions_without_score"] += sum(score is None for score in group.scores)
    return dict(facts)


def batch(
    run: Run, path: Path, pairs: Sequence[Artifact[PreferencePair]], reference: PolicyRef | None, policy: PolicyRef
) -> Artifact[TokenizedPair]:
    """4-batches: token ids of the round's pairs and of replayed ones, with the reference's log-probs.

    Raises:
        DataError: every pair was dropped.

    """
    settings = {"max_tokens": run.recipe.train.max_tokens, "layout": run.recipe.train.layout}
    inputs = {f"pairs-{i}": p.digest for i, p in enumerate(pairs)}
    inputs |= {"tokenizer": policy.digest} | ({"reference": reference.digest} if reference else {})
    opened = run.open(path, Key("batches", settings, inputs), TokenizedPair)
    if isinstance(opened, Artifact):
        return opened
    began = time.monotonic()
    train_settings = run.recipe.train
    lm = causal_lm.load((reference or policy).path, precision="auto", device=train_settings.device)
    encoding = Encoding(
        partial(causal_lm.encode_prompt, lm.tokenizer), partial(completion_ids, lm), train_settings.max_tokens
    )
    sampled_by = reference.digest if reference else None
    tokenized = tokenize_pairs((p for artifact in pairs for p in artifact), encoding, sampled_by)
    if not tokenized.pairs:
        raise DataError(f"{path}: no pair is left to train on; dropped: {dict(tokenized.dropped)}")
    layout, why = layout_of(run, lm.model)
    score = partial(score_reference, lm.model, layout=layout, tokens_per_batch=train_settings.tokens_per_microbatch)
    source: dict[str, Any] = {"reference_logps": "none"}
    if reference is not None:
        source = _reference_source(tokenized.pairs, score)
    run.progress.start("reference", len(tokenized.pairs), "pairs")
    for index, part in enumerate(chunks(tokenized.pairs, PAIRS_PER_PART)):
        if not opened.has_part(index):
            opened.write_part(index, score(part) if source["reference_logps"] == "computed" else part)
            run.check_stop("reference log-probs")
        run.progress.advance(len(part))
    run.progress.finish()
    facts = {
        "pairs": len(tokenized.pairs),
        "dropped": dict(tokenized.dropped),
        "tokens": sum(len(p.context) + len(p.chosen) + len(p.rejected) for p in tokenized.pairs),
        "layout": layout,
        "layout_why": why,
        **source,
    }
    return opened.finish(facts, seconds=time.monotonic() - began)


def _reference_source(
    pairs: Sequence[TokenizedPair], score: Callable[[Sequence[TokenizedPair]], list[TokenizedPair]]
) -> dict[str, Any]:
    """Decide whether the sampler's log-probs can stand for the reference's: measured on pairs all over the round."""
    if any(p.reference_chosen is None or p.reference_rejected is None for p in pairs):
        return {"reference_logps": "computed"}
    probe = pairs[:: max(1, len(pairs) // SPOT_CHECKS)][:SPOT_CHECKS]
    gap = sampler_gap(probe, score(probe))
    return {"reference_logps": "sampler" if gap <= SAMPLER_GAP else "computed", "sampler_gap": gap}


def layout_of(run: Run, model: Any) -> tuple[str, str]:
    """Return the layout that the recipe asks for or that fits the model, and why."""
    if run.recipe.train.layout != "auto":
        return run.recipe.train.layout, "train.layout"
    return choose_layout(model)


def completion_ids(lm: causal_lm.CausalLM, completion: Completion) -> list[int]:
    """Return a completion's token ids: as sampled, never re-tokenized; encoded only where there are none."""
    if completion.token_ids is not None:
        return list(completion.token_ids)
    return causal_lm.encode_completion(lm.tokenizer, completion.text, stop=completion.finish_reason == "stop")


@dataclass(frozen=True)
class Lineage:
    """What a round's training starts from and refers to."""

    round: int
    policy: PolicyRef
    reference: PolicyRef | None
    card: str


def update(run: Run, path: Path, batches: Artifact[TokenizedPair], lineage: Lineage, seed: int) -> PolicyRef:
    """5-policy: the policy after training, as a `save_pretrained` folder with the training curve beside it."""
    settings = run.recipe.train.model_dump(mode="json")
    for name in _WITHOUT_EFFECT:
        del settings[name]
    settings |= {
        "loss": key_of(run.parts.loss, run.recipe.loss.kind),
        "trainer": key_of(run.parts.trainer, run.recipe.trainer.kind),
        "round_exit": run.recipe.round_exit if run.recipe.train.lora else None,
        "seed": seed,
    }
    inputs = {"batches": batches.digest, "policy": lineage.policy.digest}
    opened = run.open(path, Key("policy", settings, inputs), StepLog)
    if isinstance(opened, Building):
        opened = _train_and_export(run, opened, batches, lineage, seed)
    base = opened.facts.get("base")
    return PolicyRef(str(path), opened.facts["policy_digest"], opened.facts["round"], base=base)


def _train_and_export(
    run: Run, building: Building[StepLog], batches: Artifact[TokenizedPair], lineage: Lineage, seed: int
) -> Artifact[StepLog]:
    began = time.monotonic()
    recipe, path = run.recipe, building.path
    base = lineage.policy.base or lineage.policy.path
    lm = causal_lm.load(base, precision="fp32", device=recipe.train.device, cache=False)
    model = _trainable(run, lm.model, lineage.policy, seed)
    job = Job(
        model=model,
        pairs=list(batches),
        loss=run.parts.loss,
        settings=recipe.train,
        layout=layout_of(run, lm.model)[0],
        seed=seed,
        state_folder=path / ".state",
        reference=lineage.reference,
        starts_at_reference=lineage.reference is not None and lineage.reference.digest == lineage.policy.digest,
    )
    curve = run.parts.trainer(job, run.progress, run.stop)
    building.write_part(0, curve)
    keeps_adapter = recipe.train.lora is not None and recipe.round_exit == "keep"
    if keeps_adapter:
        adapters.save_adapter(model, path / "adapter")
    plain = adapters.merge_lora(model) if recipe.train.lora else model
    causal_lm.export(plain, lm.tokenizer, path, lineage.card)
    facts = {
        "policy_digest": causal_lm.folder_digest(path),
        "round": lineage.round,
        "base": base if keeps_adapter else None,
        "steps": curve[-1].step,
        "tokens": batches.facts["tokens"] * recipe.train.epochs,
    }
    finished = building.finish(facts, seconds=time.monotonic() - began)
    shutil.rmtree(path / ".state", ignore_errors=True)
    return finished


def _trainable(run: Run, model: Any, policy: PolicyRef, seed: int) -> Any:
    """Return the model with what is to be trained switched on: all weights, a fresh adapter, or the last one."""
    lora = run.recipe.train.lora
    if run.recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if lora is None:
        return model.requires_grad_(True)
    if policy.base is not None:
        return adapters.load_adapter(model, Path(policy.path) / "adapter", trainable=True)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return adapters.add_lora(model, lora.rank, lora.alpha, targets=targets, seed=seed)


def start_logps(run: Run, path: Path, judged: Artifact[JudgedGroup], start: PolicyRef) -> Artifact[CompletionScore]:
    """6-report/3-start-logps: log-probs of the held-out completions under the run's first policy, for the KL."""
    opened = run.open(path, Key("start-logps", {}, {"judged": judged.digest, "start": start.digest}), CompletionScore)
    if isinstance(opened, Artifact):
        return opened
    lm = causal_lm.load(start.path, precision="auto", device=run.recipe.train.device)
    layout, _ = layout_of(run, lm.model)

    def make(groups: Sequence[JudgedGroup]) -> list[CompletionScore]:
        return [score for group in groups for score in _score_group(lm, group, start.digest, layout)]

    return write_parts(run, opened, list(judged.parts()), make, "log-probs under start")


def _score_group(lm: causal_lm.CausalLM, group: JudgedGroup, policy: str, layout: str) -> Iterator[CompletionScore]:
    context = tuple(causal_lm.encode_prompt(lm.tokenizer, group.prompt))
    completions = tuple(tuple(completion_ids(lm, c)) for c in group.completions)
    with torch.inference_mode():
        logps = completion_logps(lm.model, [TokenGroup(context, completions)], layout=layout)
    for completion, values in zip(group.completions, rows_of(logps), strict=True):
        yield CompletionScore(completion.completion_id, policy, values)


@dataclass(frozen=True)
class Evaluation:
    """6-report: the held-out evidence on one policy, and the gate's decision."""

    samples: Artifact[SampleGroup]
    judged: Artifact[JudgedGroup]
    start_logps: Artifact[CompletionScore]
    decision: Artifact[Any]

    def stages(self) -> dict[str, Artifact[Any]]:
        """Return the artifacts by the name under which the summary counts them."""
        return {
            "evaluation_samples": self.samples,
            "evaluation_judged": self.judged,
            "evaluation_start_logps": self.start_logps,
        }


def decide(
    run: Run,
    path: Path,
    judged: Artifact[JudgedGroup],
    logps: Artifact[CompletionScore],
    rivals: tuple[Artifact[JudgedGroup], Artifact[JudgedGroup]],
) -> Artifact[Any]:
    """6-report/4-decision: metrics against the start and the best so far (`rivals`), and the gate's verdict on them."""
    start, best = rivals
    settings = {"gate": key_of(run.parts.gate, run.recipe.gate.kind), "seed": run.recipe.seed}
    inputs = {"judged": judged.digest, "logps": logps.digest, "start": start.digest, "best": best.digest}
    opened: Artifact[Any] | Building[Any] = run.open(path, Key("decision", settings, inputs), None)
    if isinstance(opened, Artifact):
        return opened
    start_groups = list(start)
    baseline = heldout.baseline_metrics(start_groups, seed=run.recipe.seed)
    found = heldout.candidate_metrics(
        list(judged),
        start=start_groups,
        best=list(best),
        start_logps={row.completion_id: row.token_logps for row in logps},
        seed=run.recipe.seed,
    )
    decision = run.parts.gate(found.metrics, baseline.metrics)
    facts = {
        "accepted": decision.accepted,
        "why": list(decision.why),
        "metrics": {name: metric_json(metric) for name, metric in found.metrics.items()},
        "warnings": list(found.warnings),
        **found.facts,
    }
    return opened.finish(facts)


def start_facts(run: Run, samples: Artifact[SampleGroup], judged: Artifact[JudgedGroup]) -> dict[str, Any]:
    """Return what the summary says of the starting policy."""
    found = heldout.baseline_metrics(list(judged), seed=run.recipe.seed)
    return {
        "metrics": {name: metric_json(metric) for name, metric in found.metrics.items()},
        "seconds": {"samples": samples.seconds, "judged": judged.seconds},
        "tokens": {"samples": samples.facts["tokens"]},
    }


def policy_artifact(policy: PolicyRef) -> Artifact[StepLog]:
    """Return the finished 5-policy artifact of a policy that this run trained."""
    artifact = load_artifact(Path(policy.path), StepLog)
    assert artifact is not None  # update() has just returned it
    return artifact
