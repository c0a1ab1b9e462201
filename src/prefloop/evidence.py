"""The stages of 6-report: what the held-out completions say of a policy, and the gate's decision on it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefloop.artifact import Artifact, Building, Key
from prefloop.components import Parts, build, key_of
from prefloop.errors import ConfigError
from prefloop.evaluate import deciding, displacement, heldout, remedies
from prefloop.evaluate.bootstrap import LEVEL
from prefloop.evaluate.summary import metric_json, metrics_from_json
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup
from prefloop.protocols import SharesAlpha
from prefloop.recipe import Recipe, Spec
from prefloop.rows import (
    CompletionScore,
    Decision,
    JudgedGroup,
    Metric,
    PolicyRef,
    SampleGroup,
    StepLog,
    TokenizedPair,
    gold_completion,
)
from prefloop.stages import Run, completion_ids, write_parts
from prefloop.team import ALONE
from prefloop.train.reference import rows_of, score_groups, score_reference
from prefloop.train.store import PairStore
from prefloop.waves import Reader, shares_weights, write_waves


def start_logps(run: Run, path: Path, judged: Artifact[JudgedGroup], start: PolicyRef) -> Artifact[CompletionScore]:
    """Log-probs of completions under the run's first policy: 6-report/3-start-logps for the KL, 2c-logps for pairs."""
    key = Key("start-logps", {}, {"judged": judged.digest, "start": start.digest})
    opened = run.open(path, key, CompletionScore, together=True)
    if isinstance(opened, Artifact):
        return opened
    reader = Reader(run, start.path)

    def make(groups: Sequence[JudgedGroup]) -> list[CompletionScore]:
        encoded = [[_encoded(reader.lm, group)] for group in groups]
        logps = list(score_groups(reader.lm.model, encoded, reader.layout, reader.team))
        return [
            CompletionScore(completion.completion_id, start.digest, values)
            for group, computed in zip(groups, logps, strict=True)
            for completion, values in zip(group.completions, rows_of(computed), strict=True)
        ]

    parts, label = judged.stored_parts(), "log-probs under start"
    if reader.team is ALONE:
        return write_parts(run, opened, parts, make, label)
    began = time.monotonic()
    run.progress.start(label, judged.rows, "rows")
    write_waves(run, opened, (list(part) for part in parts), make, label)
    run.progress.finish()
    return opened.finish({}, seconds=time.monotonic() - began)


def _encoded(lm: causal_lm.CausalLM, group: JudgedGroup) -> TokenGroup:
    context = tuple(causal_lm.encode_prompt(lm.tokenizer, group.prompt))
    return TokenGroup(context, tuple(tuple(completion_ids(lm, c)) for c in group.completions))


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
    number: int,
) -> Artifact[Any]:
    """6-report/4-decision: metrics against the start and the best so far (`rivals`), and the gate's verdict on them."""
    start, best = rivals
    level = gate_level(run.recipe, run.parts, number)
    gate_key = key_of(run.parts.gate, run.recipe.gate.kind) | {"level, by gate.rounds": level}
    settings = {"gate": gate_key, "seed": run.recipe.seed}
    inputs = {"judged": judged.digest, "logps": logps.digest, "start": start.digest, "best": best.digest}
    opened: Artifact[Any] | Building[Any] = run.open(path, Key("decision", settings, inputs), None)
    if isinstance(opened, Artifact):
        return opened
    groups, start_groups, best_groups = list(judged), list(start), list(best)
    baseline = heldout.baseline_metrics(start_groups, seed=run.recipe.seed)
    found = heldout.candidate_metrics(
        groups,
        start=start_groups,
        best=best_groups,
        start_logps={row.completion_id: row.token_logps for row in logps},
        seed=run.recipe.seed,
    )
    decision = _decision(run, found, baseline, groups, (start_groups, best_groups), level)
    domains = heldout.by_origin(groups, start_groups, seed=run.recipe.seed)
    facts = {
        "accepted": decision.accepted,
        "why": list(decision.why),
        "level": level,
        "metrics": {name: metric_json(metric) for name, metric in found.metrics.items()},
        "warnings": list(found.warnings),
        "by_origin": {name: {k: metric_json(m) for k, m in metrics.items()} for name, metrics in domains.items()},
        **found.facts,
    }
    return opened.finish(facts)


def gate_level(recipe: Recipe, parts: Parts, number: int) -> float:
    """Return the level of the interval by which round `number` is decided.

    Raises:
        ConfigError: the gate has nothing left for that many rounds.

    """
    gate = parts.gate
    return gate.level(number, recipe.rounds) if isinstance(gate, SharesAlpha) else LEVEL


def _decision(
    run: Run,
    found: heldout.Findings,
    baseline: heldout.Findings,
    groups: Sequence[JudgedGroup],
    rivals: tuple[Sequence[JudgedGroup], Sequence[JudgedGroup]],
    level: float,
) -> Decision:
    """Ask the gate, which sees its metric with the interval that decides; advise where that tells nothing."""
    gate = run.parts.gate
    if not isinstance(gate, SharesAlpha):
        return gate(found.metrics, baseline.metrics)
    rival = rivals[gate.metric.endswith("_best")]
    metrics = deciding.at_level(found.metrics, gate.metric, groups, rival, level, run.recipe.seed)
    decision = gate(metrics, baseline.metrics)
    measured = metrics.get(gate.metric)
    hint = None if measured is None or decision.accepted else deciding.advice(measured, gate.metric, groups, rival)
    return decision if hint is None else replace(decision, why=(*decision.why, hint))


def start_facts(run: Run, samples: Artifact[SampleGroup], judged: Artifact[JudgedGroup]) -> dict[str, Any]:
    """Return what the summary says of the starting policy."""
    found = heldout.baseline_metrics(list(judged), seed=run.recipe.seed)
    return {
        "metrics": {name: metric_json(metric) for name, metric in found.metrics.items()},
        "seconds": {"samples": samples.seconds, "judged": judged.seconds},
        "tokens": {"samples": samples.facts["tokens"]},
    }


PAIRS, HELD_OUT = 64, 64
"""Pairs of the round, and held-out prompts, whose log-probs before and after training are compared."""
_IN_NATS = {
    **dict.fromkeys(("dpo", "robust_dpo", "hinge", "exo", "discopop", "r_dpo", "dpo_sft", "rpo", "dpop"), "beta"),
    "flex_dpo": "beta_plus",
}
"""Losses whose reported reward is this setting times the log-ratio, summed over tokens."""


@dataclass(frozen=True)
class Trained:
    """A round's training: the policies before and after it, what it trained on, and its curve."""

    before: PolicyRef
    after: PolicyRef
    batches: Artifact[TokenizedPair]
    curve: Artifact[StepLog]


@dataclass(frozen=True)
class Earlier:
    """What was known before: the first policy's held-out samples and metrics, and the share of unseen samples."""

    judged: Artifact[JudgedGroup]
    metrics: Mapping[str, Metric]
    unseen: float


def earlier(judged: Artifact[JudgedGroup], summary: Mapping[str, Any], policy: PolicyRef) -> Earlier:
    """Return what is known before a round that starts from `policy`; `judged` is of the run's first policy."""
    known = {e["policy"]["digest"]: e["displacement"]["unseen"] for e in summary["rounds"]}
    unseen = known.get(policy.digest)
    share = displacement.TYPICAL if unseen is None else float(unseen["value"])
    return Earlier(judged, metrics_from_json(summary["start"]["metrics"]), share)


def measure_displacement(
    run: Run, path: Path, trained: Trained, found: Evaluation, before: Earlier
) -> Artifact[displacement.Scored]:
    """6-report/5-displacement: log-probs before and after training, and the 3D diagnosis in `facts`.

    Compared are a fixed sample of the round's pairs, evenly spread over 4-batches, and on held-out prompts the
    reference answers, the data's candidates and what the first policy wrote.
    """
    settings = {
        "pairs": PAIRS,
        "held_out": HELD_OUT,
        "loss": key_of(run.parts.loss, run.recipe.loss.kind),
        "trainer": run.recipe.trainer.kind,
        "seed": run.recipe.seed,
        "unseen_before": before.unseen,
    }
    inputs = {"batches": trained.batches.digest, "policy": trained.curve.digest, "before": trained.before.digest}
    inputs |= {"start": before.judged.digest, "decision": found.decision.digest}
    opened = run.open(path, Key("displacement", settings, inputs), displacement.Scored, together=True)
    if isinstance(opened, Artifact):
        return opened
    if not run.team.main and not shares_weights(run):
        return opened.finish()
    began = time.monotonic()
    reader = Reader(run, trained.before.path)
    texts = _texts(run, trained, before.judged, reader.lm)
    pairs = [replace(pair, views=()) for _, pair in texts]
    run.progress.start("displacement", 2 * len(texts), "pairs")
    totals = [_totals(run, reader, pairs), _totals(run, Reader(run, trained.after.path), pairs)]
    run.progress.finish()
    if not run.team.main:
        return opened.finish()
    rows = [
        displacement.Scored(kind, pair.pair_id, len(getattr(pair, side)), once[side], now[side])
        for (kinds, pair), once, now in zip(texts, *totals, strict=True)
        for kind, side in zip(kinds, displacement.SIDES, strict=True)
        if kind and getattr(pair, side)
    ]
    opened.write_part(0, rows)
    facts = _diagnosed(run, rows, list(trained.curve), found, before)
    return opened.finish(facts, seconds=time.monotonic() - began)


def _texts(
    run: Run, trained: Trained, start: Artifact[JudgedGroup], lm: causal_lm.CausalLM
) -> list[tuple[tuple[str | None, str | None], TokenizedPair]]:
    """Return what is compared, as pairs, each with the kind of its chosen and of its rejected side."""
    pairs = PairStore(trained.batches)
    count = min(PAIRS, len(pairs))
    sides = displacement.SIDES if _has_pairs(run) else (displacement.ROLLOUTS, None)
    found: list[tuple[tuple[str | None, str | None], TokenizedPair]] = [
        (sides, pairs[i * len(pairs) // count]) for i in range(count)
    ]
    limit = run.recipe.train.max_tokens
    for group in list(start)[:HELD_OUT]:
        held_out = _held_out_texts(lm, group)
        found += [(k, p) for k, p in held_out if len(p.context) + max(len(p.chosen), len(p.rejected)) <= limit]
    return found


def _has_pairs(run: Run) -> bool:
    """Return whether the round learns from pairs: a policy gradient's rollouts are neither chosen nor rejected."""
    return run.recipe.loss.kind != "rollout_kl"


def _held_out_texts(
    lm: causal_lm.CausalLM, group: JudgedGroup
) -> Iterator[tuple[tuple[str | None, str | None], TokenizedPair]]:
    prompt = group.prompt
    context = tuple(causal_lm.encode_prompt(lm.tokenizer, prompt))

    def pair(chosen: Sequence[int], rejected: Sequence[int] = ()) -> TokenizedPair:
        return TokenizedPair(prompt.prompt_id, context, tuple(chosen), tuple(rejected), None, None, None, 1.0)

    def encoded(text: str) -> list[int]:
        return causal_lm.encode_completion(lm.tokenizer, text, stop=True)

    rated = sorted((c.score, c.text) for c in prompt.candidates if c.score is not None)
    best = rated[-1][1] if rated and rated[0][0] < rated[-1][0] else None
    if best is not None:
        sides = (displacement.HELD_OUT_CHOSEN, displacement.HELD_OUT_REJECTED)
        yield sides, pair(encoded(best), encoded(rated[0][1]))
    if prompt.gold is not None and prompt.gold != best:
        yield (displacement.GOLD, None), pair(completion_ids(lm, gold_completion(prompt)))
    yield (displacement.START_SAMPLES, None), pair(completion_ids(lm, group.completions[0]))


def _totals(run: Run, reader: Reader, pairs: Sequence[TokenizedPair]) -> list[dict[str, float]]:
    """Return log π of both sides of each pair, nats; 0 for a side without tokens."""
    budget = run.recipe.train.tokens_per_microbatch
    scored = score_reference(reader.lm.model, pairs, reader.layout, budget, reader.team)
    run.progress.advance(len(pairs))
    return [{"chosen": sum(p.reference_chosen or ()), "rejected": sum(p.reference_rejected or ())} for p in scored]


def _diagnosed(
    run: Run,
    rows: Sequence[displacement.Scored],
    curve: Sequence[StepLog],
    found: Evaluation,
    before: Earlier,
) -> dict[str, Any]:
    """Return the diagnosis with its numbers, as `summary.json` holds it."""
    seed, kind, loss = run.recipe.seed, run.recipe.loss.kind, asdict(run.parts.loss)  # type: ignore[call-overload]
    groups, start_groups = list(found.judged), list(before.judged)
    levels = displacement.levels(rows, seed)
    unseen = _unseen(groups, start_groups, found.start_logps, seed)
    entropy, entropy_start = (displacement.entropy((g.completions for g in gs), seed) for gs in (groups, start_groups))
    scale = loss.get(_IN_NATS.get(kind, "")) if run.recipe.trainer.kind == "update" else None
    length = levels.get(displacement.CHOSEN, {}).get("length", 1.0)
    pull = [step.chosen_gradient for step in curve if step.chosen_gradient is not None]
    diagnosis = displacement.diagnose(
        displacement.Evidence(
            changes=metrics_from_json({name: level["change"] for name, level in levels.items()}),
            unseen=unseen,
            unseen_before=before.unseen,
            curve=[
                (step.chosen_reward / scale if scale else step.chosen_logp) / length
                for step in (curve if _has_pairs(run) else ())
            ],
            pull=pull,
            metrics=metrics_from_json(found.decision.facts["metrics"]),
            start=before.metrics,
        )
    )
    return {
        **diagnosis.as_json(),
        "try": remedies.advice(diagnosis, kind, loss, curve[-1].rejected_reward if scale else None),
        "logps": levels,
        "unseen": _json(unseen),
        "unseen_before": before.unseen,
        "entropy": _json(entropy),
        "entropy_start": _json(entropy_start),
        "pull_left": displacement.remaining(pull),
    }


def _json(metric: Metric | None) -> dict[str, Any] | None:
    return None if metric is None else metric_json(metric)


def _unseen(
    groups: Sequence[JudgedGroup],
    start_groups: Sequence[JudgedGroup],
    start_logps: Artifact[CompletionScore],
    seed: int,
) -> Metric | None:
    under_start = {row.completion_id: row.token_logps for row in start_logps}
    own = [c.sampler_logps for g in start_groups for c in g.completions if c.sampler_logps]
    ours = [[v for c in g.completions if (v := under_start.get(c.completion_id))] for g in groups]
    means = [[sum(v) / len(v) for v in values] for values in ours]
    return displacement.unseen_share([sum(v) / len(v) for v in own], means, seed)


def add_displacement(entry: dict[str, Any], found: Artifact[displacement.Scored], applied: str) -> None:
    """Put the diagnosis into the summary's entry of a round; `applied` says which remedy was in force, "" for none."""
    entry["displacement"] = {**found.facts, "remedy": applied or None}
    if found.seconds is not None:
        entry["seconds"]["displacement"] = round(found.seconds, 3)


def remedied(recipe: Recipe, rounds: Sequence[Mapping[str, Any]]) -> tuple[Recipe, str]:
    """Return the recipe of a round, with a remedy for its loss where an earlier round asks for one, and why.

    It depends on stored results only, so that a run that goes on decides as it did before.
    """
    named = [e["round"] for e in rounds if e["displacement"]["names_degradation"]]
    better = _remedy(recipe, build("loss", recipe.loss)) if recipe.train.remedy == "auto" and named else None
    if better is None:
        return recipe, ""
    settings = ", ".join(f"{k} {v}" for k, v in better.items() if k != "kind")
    why = f"loss {better['kind']} ({settings}) instead of {recipe.loss.kind}, since degradation in round {named[0]}"
    return recipe.model_copy(update={"loss": Spec.model_validate(better)}), why


def check_remedy(recipe: Recipe, parts: Parts) -> None:
    """Refuse `train.remedy=auto` for a loss that has no remedy.

    Raises:
        ConfigError: names the losses that have one.

    """
    if recipe.train.remedy == "auto" and _remedy(recipe, parts.loss) is None:
        raise ConfigError(
            f"train.remedy: auto, but loss.kind {recipe.loss.kind} has no remedy: it has no reference, or holds the "
            f"chosen completions up already; {', '.join(remedies.FAMILY)} have one. Set train.remedy=none"
        )


def _remedy(recipe: Recipe, loss: Any) -> dict[str, Any] | None:
    return remedies.remedy(recipe.loss.kind, asdict(loss))
