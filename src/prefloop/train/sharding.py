"""Which ranks compute which pairs of a step and hold which weights, and how their gradients become one.

The gradient of a step is the mean over its pairs, however many ranks computed it: each rank adds up its own pairs,
divided by the number of all, and the sums of all ranks are added.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import overload

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prefloop.errors import ConfigError
from prefloop.models.adapters import plain_weights, whole
from prefloop.models.logps import share_weights
from prefloop.models.shares import Checkpoint, held_rows
from prefloop.models.skeleton import hollow
from prefloop.team import Team
from prefloop.train.plan import Plan, Step
from prefloop.train.settings import TrainSettings

BUCKET = 1 << 24
"""Gradients that are summed over ranks at a time: 64 MiB in float32."""


@dataclass(frozen=True)
class Share(Sequence[list[int]]):
    """The microbatches of a step that one rank computes.

    `rows` are the pairs of the whole step. All ranks have equally many microbatches. Where a step has too few pairs for
    that, the microbatches from place `counted` on are another rank's: computed along, so that all ranks do the same,
    and not counted.
    """

    microbatches: list[list[int]]
    rows: list[int]
    counted: int

    def __len__(self) -> int:
        """Return the number of microbatches."""
        return len(self.microbatches)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        """Return a microbatch."""
        return self.microbatches[place]


def rows_of(microbatches: Sequence[Sequence[int]]) -> list[int]:
    """Return the pairs of the whole step, of which `microbatches` are all or one rank's share."""
    if isinstance(microbatches, Share):
        return microbatches.rows
    return [row for microbatch in microbatches for row in microbatch]


def counts(microbatches: Sequence[Sequence[int]], place: int) -> bool:
    """Return whether the microbatch at `place` is this rank's to count."""
    return not isinstance(microbatches, Share) or place < microbatches.counted


def divisor(microbatches: Sequence[Sequence[int]], place: int) -> float:
    """Return what a sum over the microbatch at `place` is divided by: the number of pairs of the step.

    Infinity where it does not count, so that its gradient is 0.
    """
    return len(rows_of(microbatches)) if counts(microbatches, place) else math.inf


def share_of(plan: Plan, step: int, team: Team) -> Share:
    """Return what `team.rank` computes of a step. What counts of all shares is the step's pairs, each once.

    Prompts stay together as far as the split allows, and microbatches that are computed at the same time are of
    similar size.
    """
    whole: Step = plan[step]
    rows = rows_of(whole)
    if team.size == 1:
        return Share(whole, rows, len(whole))
    turns = -(-len(whole) // team.size)
    cut = _cut(plan, rows, turns * team.size)
    cut.sort(key=lambda batch: (-plan.tokens(batch), batch))
    mine = cut[team.rank :: team.size]
    return Share(mine + [cut[-1]] * (turns - len(mine)), rows, len(mine))


def _cut(plan: Plan, rows: Sequence[int], count: int) -> list[list[int]]:
    """Cut the pairs of a step into `count` microbatches of similar size, or as many as there are pairs."""
    low, high = 1, plan.budget
    while low < high:
        middle = (low + high) // 2
        if len(list(plan.cut(rows, middle))) <= count:
            high = middle
        else:
            low = middle + 1
    cut = list(plan.cut(rows, low))
    while len(cut) < min(count, len(rows)):
        largest = max((batch for batch in cut if len(batch) > 1), key=plan.tokens)
        half = len(largest) // 2
        cut.remove(largest)
        cut += [largest[:half], largest[half:]]
    return cut


def require_divisible(pairs_per_step: int, team: Team) -> None:
    """Refuse a step that cannot be split evenly.

    Raises:
        ConfigError: names both numbers.

    """
    if pairs_per_step % team.size:
        raise ConfigError(
            f"train.pairs_per_step: {pairs_per_step} is no multiple of {team.size} ranks; set it to "
            f"{-(-pairs_per_step // team.size) * team.size}, or start another number of ranks"
        )


def any_rank(team: Team, flag: bool) -> bool:
    """Return whether `flag` is true on any rank; all ask at once."""
    return flag if team.size == 1 else bool(team.sum(torch.tensor(int(flag))))


def sum_gradients(team: Team, parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place; those of sharded parameters are summed already.

    A parameter without a gradient has none on any rank.
    """
    if team.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        team.sum(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def sharding_of(settings: TrainSettings, team: Team, device: str) -> str:
    """Return how the ranks hold a model on a kind of device: replicate, full or hybrid."""
    kind = settings.sharding
    if kind == "auto":
        kind = "full" if device == "cuda" else "replicate"
    return "replicate" if team.size == 1 else kind


def lowered(settings: TrainSettings, device: str) -> bool:
    """Return whether matrix products are bf16."""
    return settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")


def shard(
    model: nn.Module, team: Team, settings: TrainSettings, checkpoint: Checkpoint | None = None, causal: bool = True
) -> bool:
    """Give each rank its rows of every weight, in place, where `settings.sharding` says so; return whether it does.

    Each decoder layer gathers its weights when it runs, forward and backward, and the gradients are summed into the
    shares (FSDP2: `torch.distributed.fsdp.fully_shard`). What trains beside a frozen model, a LoRA adapter, stays
    whole on each rank. With bf16 the weights are gathered and multiplied in bf16; shares, sums of gradients and the
    optimizer are float32.

    `checkpoint`: the weights are stand-ins (`models/skeleton.py`), and each rank reads its own rows from there.
    `causal`: the log-prob engine will run the model; others run themselves.

    Raises:
        ConfigError: hybrid, and the machines have different numbers of ranks.

    """
    device = next(model.parameters()).device
    if sharding_of(settings, team, device.type) == "replicate":
        return False
    base: nn.Module = model
    if causal and isinstance(model, PeftModel):
        base = model.get_base_model()
    adapted = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
    lower = lowered(settings, device.type)
    if checkpoint is not None:
        hollow(model)
        adapted = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
    share(base, device, team, settings, lower, adapted)
    if checkpoint is not None:
        place(model, device)
        checkpoint.fill(dict(plain_weights(model)))
    if causal:
        share_weights(model, lower)
    return True


def share(
    base: nn.Module,
    device: torch.device,
    team: Team,
    settings: TrainSettings,
    lower: bool,
    adapted: AbstractSet[nn.Parameter] = frozenset(),
) -> None:
    """Share the weights of `base`, which is called as a whole, layer by layer; `adapted` ones stay whole."""
    policy = MixedPrecisionPolicy(torch.bfloat16 if lower else None, torch.float32)
    mesh = _mesh(team.size, team.local_size, device.type, sharding_of(settings, team, device.type))
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for part in (*layers, base):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(adapted))
    for module in base.modules():
        if isinstance(module, FSDPModule):
            # The sum over ranks, not their mean: losses are divided by the pairs of the whole step already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def place(model: nn.Module, device: torch.device) -> None:
    """Make room for the shares of weights that are on the meta device."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)


@cache
def _mesh(size: int, local_size: int, device: str, kind: str) -> DeviceMesh:
    if kind == "full":
        return init_device_mesh(device, (size,))
    if size % local_size:
        raise ConfigError(
            f"train.sharding: hybrid needs the same number of ranks on each machine, and {size} ranks are no "
            f"multiple of the {local_size} here; set it to full"
        )
    shape = (size // local_size, local_size)
    return init_device_mesh(device, shape, mesh_dim_names=("machines", "shares"))


def rows_held(named: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return first and last row (exclusive) that this rank holds of each sharded tensor, by name."""
    return {name: held_rows(tensor) for name, tensor in named.items() if isinstance(tensor, DTensor)}


def writes_rows(tensor: Tensor, team: Team) -> bool:
    """Return whether this rank is the one that writes the rows which it holds."""
    if not isinstance(tensor, DTensor):
        return team.main
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def gather(model: nn.Module, into: nn.Module | None) -> None:
    """Copy what was trained into the same model `into` in one piece, on the rank that has one; all ranks call this.

    One weight at a time is gathered.
    """
    target: Mapping[str, Tensor] = dict(into.named_parameters()) if into is not None else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = whole(parameter.detach())
            if into is not None:
                target[name].data.copy_(full)
