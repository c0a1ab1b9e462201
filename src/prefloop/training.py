"""The stage 5-policy: the round's batches become a new policy."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloop.artifact import Artifact, Building, Key, load_artifact
from prefloop.combine import NOTHING_PAST, Past, combined
from prefloop.components import key_of
from prefloop.models import adapters, causal_lm
from prefloop.models.pieces import export_pieces
from prefloop.models.shares import Checkpoint
from prefloop.models.training import checkpoint_activations, compile_layers
from prefloop.reference_guard import unchanged_reference
from prefloop.rows import PolicyRef, StepLog, TokenizedPair
from prefloop.stages import Run, layout_of
from prefloop.train.job import Job
from prefloop.train.opening import open_trainable
from prefloop.train.safety import ran_away
from prefloop.train.sharding import gather, shard
from prefloop.train.states import STATES
from prefloop.train.store import PairStore

_WITHOUT_EFFECT = ("checkpoint_every", "log_every", "reference_cache", "remedy", "sharding", "waive_state")
"""Training settings that do not change the policy, or say so in its facts."""


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
    opened = open_trainable(base, recipe.train, run.team, run.progress.say)
    lm = opened.lm
    model = _trainable(run, lm.model, lineage.policy, seed)
    shared = shard(model, run.team, recipe.train, opened.checkpoint)
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
    with unchanged_reference(run, lineage.reference, job):
        curve = run.parts.trainer(job, run.progress, run.stop)
    left: dict[str, Any] | None = None
    if opened.checkpoint is not None and recipe.round_exit != "combine":
        left = _leave_in_pieces(run, job, base, path, lm, opened.checkpoint, lineage.card)
    elif shared:
        whole = None
        if run.team.main:
            lm = causal_lm.load(base, precision="fp32", device="cpu", cache=False)
            whole = _trainable(run, lm.model, lineage.policy, seed)
        gather(job.model, whole)
        job = replace(job, model=whole or job.model)
    if not run.team.main:
        return building.finish()
    building.write_part(0, curve)
    if left is None:
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


def _leave_in_pieces(  # noqa: PLR0913
    run: Run, job: Job, base: str, path: Path, lm: causal_lm.CausalLM, checkpoint: Checkpoint, card: str
) -> dict[str, Any]:
    """Write the policy to export weight by weight, without a whole one in memory; all ranks call this.

    Return what the artifact says of it.
    """
    kept = run.recipe.train.lora is not None and run.recipe.round_exit == "keep"
    if kept and run.team.main:
        adapters.save_adapter(job.model, path / "adapter")
    export_pieces(job.model, lm.tokenizer, path, card, checkpoint, write=run.team.main)
    return {"base": base if kept else None}


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
