"""Each method's training on the same pairs: what it costs beside plain DPO."""

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from benchmarks.meter import Meter
from benchmarks.prefloop_side import StepClock
from benchmarks.records import Measurement, Options
from benchmarks.specs import MethodSpec
from prefloop.components import build_parts
from prefloop.inputs import embedded_policy, resolve_prompts
from prefloop.launch import read_recipe
from prefloop.models import causal_lm
from prefloop.models.adapters import add_lora
from prefloop.models.logps import choose_layout
from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext, views_of
from prefloop.recipe import Recipe
from prefloop.rows import JudgedGroup, PolicyRef, TokenizedPair
from prefloop.sample.given import Given
from prefloop.stages import completion_ids
from prefloop.train.job import Job
from prefloop.train.reference import Encoding, score_reference, tokenize_pairs

GIVEN = ("prompts=embedded-preferences", "policy=embedded", "judge.kind=given", "eval_judge=lexicon")

PAIRED = {"sppo": ("loss.form=hard",)}
"""What a method needs so that it trains on the same pairs as the others."""


def train_method(spec: MethodSpec, options: Options, method: str, lora: int = 0) -> Measurement:
    """Time optimizer steps of `method` on the story model and the pairs that prefloop ships; the first one warms up."""
    overrides = [
        *GIVEN,
        "sampler.kind=given",
        "eval_sampler.kind=hf",
        f"train.device={options.device}",
        *PAIRED.get(method, ()),
    ]
    overrides += [f"train.lora.rank={lora}"] if lora else []
    recipe, _ = read_recipe(method, overrides)
    settings = recipe.train.model_copy(
        update={"pairs_per_step": spec.pairs_per_step, "epochs": 1, "learning_rate": 1e-5, "precision": "fp32"}
    )
    parts = build_parts(recipe)
    folder = embedded_policy()
    policy = PolicyRef(str(folder), causal_lm.folder_digest(folder), -1)
    lm = causal_lm.load(str(folder), precision="fp32", device=options.device, cache=False)
    layout = choose_layout(lm.model)[0]
    pairs = _pairs(recipe, lm, policy, spec.pairs_per_step * (1 + spec.steps))
    scored = score_reference(lm.model, pairs, layout, settings.tokens_per_microbatch)
    model = lm.model.requires_grad_(True)
    if settings.lora is not None:
        model = add_lora(lm.model.requires_grad_(False), settings.lora.rank, settings.lora.alpha)
    meter = Meter(options)
    with tempfile.TemporaryDirectory() as state:
        job = Job(
            model=model,
            pairs=scored,
            loss=parts.loss,
            settings=settings,
            layout=layout,
            seed=0,
            state_folder=Path(state),
            reference=policy,
            starts_at_reference=False,
        )
        parts.trainer(job, StepClock(meter), lambda: False)
    trained = spec.steps * spec.pairs_per_step
    return meter.measurement(trained, sum(len(p.context) + len(p.chosen) + len(p.rejected) for p in scored))


def _pairs(recipe: Recipe, lm: causal_lm.CausalLM, policy: PolicyRef, count: int) -> list[TokenizedPair]:
    """Return the first pairs of the data; with the method's own views where its loss reads any."""
    parts = build_parts(recipe)
    context = RoundContext(0, 0, policy, policy)
    builder = parts.pair_builder if views_of(parts.loss) else Ranked()
    groups = Given()(resolve_prompts(recipe).train, context)
    judged = [
        JudgedGroup(
            prompt=group.prompt,
            completions=group.completions,
            policy=group.policy,
            round=0,
            temperature=1.0,
            top_p=1.0,
            scores=verdict.scores,
            win_prob=None,
            judge="given",
            notes=verdict.notes,
        )
        for group, verdict in zip(groups, parts.judge(groups, context), strict=True)
    ]
    encoding = Encoding(
        partial(causal_lm.encode_prompt, lm.tokenizer), partial(completion_ids, lm), recipe.train.max_tokens
    )
    return list(tokenize_pairs(builder(judged, context), encoding, Counter()))[:count]
