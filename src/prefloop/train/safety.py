"""What training looks after: numbers that are not finite, a training state that lacks a part, a loss that runs away."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prefloop.errors import CorruptArtifact, TrainingDiverged
from prefloop.models.shares import local
from prefloop.protocols import Progress
from prefloop.rows import StepLog
from prefloop.train.job import Job
from prefloop.train.states import states

SKIPPED = "skipped_updates"
"""Note of the training state, and fact of 5-policy: updates that were left out."""
RAN_AWAY = 2.0
"""A loss that ends above this multiple of where it began has run away. Our own choice."""


def finite(row: StepLog, norms: Sequence[Tensor]) -> bool:
    """Return whether loss and gradient norms are finite."""
    return math.isfinite(row.loss) and all(math.isfinite(float(norm)) for norm in norms)


def skip(job: Job, notes: dict[str, float], what: str, progress: Progress) -> None:
    """Count an update that is left out, and say so.

    Raises:
        TrainingDiverged: as many as `train.skip_nonfinite` were left out already.

    """
    cap = job.settings.skip_nonfinite
    before = int(notes.get(SKIPPED, 0))
    if before >= cap:
        most = f" after {before} updates were skipped (train.skip_nonfinite)" if cap else ""
        raise TrainingDiverged(
            f"{what}{most}. Training diverged. {last_good(job)} Lower train.learning_rate, set train.max_grad_norm, or "
            "look at the pairs that are named"
        )
    notes[SKIPPED] = before + 1
    progress.say(f"training: {what}; this update is skipped ({before + 1} of at most {cap})")


def last_good(job: Job) -> str:
    """Say from where training can go on."""
    found = states(job.state_folder)
    if found:
        return f"The last good state is {found[-1]}."
    return "There is no training state yet: the last good policy is the one that the round started from."


def describe(row: StepLog, named: Mapping[str, nn.Parameter], norms: Sequence[Tensor], bad_pairs: Sequence[str]) -> str:
    """Say which step, which loss and which tensors are not finite; called before the update is made."""
    tensors = [name for name, p in named.items() if p.grad is not None and not bool(local(p.grad).isfinite().all())]
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    gradient = f"the gradient of {tensors[0]}{more} is not finite" if tensors else "every gradient is finite"
    pairs = f", from pair {', '.join(bad_pairs[:3])}{' …' if len(bad_pairs) > 3 else ''}" if bad_pairs else ""
    norm = ", ".join(f"{float(n):.4g}" for n in norms)
    return f"step {row.step}: loss {row.loss:.4g}{pairs}, gradient norm {norm}; {gradient}"


def look_at_the_end(
    job: Job, named: Mapping[str, nn.Parameter], notes: Mapping[str, float], curve: Sequence[StepLog], steps: int
) -> None:
    """Note in `job.counts` what was skipped, and look at the weights once: no later loss would tell.

    Raises:
        TrainingDiverged: every update was skipped, or weights are not finite; names the first such tensor.

    """
    if skipped := int(notes.get(SKIPPED, 0)):
        job.counts[SKIPPED] = job.counts.get(SKIPPED, 0) + skipped
    if not curve:
        raise TrainingDiverged(f"training: all {steps} updates were skipped: loss or gradient was never finite")
    held = [local(p).detach() for p in named.values()]
    total = torch.stack([p.float().abs().max() for p in held if p.numel()])
    if bool(total.isfinite().all()):
        return
    bad = next(name for name, p in named.items() if not bool(local(p).isfinite().all()))
    raise TrainingDiverged(
        f"step {steps}: the weights {bad} are not finite after the last update. Training diverged. {last_good(job)} "
        "Lower train.learning_rate"
    )


def ran_away(curve: Sequence[StepLog]) -> str:
    """Say that the loss ran away; "" where it did not, or where it is not a positive number that should fall."""
    tenth = max(1, len(curve) // 10)
    before, after = (sum(row.loss for row in rows) / tenth for rows in (curve[:tenth], curve[-tenth:]))
    if len(curve) < 2 or before <= 0 or after <= RAN_AWAY * before:
        return ""
    return (
        f"training diverged: the loss rose from {before:.3g} to {after:.3g} (means of the first and last {tenth} "
        f"logged steps); lower train.learning_rate"
    )


WAIVABLE = ("weights", "moments", "carried")
"""Parts of a training state, as `train.waive_state` names them."""


def require_parts(job: Job, missing: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what of a training state is missing and waived, in words.

    Raises:
        CorruptArtifact: a part is missing and not waived.

    """
    waived = []
    for part, names in missing.items():
        if not names:
            continue
        what = f"{part} of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        if part not in job.settings.waive_state:
            raise CorruptArtifact(
                f"{job.state_folder}: the training state lacks {what}, so training would not go on as it was. Remove "
                f"that folder to train this round again, or set train.waive_state=[{part}] to begin with fresh ones"
            )
        waived.append(what)
    return waived
