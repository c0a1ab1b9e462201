"""The stages 4-batches and 5-policy: pairs become token ids with reference log-probs, and those a new policy."""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefloop import shelf
from prefloop.artifact import Artifact, Building, Key, load_artifact
from prefloop.combine import NOTHING_PAST, Past, combined
from prefloop.components import key_of
from prefloop.errors import DataError
from prefloop.models import adapters, causal_lm
from prefloop.models.training import checkpoint_activations, compile_layers
from prefloop.reference_guard import unchanged_reference
from prefloop.rows import PolicyRef, PreferencePair, StepLog, TokenizedPair
from prefloop.stages import PAIRS_PER_PART, Run, batched, completion_ids, layout_of
from prefloop.train.job import Job
from prefloop.train.reference import Encoding, sampler_gap, score_reference, tokenize_pairs
from prefloop.train.reference_cache import ReferenceCache
from prefloop.train.safety import ran_away
from prefloop.train.sharding import gather, shard
from prefloop.train.states import STATES
from prefloop.train.store import PairStore

SPOT_CHECKS = 16
"""Pairs on which the sampler's log-probs are compared with live ones of the same policy."""
SAMPLER_GAP = 1e-3
"""Largest difference of one token's log-prob, nats, up to which the sampler's are used as the reference's."""
_WITHOUT_EFFECT = ("checkpoint_every", "log_every", "reference_cache", "remedy", "sharding", "waive_state")
"""Training settings that do not change the policy, or say so in its facts."""


def batch(
    run: Run, path: Path, pairs: Sequence[Artifact[PreferencePair]], reference: PolicyRef | None, policy: PolicyRef
) -> Artifact[TokenizedPair]:
    """4-batches: token ids of the round's pairs and of replayed ones, with the reference's log-probs.

    Raises:
        DataError: every pair was dropped.

    """
    opened = run.open(path, _batches_key(run, pairs, reference, policy), TokenizedPair, together=True)
    if isinstance(opened, Building):
        opened = _batched(run, opened, pairs, Scorer.of(run, reference, policy))
    if run.team.main:
        shelf.clear(path)
    return opened


def _batched(
    run: Run, opened: Building[TokenizedPair], pairs: Sequence[Artifact[PreferencePair]], scorer: "Scorer"
) -> Artifact[TokenizedPair]:
    began = time.monotonic()
    facts = BatchFacts()
    total = sum(artifact.rows for artifact in pairs)
    made = scored_ahead(run, opened.path, scorer) if shelf.folder_of(opened.path).is_dir() else None
    run.progress.start("reference", total, "pairs")
    for index, part in enumerate(scorer.parts((p for artifact in pairs for p in artifact), facts.dropped)):
        facts.count(part)
        mine = index % run.team.size == run.team.rank
        # The main rank looks into every part: what the artifact says of them is its to say.
        use_sampler = (mine or run.team.main) and scorer.sampler_serves(part, facts)
        if mine and not opened.has_part(index):
            known = None if made is None or use_sampler else made.take(index)
            if known is not None and [_unscored(p) for p in known] == [_unscored(p) for p in part]:
                part = known
            elif not use_sampler:
                part = scorer.scored(part)
            opened.write_part(index, part)
            run.check_stop("reference log-probs")
        run.progress.advance(len(part))
    run.team.gathered()
    run.progress.finish()
    if scorer.cache and scorer.cache.used:
        run.progress.say(f"reference log-probs: those of {scorer.cache.used} pairs were in {scorer.cache.folder}")
    if not facts.pairs:
        raise DataError(f"{opened.path}: no pair is left to train on; dropped: {dict(facts.dropped)}")
    return opened.finish(
        {
            **facts.as_dict(with_reference=scorer.reference is not None),
            "layout": scorer.layout,
            "layout_why": scorer.layout_why,
        },
        seconds=time.monotonic() - began,
    )


def _batches_key(
    run: Run, pairs: Sequence[Artifact[PreferencePair]], reference: PolicyRef | None, policy: PolicyRef
) -> Key:
    settings = {"max_tokens": run.recipe.train.max_tokens, "layout": run.recipe.train.layout}
    inputs = {f"pairs-{i}": p.digest for i, p in enumerate(pairs)}
    inputs |= {"tokenizer": policy.digest} | ({"reference": reference.digest} if reference else {})
    return Key("batches", settings, inputs)


@dataclass(frozen=True)
class Scorer:
    """Makes parts of tokenized pairs, and puts the log-probs of `reference` beside them."""

    lm: causal_lm.CausalLM
    reference: PolicyRef | None
    encoding: Encoding
    layout: str
    layout_why: str
    tokens_per_batch: int
    cache: ReferenceCache | None

    @classmethod
    def of(cls, run: Run, reference: PolicyRef | None, policy: PolicyRef) -> "Scorer":
        """Return the scorer of a round; loads the reference, or `policy` where there is none."""
        settings = run.recipe.train
        lm = causal_lm.load((reference or policy).path, precision="auto", device=settings.device)
        encoding = Encoding(
            partial(causal_lm.encode_prompt, lm.tokenizer), partial(completion_ids, lm), settings.max_tokens
        )
        layout, why = layout_of(run, lm.model)
        cache = None
        if reference is not None and settings.reference_cache is not None:
            cache = ReferenceCache.of(Path(settings.reference_cache).expanduser(), reference.digest, lm.model)
        return cls(lm, reference, encoding, layout, why, settings.tokens_per_microbatch, cache)

    def parts(self, pairs: Iterable[PreferencePair], dropped: Counter[str]) -> Iterator[list[TokenizedPair]]:
        """Yield the parts of 4-batches, with the sampler's log-probs at the most; what is left out is counted."""
        sampled_by = self.reference.digest if self.reference else None
        return batched(tokenize_pairs(pairs, self.encoding, dropped, sampled_by), PAIRS_PER_PART)

    def sampler_serves(self, part: Sequence[TokenizedPair], facts: "BatchFacts") -> bool:
        """Return whether the sampler's log-probs can stand for the reference's: measured on pairs all over the part."""
        if self.reference is None or any(
            p.reference_chosen is None or p.reference_rejected is None or p.views for p in part
        ):
            return False
        probe = part[:: max(1, len(part) // SPOT_CHECKS)][:SPOT_CHECKS]
        gap = sampler_gap(probe, self._live(probe))
        facts.sampler_gap = max(gap, facts.sampler_gap or 0.0)
        facts.sampler_parts += gap <= SAMPLER_GAP
        return gap <= SAMPLER_GAP

    def scored(self, part: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """Return the part with the reference's log-probs; as it is where there is no reference."""
        if self.reference is None:
            return list(part)
        return self.cache.score(part, self._live) if self.cache else self._live(part)

    def _live(self, part: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        return score_reference(self.lm.model, part, layout=self.layout, tokens_per_batch=self.tokens_per_batch)


def scored_ahead(run: Run, path: Path, scorer: Scorer) -> shelf.Shelf[TokenizedPair]:
    """Return the parts of 4-batches in folder `path` that were scored while completions were being judged."""
    settings = {"max_tokens": run.recipe.train.max_tokens, "layout": run.recipe.train.layout}
    reference = {"reference": scorer.reference.digest} if scorer.reference else {}
    return shelf.Shelf.of(path, Key("batches", settings, reference), TokenizedPair)


def _unscored(pair: TokenizedPair) -> TokenizedPair:
    views = tuple(replace(view, reference=None) for view in pair.views)
    return replace(pair, reference_chosen=None, reference_rejected=None, views=views)


@dataclass
class BatchFacts:
    """What 4-batches says of its pairs. `sampler_parts` of `parts` took the sampler's log-probs as the reference's."""

    pairs: int = 0
    tokens: int = 0
    parts: int = 0
    sampler_parts: int = 0
    sampler_gap: float | None = None
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, part: Sequence[TokenizedPair]) -> None:
        """Count the pairs of a part."""
        self.parts += 1
        self.pairs += len(part)
        self.tokens += sum(len(p.context) + len(p.chosen) + len(p.rejected) for p in part)

    def as_dict(self, with_reference: bool) -> dict[str, Any]:
        """Return the facts as the manifest holds them."""
        sources = {0: "computed", self.parts: "sampler"}
        facts: dict[str, Any] = {"pairs": self.pairs, "dropped": dict(self.dropped), "tokens": self.tokens}
        facts["reference_logps"] = sources.get(self.sampler_parts, "both") if with_reference else "none"
        return facts if self.sampler_gap is None else facts | {"sampler_gap": self.sampler_gap}


@dataclass(frozen=True)
class Lineage:
    """What a round's training starts from and refers to."""

    round: int
    policy: PolicyRef
    reference: PolicyRef | None
    card: str
    past: Past = NOTHING_PAST


def update(run: Run, path: Path, batches: Artifact[TokenizedPair], lineage: Lineage, seed: int) -> PolicyRef:
    """5-policy: the policy after training, as a `save_pretrained` folder with the training curve beside it."""
    settings = run.recipe.train.model_dump(mode="json")
    for name in _WITHOUT_EFFECT:
        del settings[name]
    if not settings["skip_nonfinite"]:  # as before there was such a setting
        del settings["skip_nonfinite"]
    settings |= {
        "loss": key_of(run.parts.loss, run.recipe.loss.kind),
        "trainer": key_of(run.parts.trainer, run.recipe.trainer.kind),
        "round_exit": run.recipe.round_exit if run.recipe.train.lora else None,
        "seed": seed,
    }
    inputs = {"batches": batches.digest, "policy": lineage.policy.digest}
    if run.recipe.round_exit == "combine":
        settings["combine"] = run.recipe.combine.model_dump(mode="json")
        inputs |= lineage.past.inputs
    opened = run.open(path, Key("policy", settings, inputs), StepLog, together=True)
    if isinstance(opened, Building):
        opened = _train_and_export(run, opened, batches, lineage, seed)
    shutil.rmtree(path / STATES, ignore_errors=True)  # here, since a kill may come between the manifest and this
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
        pairs=PairStore(batches),
        loss=run.parts.loss,
        settings=recipe.train,
        layout=run.team.tell(layout_of(run, lm.model)[0]),
        seed=seed,
        state_folder=path / STATES,
        reference=lineage.reference,
        starts_at_reference=lineage.reference is not None and lineage.reference.digest == lineage.policy.digest,
        team=run.team,
        on_step=run.watch.step,
    )
    shared = shard(job.model, run.team, recipe.train, job.layout)
    with unchanged_reference(run, lineage.reference, job):
        curve = run.parts.trainer(job, run.progress, run.stop)
    if shared:
        whole = None
        if run.team.main:
            lm = causal_lm.load(base, precision="fp32", device="cpu", cache=False)
            whole = _trainable(run, lm.model, lineage.policy, seed)
        gather(job.model, whole)
        job = replace(job, model=whole or job.model)
    if not run.team.main:
        return building.finish()
    building.write_part(0, curve)
    plain, left = _leave_round(run, job, base, path, lineage, batches)
    causal_lm.export(plain, lm.tokenizer, path, lineage.card)
    facts = {
        "policy_digest": causal_lm.folder_digest(path),
        "round": lineage.round,
        "steps": curve[-1].step,
        "tokens": batches.facts["tokens"] * recipe.train.epochs,
        **job.counts,
        **left,
    }
    if recipe.trainer.kind == "update" and (diverged := ran_away(curve)):
        facts["diverged"] = diverged
    return building.finish(facts, seconds=time.monotonic() - began)


def _leave_round(
    run: Run, job: Job, base: str, path: Path, lineage: Lineage, batches: Artifact[TokenizedPair]
) -> tuple[Any, dict[str, Any]]:
    """Return the plain model to export, as `round_exit` says, and what the artifact says of it."""
    if run.recipe.train.lora is None:
        return job.model, {"base": None}
    if run.recipe.round_exit in ("keep", "combine"):
        adapters.save_adapter(job.model, path / "adapter")
    if run.recipe.round_exit == "combine":
        plain, facts = combined(job, Path(base), path / "adapter", lineage.past, run.recipe.combine, batches)
        return plain, {"base": None, **facts}
    kept = run.recipe.round_exit == "keep"
    return adapters.merge_lora(job.model), {"base": base if kept else None}


def _trainable(run: Run, model: Any, policy: PolicyRef, seed: int) -> Any:
    """Return the model with what is to be trained switched on: all weights, a fresh adapter, or the last one."""
    lora = run.recipe.train.lora
    if run.recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if run.recipe.train.compile:
        compile_layers(model)
    if lora is None:
        return model.requires_grad_(True)
    if policy.base is not None:
        return adapters.load_adapter(model, Path(policy.path) / "adapter", trainable=True)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return adapters.add_lora(model, lora.rank, lora.alpha, targets=targets, seed=seed)


def policy_artifact(policy: PolicyRef) -> Artifact[StepLog]:
    """Return the finished 5-policy artifact of a policy that this run trained."""
    artifact = load_artifact(Path(policy.path), StepLog)
    assert artifact is not None  # update() has just returned it
    return artifact
