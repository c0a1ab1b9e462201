"""A round's reference stays what it was: its files, its weights in memory, and the log-probs stored for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from prefloop.errors import CorruptArtifact, TrainingDiverged
from prefloop.models import causal_lm
from prefloop.models.shares import local
from prefloop.rows import PolicyRef
from prefloop.stages import Run
from prefloop.team import ALONE
from prefloop.train.job import Job
from prefloop.train.opening import Frozen, open_frozen
from prefloop.train.reference import sampler_gap, score_reference

CHECKED_PAIRS = 16
"""Pairs, evenly spread over the round's, whose stored log-probs are compared with live ones."""
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Largest difference of one token's log-prob, nats. Our own choice: rare tokens feel bfloat16's rounding most."""
ON_GPU = 0.05
"""The same for float32 on a GPU, where products may be TF32."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def unchanged_reference(run: Run, reference: PolicyRef | None, job: Job) -> Iterator[None]:
    """Compare the reference at the start and at the end of a round's training.

    Looked at are its files against the digest that the run knows; frozen weights of the model in training, which are
    the reference where it has an adapter; on a CPU the reference in memory, where it is shared; and, at the start, a
    few of the stored log-probs against live ones. On a GPU no other model than the trained one stays in memory.

    Raises:
        CorruptArtifact: its files changed, or the stored log-probs are not its own.
        TrainingDiverged: training changed its weights in memory.

    """
    if reference is None:
        yield
        return
    _check_files(reference, "before training")
    opened = open_frozen(reference.path, run.recipe.train, run.team)
    _check_stored(run, opened, job)
    models = [job.model, opened.lm.model]
    if opened.lm.device.type != "cpu" or opened.shared:
        # A GPU's memory is for training; whoever needs the reference there loads it again.
        del models[1], opened
        causal_lm.forget()
    before = _sums(*models)
    yield
    changed = [name for name, value in _sums(*models).items() if before.get(name, value) != value]
    if changed:
        raise TrainingDiverged(
            f"training changed the reference: {changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''}. "
            f"The trainer ({run.recipe.trainer.kind}) or the loss ({run.recipe.loss.kind}) writes into a model that it "
            "may only read; nothing of this round is kept"
        )
    _check_files(reference, "after training")


def _check_files(reference: PolicyRef, when: str) -> None:
    found = causal_lm.folder_digest(Path(reference.path), reread=True)
    if found != reference.digest:
        raise CorruptArtifact(
            f"{reference.path}: the reference's files changed {when} (digest {reference.digest}, now {found}); put "
            "them back, or run with another --out"
        )


def _check_stored(run: Run, opened: Frozen, job: Job) -> None:
    every = max(1, len(job.pairs) // CHECKED_PAIRS)
    stored = [job.pairs[i] for i in range(0, len(job.pairs), every)][:CHECKED_PAIRS]
    model, team = opened.lm.model, run.team if opened.shared else ALONE
    live = score_reference(model, stored, job.layout, run.recipe.train.tokens_per_microbatch, team)
    gap = sampler_gap(stored, live)
    dtype = model.dtype
    allowed = ON_GPU if dtype == torch.float32 and model.device.type != "cpu" else TOLERANCES[dtype]
    if not gap <= allowed:
        raise CorruptArtifact(
            f"{job.state_folder.parent}: the stored log-probs of the reference differ from live ones by {gap:.3g} nats "
            f"on one token (allowed {allowed}): they belong to another model, or to another version of it. Move the "
            "folder 4-batches beside it away, and the same command makes it again"
        )


def _sums(trained: nn.Module, reference: nn.Module | None = None) -> dict[str, tuple[int, int]]:
    """Return a checksum of every weight that must not change, by name."""
    named = () if reference is None else reference.named_parameters()
    found = {f"reference {name}": _sum(p) for name, p in named}
    return found | {name: _sum(p) for name, p in trained.named_parameters() if _is_base(name, p)}


def _is_base(name: str, weights: nn.Parameter) -> bool:
    """Return whether a weight belongs to the frozen model below adapters, which trainers may copy and exchange."""
    return not weights.requires_grad and "lora_" not in name


def _sum(weights: Tensor) -> tuple[int, int]:
    """Return the sum of all weights' bits as integers, and of every third one's: it is taken where they lie."""
    bits = local(weights).detach().reshape(-1).view(_INTEGERS[weights.element_size()])
    return int(bits.sum(dtype=torch.int64)), int(bits[::3].sum(dtype=torch.int64))
