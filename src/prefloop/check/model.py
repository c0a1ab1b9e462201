"""What takes the model's forward pass: samples, sampler against trainer, the reference, loss and margin at step 0."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from prefloop.check.finding import Finding
from prefloop.check.tokens import Encoded
from prefloop.components import Parts
from prefloop.models import causal_lm
from prefloop.models.logps import choose_layout
from prefloop.protocols import RoundContext, views_of
from prefloop.recipe import Recipe
from prefloop.rows import Prompt, SampleGroup, TokenizedPair
from prefloop.tensors import PairLogps
from prefloop.train.batches import pair_logps
from prefloop.train.reference import sampler_gap, score_reference

GAP = 1e-3
"""Largest difference of one token's log-prob, nats, in float32; the trainer's own limit for sampled references."""
GAP_BF16 = 0.3
"""The same where the sampler runs in bfloat16, our own choice: rounding alone brings a tenth of a nat."""
PAIRS = 8
LN2 = ("dpo", "robust_dpo")
"""Losses that begin at −log σ(0) = ln 2."""


@dataclass(frozen=True)
class Probe:
    """Completions of a few prompts by the policy as it comes, two of each."""

    groups: list[SampleGroup]
    context: RoundContext


def draw(parts: Parts, prompts: Sequence[Prompt], context: RoundContext) -> Probe:
    """Sample two completions of each prompt with the recipe's sampler."""
    sampler = parts.sampler
    if hasattr(sampler, "completions"):
        sampler = replace(sampler, completions=2)  # type: ignore[type-var]
    return Probe(sampler(prompts, context), context)


def pairs_of(probe: Probe | None, encoded: Sequence[Encoded], lm: causal_lm.CausalLM) -> list[TokenizedPair]:
    """Return pairs of the data or of the probe, without an opinion on which side is better."""
    of_data = [
        TokenizedPair(one.prompt.prompt_id, one.ids, one.completions[0], one.completions[1], None, None, None, 1.0)
        for one in encoded
        if len(one.completions) > 1 and one.completions[0] != one.completions[1]
    ]
    if probe is None:
        return of_data[:PAIRS]
    found = []
    for group in probe.groups:
        first, second, *_ = (*group.completions, *group.completions)
        if first.token_ids and second.token_ids and first.token_ids != second.token_ids:
            context = tuple(causal_lm.encode_prompt(lm.tokenizer, group.prompt))
            logps = (first.sampler_logps, second.sampler_logps)
            found.append(
                TokenizedPair(group.prompt.prompt_id, context, first.token_ids, second.token_ids, *logps, None, 1.0)
            )
    return (found or of_data)[:PAIRS]


def model_findings(recipe: Recipe, parts: Parts, folder: str, pairs: Sequence[TokenizedPair]) -> Iterator[Finding]:
    """Yield what log-probs of a few pairs show."""
    if not pairs:
        yield Finding(
            "step_0", "warning", "no pair could be made, so nothing was computed", advice="see the findings above"
        )
        return
    lm = causal_lm.load(folder, precision="auto", device=recipe.train.device)
    layout = recipe.train.layout if recipe.train.layout != "auto" else choose_layout(lm.model)[0]
    live = score_reference(lm.model, pairs, layout, recipe.train.tokens_per_microbatch)
    if all(p.reference_chosen is not None and p.reference_rejected is not None for p in pairs):
        yield _gap(sampler_gap(pairs, live), lm.model.dtype, len(pairs))
    yield _reference(recipe, parts, lm.digest)
    yield from _step_0(recipe, parts, folder, live, layout)


def _gap(gap: float, dtype: torch.dtype, count: int) -> Finding:
    limit = GAP_BF16 if dtype == torch.bfloat16 else GAP
    far = gap > limit
    text = f"sampler and trainer differ by at most {gap:.1e} nats in one token's log-prob, over {count} pairs"
    advice = "sampler and trainer do not run the same model, template or precision; see sampler.precision"
    return Finding("sampler_gap", "warning" if far else "info", text, gap, advice=advice if far else "")


def _reference(recipe: Recipe, parts: Parts, digest: str) -> Finding:
    if not parts.loss.needs_reference:
        return Finding("reference", "info", f"loss.kind {recipe.loss.kind} has none")
    later = {
        "initial": "the run's first policy in every round",
        "previous": "in later rounds the policy that the round starts from",
        "adapter_off": "in later rounds the model under the adapter",
    }.get(recipe.reference, recipe.reference)
    return Finding("reference", "info", f"{recipe.reference}: in round 0 the policy as it comes ({digest}), {later}")


def _step_0(
    recipe: Recipe, parts: Parts, folder: str, pairs: Sequence[TokenizedPair], layout: str
) -> Iterator[Finding]:
    loss, kind = parts.loss, recipe.loss.kind
    if loss.consumes != "pair" or views_of(loss) or getattr(loss, "needs_trainer", False):
        yield Finding("step_0", "info", f"loss.kind {kind} needs more than plain pairs; the run checks it at step 0")
        return
    trained = causal_lm.load(folder, precision="fp32", device=recipe.train.device)
    with torch.inference_mode():
        logps: PairLogps = pair_logps(trained.model, pairs, layout, loss.needs_reference)
        found = loss(logps)
        same = found
        if logps.reference_chosen is not None and logps.reference_rejected is not None:
            same = loss(replace(logps, policy_chosen=logps.reference_chosen, policy_rejected=logps.reference_rejected))
    value, expected = float(found.loss.mean()), float(same.loss.mean())
    margin = float((found.chosen_reward - found.rejected_reward).abs().max())
    if not loss.needs_reference:
        yield Finding("step_0", "info", f"loss {value:.4f}; without a reference its start is not fixed", value)
        return
    named = f", ln 2 = {math.log(2):.4f}" if kind in LN2 else ""
    off = not math.isclose(value, expected, abs_tol=0.02) or (kind in LN2 and abs(value - math.log(2)) > 0.02)
    yield Finding(
        "step_0",
        "warning" if off else "info",
        f"loss {value:.4f}, expected {expected:.4f} where policy and reference agree{named}; largest "
        f"margin {margin:.4f}",
        value,
        advice="policy and reference are not the same model at step 0: see reference and precision" if off else "",
    )
