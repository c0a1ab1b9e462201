"""The stages of 6-report: what the held-out completions say of a policy, and the gate's decision on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefloop.artifact import Artifact, Building, Key
from prefloop.components import key_of
from prefloop.evaluate import heldout
from prefloop.evaluate.summary import metric_json
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import CompletionScore, JudgedGroup, PolicyRef, SampleGroup
from prefloop.stages import Run, completion_ids, layout_of, write_parts
from prefloop.train.reference import rows_of


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
