"""DNPO's game: without noise it is DPO, each loss moves one player, resumed equals uninterrupted."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from prefloop.errors import ConfigError, Interrupted, TrainingDiverged
from prefloop.losses.dpo import DPO
from prefloop.losses.simpo import SimPO
from prefloop.models import causal_lm
from prefloop.protocols import Quiet
from prefloop.rows import PolicyRef, StepLog, TokenizedPair
from prefloop.train.job import Job
from prefloop.train.noise_game import NoiseGame, _Round, model_loss
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import train
from tiny import newest, save_tiny_policy

LOUD = {"noise_learning_rate": 0.05, "penalty": 0.01}
GAMES = [
    NoiseGame(**LOUD),
    NoiseGame(**LOUD, rank=3),
    NoiseGame(**LOUD, schedule="alternating", noise_steps=2, policy_steps=2),
]
NAMES = ["joint", "low-rank", "alternating"]


def pairs(count: int = 10) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 250, (size,), generator=generator).tolist())

    return [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(count)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicyRef:
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"))
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), -1)


def job(policy: PolicyRef, folder: Path, **settings: object) -> Job:
    model = causal_lm.load(policy.path, cache=False).model
    wanted = {"learning_rate": 3e-3, "pairs_per_step": 3, "epochs": 2, "layout": "padded", "warmup": 0.0, **settings}
    return Job(
        model=model.requires_grad_(True),
        pairs=score_reference(model, pairs(), "padded", 200),
        loss=DPO(),
        settings=TrainSettings.model_validate(wanted),
        layout="padded",
        seed=7,
        state_folder=folder,
        reference=policy,
        starts_at_reference=True,
    )


def run(game: NoiseGame, one: Job) -> tuple[list[StepLog], torch.Tensor]:
    curve = game(one, Quiet(), lambda: False)
    return curve, torch.cat([p.detach().flatten() for p in one.model.parameters()])


def logged(curve: list[StepLog], name: str) -> list[float]:
    return [{e.name: e.value for e in row.extra}[name] for row in curve]


@pytest.mark.parametrize(
    "game",
    [
        NoiseGame(noise=False),
        NoiseGame(bound=0.0),
        NoiseGame(penalty=math.inf, schedule="alternating"),
        NoiseGame(initial=0.0, noise_learning_rate=0.0),
        NoiseGame(initial=0.0, noise_learning_rate=0.0, rank=2, schedule="alternating"),
    ],
    ids=["off", "bound 0", "penalty infinite", "learning rate 0", "learning rate 0, alternating"],
)
def test_without_noise_the_trajectory_is_that_of_dpo_to_the_bit(game, policy, tmp_path):
    one = job(policy, tmp_path / "a")
    plain = train(one, Quiet(), lambda: False)
    weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    curve, again = run(game, job(policy, tmp_path / "b"))
    assert common(curve) == common(plain)
    assert again.equal(weights)


def common(curve):
    """The columns that both log."""
    return [dataclasses.replace(row, extra=()) for row in curve]


@pytest.mark.parametrize(
    "quiet", [NoiseGame(bound=1e-14), NoiseGame(penalty=1e9, initial=1e-7, noise_learning_rate=1e-7)]
)
def test_as_the_noise_vanishes_the_trajectory_becomes_that_of_dpo(quiet, policy, tmp_path):
    plain = train(job(policy, tmp_path / "a"), Quiet(), lambda: False)
    curve, _ = run(quiet, job(policy, tmp_path / "b"))
    assert [row.loss for row in curve] == pytest.approx([row.loss for row in plain], abs=1e-5)
    loud, _ = run(GAMES[0], job(policy, tmp_path / "c"))
    assert [row.loss for row in loud] != pytest.approx([row.loss for row in plain], abs=1e-3)


def test_a_large_penalty_brings_the_noise_down(policy, tmp_path):
    strong = NoiseGame(penalty=1e6, noise_learning_rate=0.01, initial=0.2)
    curve, _ = run(strong, job(policy, tmp_path, epochs=8, schedule="linear"))
    sizes = logged(curve, "noise_size")
    assert sizes[0] == pytest.approx(0.2, abs=0.01)
    assert sizes[-1] < 0.07


@pytest.mark.parametrize("game", GAMES, ids=NAMES)
def test_the_noise_grows_up_to_its_bound_and_revives_the_gradient(game, policy, tmp_path):
    bounded = dataclasses.replace(game, bound=0.25, noise_learning_rate=0.3)
    curve, _ = run(bounded, job(policy, tmp_path, epochs=10, schedule="constant"))
    sizes = logged(curve, "noise_size")
    assert 0.45 < max(sizes) <= 0.5
    before, after = logged(curve, "saturation_before"), logged(curve, "saturation_after")
    assert [row.saturation for row in curve] == pytest.approx(before)
    assert before[-1] < 0.4
    assert sum(after[-10:]) > sum(before[-10:])
    assert sum(logged(curve, "noise_shift")[-10:]) < 0


def test_without_a_bound_or_with_a_loss_that_is_not_bounded_numbers_stay_finite(policy, tmp_path):
    wild = NoiseGame(bound=None, penalty=0.0, noise_learning_rate=1.0)
    curve, weights = run(wild, job(policy, tmp_path / "a"))
    assert max(logged(curve, "noise_size")) > 1
    assert weights.isfinite().all()
    curve, weights = run(dataclasses.replace(wild, bound=1.0), job(policy, tmp_path / "b"))
    assert max(logged(curve, "noise_size")) <= 1
    assert weights.isfinite().all()


def game_at_step_0(game: NoiseGame, one: Job) -> _Round:
    reference = causal_lm.load(one.reference.path).model
    head = game.head_for(reference, one.seed)
    return _Round(game, one, reference, head, game.players(one, head)[1])


def gradients(parameters) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def test_joint_gradients_are_those_of_either_loss_alone(policy, tmp_path):
    one = job(policy, tmp_path)
    game = game_at_step_0(NoiseGame(**LOUD), one)
    game.accumulate(0, [[0, 1, 2]])
    policy_gradient = gradients(one.model.parameters())
    noise_gradient = gradients(game.head.parameters())
    one.model.zero_grad()
    game.head.zero_grad()

    logps = game._score([0, 1, 2])
    noisy = game._noisy_side([0, 1, 2], logps, (0, 0))
    reference = dataclasses.replace(logps, reference_rejected=noisy.logps)
    loss = DPO()(reference).loss.mean()
    # The policy descends and the noise ascends the same function.
    for found, expected in zip(
        policy_gradient, torch.autograd.grad(loss, list(one.model.parameters()), retain_graph=True), strict=True
    ):
        torch.testing.assert_close(found, expected)
    ascent = -loss + LOUD["penalty"] * noisy.variance.mean()
    for found, expected in zip(noise_gradient, torch.autograd.grad(ascent, list(game.head.parameters())), strict=True):
        torch.testing.assert_close(found, expected)


def test_without_the_stop_gradient_the_one_pass_objective_is_its_penalty(policy, tmp_path):
    """Objective 10 with the prime read as the same noise: both sums cancel, and α·mean σ² is left. The trap."""
    one = job(policy, tmp_path)
    game = game_at_step_0(NoiseGame(**LOUD), one)
    logps = game._score([0, 1, 2])
    noisy = game._noisy_side([0, 1, 2], logps, (0, 0))
    loss = DPO()(dataclasses.replace(logps, reference_rejected=noisy.logps)).loss
    penalty = LOUD["penalty"] * noisy.variance.mean()
    naive = loss.mean() - loss.mean() + penalty
    assert naive.item() == penalty.item()
    players = [*one.model.parameters(), *game.head.parameters()]
    found = torch.autograd.grad(naive, players, allow_unused=True, retain_graph=True)
    alone = torch.autograd.grad(penalty, players, allow_unused=True, retain_graph=True)
    for gradient, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)
    # The two losses that are played have the same value and do move both.
    joint = model_loss(DPO(), logps, noisy.logps).loss.mean() + game._noise_total(logps, noisy) / 3
    assert joint.item() == pytest.approx(penalty.item(), abs=1e-6)
    moved = torch.autograd.grad(joint, players)
    assert all(not torch.allclose(gradient, expected) for gradient, expected in zip(moved, found, strict=True))


@pytest.mark.parametrize("game", GAMES, ids=NAMES)
def test_the_noise_reaches_the_references_rejected_side_and_nothing_else(game, policy, tmp_path):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy(DPO):
        def __call__(self, logps):
            seen.append(logps)
            return super().__call__(logps)

    one = dataclasses.replace(job(policy, tmp_path), loss=Spy())
    played = game_at_step_0(dataclasses.replace(game, initial=0.5), one)
    played.accumulate(1, [[0, 1, 2]])
    clean = played._score([0, 1, 2])
    changed = [
        logps for logps in seen if not logps.reference_rejected.token_logps.equal(clean.reference_rejected.token_logps)
    ]
    assert changed
    for logps in seen:
        for name in ("policy_chosen", "policy_rejected", "reference_chosen"):
            assert getattr(logps, name).token_logps.equal(getattr(clean, name).token_logps), name


def test_alternating_moves_one_player_at_a_time(policy, tmp_path):
    one = job(policy, tmp_path)
    game = game_at_step_0(NoiseGame(**LOUD, schedule="alternating", noise_steps=2, policy_steps=2), one)
    weights, noise = one.model.state_dict(), game.head.bias.detach().clone()
    before = {name: value.clone() for name, value in weights.items()}
    game._move_noise(0, 0, [[0], [1, 2]])
    assert not game.head.bias.equal(noise)
    assert all(p.grad is None for p in one.model.parameters())
    assert all(value.equal(before[name]) for name, value in one.model.state_dict().items())

    noise = game.head.bias.detach().clone()
    game.accumulate(1, [[0], [1, 2]])  # step 1 of every two: the noise stands still
    assert game.head.bias.equal(noise)
    assert all(p.grad is None for p in game.head.parameters())
    assert any(p.grad.any() for p in one.model.parameters())
    game.accumulate(2, [[0], [1, 2]])
    assert not game.head.bias.equal(noise)


def test_one_small_step_of_the_noise_raises_the_policys_loss_at_the_same_draw(policy, tmp_path):
    one = job(policy, tmp_path)
    game = game_at_step_0(NoiseGame(penalty=0.0), one)
    everything = list(range(10))
    with torch.no_grad():
        logps = game._score(everything)

    def loss() -> torch.Tensor:
        noisy = game._noisy_side(everything, logps, (0, 0))
        return DPO()(dataclasses.replace(logps, reference_rejected=noisy.logps)).loss.mean()

    start = loss()
    start.backward()
    with torch.no_grad():
        for parameter in game.head.parameters():
            parameter.add_(1e-2 * parameter.grad / parameter.grad.norm())
    assert loss().item() > start.item()


@pytest.mark.parametrize("game", GAMES, ids=NAMES)
def test_the_microbatch_budget_does_not_change_the_result(game, policy, tmp_path):
    whole, _ = run(game, job(policy, tmp_path / "a", tokens_per_microbatch=10**6))
    split, _ = run(game, job(policy, tmp_path / "b", tokens_per_microbatch=1))
    assert [row.loss for row in split] == pytest.approx([row.loss for row in whole], rel=1e-4)
    assert logged(split, "noise_size") == pytest.approx(logged(whole, "noise_size"), rel=1e-3)


@pytest.mark.parametrize("game", GAMES, ids=NAMES)
@pytest.mark.parametrize(("stop_after", "every"), [(1, 100), (4, 2), (5, 2)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(game, stop_after, every, policy, tmp_path):
    curve, weights = run(game, job(policy, tmp_path / "a"))
    calls = itertools.count(1)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 8"):
        game(job(policy, tmp_path / "b", checkpoint_every=every), Quiet(), lambda: next(calls) == stop_after)
    resumed, again = run(game, job(policy, tmp_path / "b", checkpoint_every=every))
    assert resumed == curve
    assert again.equal(weights)


def test_the_training_state_holds_the_noise_head_and_its_moments(policy, tmp_path):
    with pytest.raises(Interrupted):
        GAMES[1](job(policy, tmp_path), Quiet(), lambda: True)
    state = newest(tmp_path, torch.device("cpu"))
    names = {"noise.weight", "noise.bias", "noise.down"}
    assert names <= set(state.weights)
    assert {f"{name}.exp_avg_sq" for name in names} <= set(state.moments)


def test_a_reference_of_another_model_is_noticed_at_step_0(policy, tmp_path):
    one = job(policy, tmp_path)
    shifted = [dataclasses.replace(p, reference_chosen=tuple(v - 0.1 for v in p.reference_chosen)) for p in one.pairs]
    with pytest.raises(TrainingDiverged, match="step 0: policy and reference are the same model"):
        run(GAMES[0], dataclasses.replace(one, pairs=shifted))


def test_divergence_is_named(policy, tmp_path):
    with pytest.raises(TrainingDiverged, match="step 2"):
        run(GAMES[0], job(policy, tmp_path, learning_rate=1e30, max_grad_norm=None))


def test_a_loss_without_reference_is_refused(policy, tmp_path):
    one = job(policy, tmp_path)
    with pytest.raises(ConfigError, match="noise_game puts noise on the reference, but SimPO has none"):
        run(GAMES[0], dataclasses.replace(one, loss=SimPO()))
    with pytest.raises(ConfigError, match="has none"):
        run(GAMES[0], dataclasses.replace(one, reference=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "both"}, "schedule: must be joint or alternating"),
        ({"noise_learning_rate": -1.0}, "noise_learning_rate: must be a number ≥ 0"),
        ({"noise_learning_rate": math.inf}, "noise_learning_rate: must be a number ≥ 0"),
        ({"penalty": -1.0}, "penalty: must be ≥ 0"),
        ({"penalty": math.nan}, "penalty: must be ≥ 0"),
        ({"bound": -1.0}, "bound: must be ≥ 0"),
        ({"initial": -0.1}, "initial: must be a number ≥ 0"),
        ({"rank": 0}, "rank: must be ≥ 1, got 0"),
        ({"schedule": "alternating", "noise_steps": 0}, "noise_steps: must be ≥ 1"),
        ({"schedule": "alternating", "policy_steps": 0}, "policy_steps: must be ≥ 1"),
        ({"noise_steps": 2}, "joint takes a step of both players at once"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        NoiseGame(**fields)
