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
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.losses.simpo import SimPO
from prefloop.losses.srpo import SRPO
from prefloop.models.adapters import add_lora
from prefloop.models.reward_head import add_lora as reward_lora
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import Quiet, views_of
from prefloop.ranks import joined
from prefloop.rows import PolicyRef, StepLog, TokenizedPair, TokenizedView
from prefloop.team import ALONE, Team
from prefloop.train.fast_slow import FastSlow
from prefloop.train.group_advantage import GroupAdvantage
from prefloop.train.job import Job
from prefloop.train.moving_reference import MovingReference
from prefloop.train.noise_game import NoiseGame
from prefloop.train.opening import open_frozen, open_reward_model, open_trainable
from prefloop.train.ppo import PPO
from prefloop.train.reference import score_reference
from prefloop.train.reward_model import RewardModel
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import shard
from prefloop.train.update import Update

PAIRS, STEPS, MIDDLE = 25, 20, 10
SHORT = (("epochs", 1),)
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


def with_views(found: list[TokenizedPair], names: tuple[str, ...]) -> list[TokenizedPair]:
    """The pairs with what a loss reads beside their two sides: the pair's own tokens, under longer prompts."""
    return [
        dataclasses.replace(
            pair,
            views=tuple(
                TokenizedView(n, (5 + i, *pair.context), pair.rejected[::-1], None) for i, n in enumerate(names)
            ),
        )
        for pair in found
    ]


def with_steps(found: list[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs as Step-DPO makes them: the first step is common to both sides, and context."""
    return [dataclasses.replace(pair, context=(*pair.context, 7, 8, 9 + i)) for i, pair in enumerate(found)]


def as_rollouts(scored: list[TokenizedPair]) -> list[TokenizedPair]:
    """The chosen sides as scored samples of the reference, in groups of three of one prompt."""
    contexts = [pair.context for pair in scored]
    return [
        dataclasses.replace(
            pair,
            context=contexts[i // 3],
            rejected=(),
            reference_rejected=(),
            sampled_chosen=tuple(v - 0.01 * (j % 3) for j, v in enumerate(pair.reference_chosen or ())),
            chosen_score=sum(token % 2 for token in pair.chosen) / len(pair.chosen),
        )
        for i, pair in enumerate(scored)
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    trainer: Any
    loss: Any = dataclasses.field(default_factory=lambda: DPO(beta=0.5))
    lora: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    steps: bool = False

    @property
    def trains_reward_model(self) -> bool:
        return isinstance(self.trainer, RewardModel)


CASES: dict[str, Case] = {
    "dpo": Case(Update()),
    "simpo": Case(Update(), SimPO()),
    "lora": Case(Update(), lora=True),
    "checkpointed": Case(Update(), settings=(("gradient_checkpointing", True), ("layout", "shared"))),
    "noise_joint": Case(NoiseGame(noise_learning_rate=1e-3)),
    "noise_alternating": Case(NoiseGame("alternating", noise_learning_rate=1e-3, noise_steps=2, policy_steps=2)),
    "fast_slow": Case(FastSlow(check_every=3, speed=0.5), lora=True),
    "moving_reference": Case(MovingReference(every=6, share=0.5)),
    "moving_reference_lora": Case(MovingReference(every=2, share=0.5), lora=True, settings=SHORT),
    "srpo": Case(Update(), SRPO(), settings=SHORT),
    "step_dpo": Case(Update(), steps=True, settings=SHORT),
    "ppo": Case(PPO(value_learning_rate=1e-3), RolloutKL(beta=0.1), settings=(("epochs", 2),)),
    "ppo_checkpointed": Case(PPO(), RolloutKL(beta=0.1), settings=(*SHORT, ("gradient_checkpointing", True))),
    "grpo": Case(GroupAdvantage(), RolloutKL(beta=0.1, place="loss", estimator="k3"), settings=SHORT),
    "rloo": Case(GroupAdvantage("leave_one_out", scale=False, ratio="sequence"), RolloutKL(beta=0.1), settings=SHORT),
    "reward": Case(RewardModel(center=0.01), settings=SHORT),
    "reward_lora": Case(RewardModel(), lora=True, settings=SHORT),
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
    trained, checkpoint = trainable(case, settings, policy, team)
    shard(trained, team, settings, checkpoint, causal=not case.trains_reward_model)
    frozen = open_frozen(str(policy), settings, team)
    mine = with_views(pairs(), views_of(case.loss))
    mine = with_steps(mine) if case.steps else mine
    scored = score_reference(frozen.lm.model, mine, "padded", 200, team if frozen.shared else ALONE)
    scored = as_rollouts(scored) if isinstance(case.loss, RolloutKL) else scored
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


def trainable(case: Case, settings: TrainSettings, policy: Path, team: Team) -> tuple[Any, Any]:
    opened: Any
    if case.trains_reward_model:
        opened = open_reward_model(str(policy), settings, team, seed=4)
        model, lora = opened.model, reward_lora
    else:
        opened = open_trainable(str(policy), settings, team, print)
        model, lora = opened.lm.model, add_lora
    model.requires_grad_(True)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return lora(model, 4, 8.0, targets="all-linear", seed=3) if case.lora else model, opened.checkpoint


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
            stop = stopping_after(MIDDLE) if team.main else lambda: False
            assert not train("simpo", out / "again", policy, team, sharding, stop)
            found[f"{sharding}/again"] = as_json(train("simpo", out / "again", policy, team, sharding))
            found[f"{sharding}/one-then-many"] = as_json(train("dpo", out / "one-then-many", policy, team, sharding))
    (folder / f"found-{team.rank}-of-{team.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
