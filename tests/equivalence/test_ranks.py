"""Several ranks are one: the same curve on one process and on two, resumed from one number of ranks by another.

`rank_cases.py` is what each rank runs. Here two ranks on gloo; four, and every case in every sharding, are marked slow.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import rank_cases
from prefloop.components import build_parts
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.team import ALONE, Team
from prefloop.together import check_team
from prefloop.train.plan import PairIndex, Plan
from prefloop.train.sharding import counts, divisor, require_divisible, rows_of, share_of
from rank_launch import found_by, start_ranks
from tiny import byte_tokenizer, tiny_model


def start(folder: Path, ranks: int, cases: dict[str, tuple[str, ...]], local: int | None = None) -> dict[str, Any]:
    """Run `cases`, by sharding, on so many ranks, `local` of them as if on one machine; return what rank 0 found."""
    start_ranks("rank_cases.py", ranks, str(folder), json.dumps(cases), local=local)
    found = found_by(folder, ranks)
    assert all(each == found[0] for each in found)  # every rank has the same curve
    return found[0]


def alone(name: str, folder: Path) -> list[dict[str, Any]]:
    return rank_cases.as_json(rank_cases.train(name, folder, folder.parent / "policy"))


def saved_policy(folder: Path) -> Path:
    tiny_model("llama", 96).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs) >= 4
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert one["learning_rate"] == other["learning_rate"]
        for name in ("grad_norm", "margin", "chosen_logp", "rejected_logp", "chosen_reward", "saturation"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=10 * tolerance), name
        for mine, its in zip(one["extra"], other["extra"], strict=True):
            assert mine["name"] == its["name"]
            assert mine["value"] == pytest.approx(its["value"], rel=1e-4, abs=10 * tolerance), mine["name"]


def check(folder: Path, ranks: int, cases: dict[str, tuple[str, ...]], local: int | None = None) -> None:
    policy = saved_policy(folder / "policy")
    for sharding in cases:
        rank_cases.train(
            "dpo", folder / sharding / "one-then-many", policy, stop=rank_cases.stopping_after(rank_cases.MIDDLE)
        )
    found = start(folder, ranks, cases, local)
    ours = {name: alone(name, folder / f"alone-{name}") for name in {"dpo", *(n for c in cases.values() for n in c)}}
    for sharding, names in cases.items():
        if "simpo" in names:
            assert found[f"{sharding}/again"] == found[f"{sharding}/simpo"]  # stopped and gone on with: to the bit
        for name in names:
            assert_same(ours[name], found[f"{sharding}/{name}"])
        assert_same(ours["dpo"], found[f"{sharding}/one-then-many"])
        assert_same(
            ours["dpo"], rank_cases.as_json(rank_cases.train("dpo", folder / sharding / "many-then-one", policy))
        )


OTHERS = ("srpo", "step_dpo", "ppo", "ppo_checkpointed", "grpo", "rloo")
VARIANTS = (*OTHERS, "reward", "reward_lora", "moving_reference_lora")
"""Of what trains or reads other models than the policy, a few steps."""


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    cases = {
        "replicate": ("noise_alternating", "fast_slow"),
        "full": ("simpo", "lora", "checkpointed", *VARIANTS),
    }
    check(tmp_path, 2, cases)


@pytest.mark.slow
def test_four_ranks_are_one_in_every_sharding(tmp_path):
    check(tmp_path, 4, dict.fromkeys(("replicate", "full", "hybrid"), tuple(rank_cases.CASES)), local=2)


def plan(lengths: list[int], per_step: int, budget: int) -> Plan:
    return Plan(PairIndex.of_lengths([(2, n, n, 0) for n in lengths], None), per_step, 1, seed=1, budget=budget)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("count", "per_step", "budget"), [(25, 12, 60), (25, 12, 10_000), (9, 9, 1), (2, 12, 50)])
def test_shares_are_the_step_each_pair_once(ranks, count, per_step, budget):
    steps = plan([1 + (7 * i) % 20 for i in range(count)], per_step, budget)
    for step in range(len(steps)):
        shares = [share_of(steps, step, Team(rank, ranks)) for rank in range(ranks)]
        own = [row for share in shares for place, batch in enumerate(share) if counts(share, place) for row in batch]
        assert sorted(own) == sorted(row for batch in steps[step] for row in batch)
        assert len({len(share) for share in shares}) == 1  # all ranks run the model equally often
        assert all(batch for share in shares for batch in share)
        assert {tuple(rows_of(share)) for share in shares} == {tuple(rows_of(shares[0]))}
        for share in shares:
            for place, batch in enumerate(share):
                assert divisor(share, place) == (len(own) if counts(share, place) else float("inf"))
                assert len(batch) == 1 or steps.tokens(batch) <= budget


def test_ranks_have_similar_work():
    steps = plan([1 + (7 * i) % 20 for i in range(64)], 64, 10_000)
    work = [sum(map(steps.tokens, share_of(steps, 0, Team(rank, 4)))) for rank in range(4)]
    assert max(work) < 1.15 * sum(work) / 4


def test_an_undivided_step_is_as_it_was():
    steps = plan(list(range(1, 30)), 10, 60)
    assert list(share_of(steps, 0, ALONE)) == steps[0]


def test_a_step_that_cannot_be_split_evenly_is_refused():
    require_divisible(8, Team(0, 4))
    with pytest.raises(ConfigError, match=r"train\.pairs_per_step: 6 is no multiple of 4 ranks; set it to 8"):
        require_divisible(6, Team(0, 4))


def test_a_loss_that_compares_all_pairs_of_a_step_is_refused():
    recipe, _ = read_recipe("kto", ["train.pairs_per_step=8"])
    with pytest.raises(ConfigError, match=r"loss\.kind: kto compares all pairs of a step.* over 2 ranks"):
        check_team(recipe, build_parts(recipe), Team(0, 2))
    check_team(recipe, build_parts(recipe), ALONE)
