"""Trainings that must give the same curve on any number of ranks; run as a script, one rank of several.

python rank_cases.py FOLDER SHARDING    with the environment that a launcher sets: RANK, WORLD_SIZE, MASTER_…
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefloop.errors import Interrupted
from prefloop.losses.dpo import DPO
from prefloop.losses.simpo import SimPO
from prefloop.models import causal_lm
from prefloop.models.adapters import add_lora
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import Quiet
from prefloop.ranks import joined
from prefloop.rows import PolicyRef, StepLog, TokenizedPair
from prefloop.team import ALONE, Team
from prefloop.train.fast_slow import FastSlow
from prefloop.train.job import Job
from prefloop.train.moving_reference import MovingReference
from prefloop.train.noise_game import NoiseGame
from prefloop.train.opening import open_trainable
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import shard
from prefloop.train.update import Update

PAIRS, STEPS, MIDDLE = 25, 20, 10
"""25 pairs are 4 steps of 8 an epoch, the last with one pair: then all ranks but one have nothing of their own."""


def pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 90, (size,), generator=generator).tolist())

    found = [TokenizedPair(f"p{i}", ids(2, 9), ids(2, 12), ids(2, 12), None, None, None, 1.0) for i in range(PAIRS)]
    # Pairs of one prompt, a pair that weighs less, and one that is longer than a microbatch.
    found[3] = dataclasses.replace(found[3], context=found[2].context)
    found[4] = dataclasses.replace(found[4], context=found[2].context, weight=0.5)
    found[7] = dataclasses.replace(found[7], chosen=ids(60, 61))
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    trainer: Any
    loss: Any = dataclasses.field(default_factory=lambda: DPO(beta=0.5))
    lora: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


CASES: dict[str, Case] = {
    "dpo": Case(Update()),
    "simpo": Case(Update(), SimPO()),
    "lora": Case(Update(), lora=True),
    "checkpointed": Case(Update(), settings=(("gradient_checkpointing", True), ("layout", "shared"))),
    "noise_joint": Case(NoiseGame(noise_learning_rate=1e-3)),
    "noise_alternating": Case(NoiseGame("alternating", noise_learning_rate=1e-3, noise_steps=2, policy_steps=2)),
    "fast_slow": Case(FastSlow(check_every=3, speed=0.5), lora=True),
    "moving_reference": Case(MovingReference(every=6, share=0.5)),
}


def job(case: Case, folder: Path, team: Team, policy: Path, sharding: str) -> Job:
    settings = TrainSettings.model_validate(
        {
            "learning_rate": 1e-3,
            "pairs_per_step": 8,
            "epochs": 5,
            "tokens_per_microbatch": 60,
            "weight_decay": 0.01,
            "checkpoint_every": 1000,
            "sharding": sharding,
            **dict(case.settings),
        }
    )
    opened = open_trainable(str(policy), settings, team, print)
    model = opened.lm.model
    whole = causal_lm.load(str(policy), precision="fp32", device="cpu").model
    scored = score_reference(whole, pairs(), "padded", 200)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    trained = add_lora(model, 4, 8.0, seed=3) if case.lora else model.requires_grad_(True)
    shard(trained, team, settings, opened.checkpoint)
    one = Job(
        model=trained,
        pairs=scored,
        loss=case.loss,
        settings=settings,
        layout=settings.layout if settings.layout != "auto" else "padded",
        seed=7,
        state_folder=folder,
        reference=PolicyRef(str(policy), "digest", -1) if case.loss.needs_reference else None,
        starts_at_reference=case.loss.needs_reference,
        team=team,
    )
    return one


def stopping_after(steps: int) -> Callable[[], bool]:
    """A person who asks one rank to stop during the step before `steps`."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= steps

    return stop


def train(
    name: str,
    folder: Path,
    policy: Path,
    team: Team = ALONE,
    sharding: str = "replicate",
    stop: Callable[[], bool] = lambda: False,
) -> list[StepLog]:
    """Train a case, or go on from the state in `folder`; an interrupted one returns nothing."""
    case = CASES[name]
    one = job(case, folder, team, policy, sharding)
    try:
        return list(case.trainer(one, Quiet(), stop))
    except Interrupted:
        return []


def as_json(curve: list[StepLog]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in curve]


def main() -> None:
    folder, policy = Path(sys.argv[1]), Path(sys.argv[1]) / "policy"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined() as team:
        for sharding, names in json.loads(sys.argv[2]).items():
            out = folder / sharding
            for name in names:
                found[f"{sharding}/{name}"] = as_json(train(name, out / name, policy, team, sharding))
            # Only one rank is asked to stop; all stop after the same step.
            stop = stopping_after(MIDDLE) if team.rank == team.size - 1 else lambda: False
            train("dpo", out / "many-then-one", policy, team, sharding, stop)
            found[f"{sharding}/one-then-many"] = as_json(train("dpo", out / "one-then-many", policy, team, sharding))
    (folder / f"found-{team.rank}-of-{team.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
