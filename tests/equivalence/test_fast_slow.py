"""OFS-DPO's race: two DPO runs where the modules do not meet, one deployed adapter, resumed equals uninterrupted."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from prefloop.errors import ConfigError, Interrupted, TrainingDiverged
from prefloop.losses.dpo import DPO
from prefloop.losses.simpo import SimPO
from prefloop.models.adapters import adapter_parameters, add_lora, add_twin, merge_lora
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import Quiet
from prefloop.rows import StepLog, TokenizedPair
from prefloop.train.fast_slow import MODULES, FastSlow, _Race, objectives
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import make_optimizer, take_steps, train
from tiny import newest, tiny_model

CPU = torch.device("cpu")


def pairs(count: int = 10) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 90, (size,), generator=generator).tolist())

    return [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(count)]


def job(folder: Path, checkpointing: bool = False, **settings: object) -> Job:
    model = tiny_model("llama")
    scored = score_reference(model, pairs(), "padded", 200)
    if checkpointing:
        checkpoint_activations(model)
    wanted = {"learning_rate": 1e-2, "pairs_per_step": 3, "epochs": 2, "layout": "padded", "warmup": 0.0, **settings}
    return Job(
        model=add_lora(model, 4, 8.0, seed=3),
        pairs=scored,
        loss=DPO(),
        settings=TrainSettings.model_validate(wanted),
        layout="padded",
        seed=7,
        state_folder=folder,
        reference=None,
        starts_at_reference=True,
    )


def adapter(one: Job, module: str = MODULES[0]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in adapter_parameters(one.model, module).values()])


def run(game: FastSlow, one: Job) -> tuple[list[StepLog], torch.Tensor]:
    curve = game(one, Quiet(), lambda: False)
    return curve, adapter(one)


def logged(curve: list[StepLog], name: str) -> list[float]:
    return [{e.name: e.value for e in row.extra}[name] for row in curve]


def common(curve: list[StepLog]) -> list[StepLog]:
    return [dataclasses.replace(row, extra=()) for row in curve]


def race(game: FastSlow, one: Job) -> _Race:
    add_twin(one.model, MODULES[1])
    return _Race(game, one, one.model)


def test_without_the_chase_the_modules_are_two_dpo_runs(tmp_path):
    one, other = job(tmp_path / "a"), job(tmp_path / "b", learning_rate=0.3 * 1e-2)
    fast, slow = train(one, Quiet(), lambda: False), train(other, Quiet(), lambda: False)
    both = job(tmp_path / "c")
    game = FastSlow(speed=0.3, chase=0.0, check_every=100)
    runners = race(game, both)
    curve = take_steps(both, game.players(both, both.model), runners.accumulate, Quiet(), lambda: False)
    assert common(curve) == common(fast)
    assert logged(curve, "loss_slow") == pytest.approx([row.loss for row in slow], abs=1e-6)
    assert adapter(both).equal(adapter(one))
    torch.testing.assert_close(adapter(both, MODULES[1]), adapter(other), rtol=1e-4, atol=1e-6)


def test_equal_modules_of_equal_speed_stay_equal_and_chase_at_ln_2(tmp_path):
    one = job(tmp_path, epochs=4)
    game = FastSlow(speed=1.0, chase=0.5, check_every=3)
    runners = race(game, one)
    curve = take_steps(one, game.players(one, one.model), runners.accumulate, Quiet(), lambda: False)
    torch.testing.assert_close(adapter(one, MODULES[1]), adapter(one), rtol=1e-3, atol=1e-5)
    assert logged(curve, "chase") == pytest.approx([math.log(2)] * len(curve), abs=1e-4)
    assert adapter(one).abs().max() > 0.05
    plain = job(tmp_path / "plain", epochs=4)
    train(plain, Quiet(), lambda: False)
    assert not torch.allclose(adapter(one), adapter(plain), atol=1e-3)  # the push is there


def test_gradients_are_those_of_either_objective_alone(tmp_path):
    one = job(tmp_path)
    game = FastSlow(chase=0.5)
    runners = race(game, one)
    disturb(one, MODULES[1])
    runners.accumulate(1, [[0], [1, 2]])
    modules = [adapter_parameters(one.model, module) for module in MODULES]
    found = [{name: p.grad.clone() for name, p in module.items()} for module in modules]
    fast, slow = (runners._score(module, [0, 1, 2]) for module in MODULES)
    expected = objectives(game, one.loss, fast, slow)
    for parameters, gradients, objective in zip(modules, found, (expected.fast, expected.slow), strict=True):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        objective.mean().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    assert all(gradient.any() for name, gradient in found[0].items() if "lora_B" in name)


def disturb(one: Job, module: str, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter_parameters(one.model, module).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_recomputed_activations_come_from_the_module_whose_gradient_it_is(tmp_path):
    game = FastSlow(chase=0.5, speed=0.5)
    plain, weights = run(game, job(tmp_path / "a", learning_rate=3e-2))
    again, recomputed = run(game, job(tmp_path / "b", checkpointing=True, learning_rate=3e-2))
    assert [row.loss for row in again] == pytest.approx([row.loss for row in plain], rel=1e-4)
    torch.testing.assert_close(recomputed, weights, rtol=1e-3, atol=1e-4)


def test_the_microbatch_budget_does_not_change_the_result(tmp_path):
    game = FastSlow(chase=0.5, check_every=2)
    whole, _ = run(game, job(tmp_path / "a", tokens_per_microbatch=10**6))
    split, _ = run(game, job(tmp_path / "b", tokens_per_microbatch=1))
    for name in ("loss_fast", "loss_slow", "chase", "margin_slow", "fast_module"):
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=1e-3, abs=1e-5)


def better_second(one: Job, folder: Path) -> _Race:
    """A race whose second module has been trained already, and the first has not."""
    trained = job(folder, epochs=6)
    train(trained, Quiet(), lambda: False)
    runners = race(FastSlow(speed=1e-6, chase=0.0, check_every=2), one)
    values = adapter_parameters(trained.model, MODULES[0]).values()
    with torch.no_grad():
        for parameter, value in zip(adapter_parameters(one.model, MODULES[1]).values(), values, strict=True):
            parameter.copy_(value)
    return runners


def test_a_better_module_takes_the_fast_role_at_the_next_check(tmp_path):
    one = job(tmp_path / "a", learning_rate=1e-6)
    runners = better_second(one, tmp_path / "b")
    players = runners.game.players(one, one.model)
    curve = take_steps(one, players, runners.accumulate, Quiet(), lambda: False, runners.carried)
    assert logged(curve, "fast_module") == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [row.loss for row in curve] == logged(curve, "loss_fast")
    assert logged(curve, "loss_fast")[1] == pytest.approx(math.log(2), abs=1e-3)
    assert logged(curve, "loss_slow")[2] == pytest.approx(math.log(2), abs=1e-3)
    assert max(logged(curve, "loss_fast")[2:]) < 0.6
    assert [player.scale for player in players] == [1.0, 1e-6]  # learning rates stay with the modules


def test_the_window_forgets_at_every_check_and_ties_keep_the_roles(tmp_path):
    one = job(tmp_path)
    runners = race(FastSlow(check_every=2), one)
    window = runners.carried.tensors["window"]
    for sums, expected in (([5.0, 5.0], 0), ([5.0, 4.0], 1), ([5.0, 4.0], 1), ([4.0, 4.0], 1), ([3.0, 4.0], 0)):
        window.copy_(torch.tensor(sums))
        runners._check_roles()
        assert (runners.fast, window.tolist()) == (expected, [0.0, 0.0])


@pytest.mark.parametrize("fast", [0, 1])
def test_the_module_with_the_fast_role_is_the_only_adapter_that_is_left(fast, tmp_path, monkeypatch):
    seen = {}

    def swapped(one, players, accumulate, progress, stop, carried):
        curve = take_steps(one, players, accumulate, progress, stop, carried)
        carried.notes["fast_module"] = float(fast)
        seen.update({module: adapter(one, module) for module in MODULES})
        return curve

    monkeypatch.setattr("prefloop.train.fast_slow.take_steps", swapped)
    one = job(tmp_path, epochs=1)
    run(FastSlow(speed=0.5, check_every=100), one)
    assert not seen[MODULES[0]].equal(seen[MODULES[1]])
    assert adapter(one).equal(seen[MODULES[fast]])
    assert list(one.model.peft_config) == ["default"]
    assert one.model.active_adapter == "default"
    ids = torch.arange(4, 24)[None]
    expected = one.model(ids).logits
    merged = merge_lora(one.model)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize(("stop_after", "every"), [(1, 100), (3, 2), (4, 2), (5, 100), (7, 1)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(stop_after, every, tmp_path):
    game = FastSlow(speed=0.2, chase=0.5, check_every=2)
    curve, weights = run(game, job(tmp_path / "a", learning_rate=0.03))
    assert logged(curve, "fast_module") == [0, 0, 1, 1, 1, 1, 0, 0]  # the faster one overshoots for a while
    calls = itertools.count(1)
    stopped = job(tmp_path / "b", checkpoint_every=every, learning_rate=0.03)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 8"):
        game(stopped, Quiet(), lambda: next(calls) == stop_after)
    resumed, again = run(game, job(tmp_path / "b", checkpoint_every=every, learning_rate=0.03))
    assert resumed == curve
    assert again.equal(weights)


def test_the_training_state_holds_both_modules_the_role_and_the_window(tmp_path):
    calls = itertools.count(1)
    with pytest.raises(Interrupted):
        FastSlow(check_every=3)(job(tmp_path), Quiet(), lambda: next(calls) == 2)
    state = newest(tmp_path, CPU)
    assert state.notes == {"fast_module": 0.0}
    assert state.weights["window"].min() > 0
    for module in MODULES:
        names = [name for name in state.weights if f".{module}." in name]
        assert len(names) == 2 * 2 * 7
        assert {f"{name}.exp_avg_sq" for name in names} <= set(state.moments)


def test_the_window_goes_on_after_a_stop(tmp_path):
    windows = []
    for name, stops in (("a", (3,)), ("b", (1, 2, 3))):
        done = itertools.count(1)
        for stop_after in stops:
            with pytest.raises(Interrupted):
                FastSlow()(job(tmp_path / name), Quiet(), lambda done=done, last=stop_after: next(done) == last)
        windows.append(newest(tmp_path / name, CPU).weights["window"].tolist())
    assert windows[0] == windows[1]
    assert windows[0][0] < 9 * math.log(2) + 0.5


def test_a_policy_without_adapter_and_a_loss_without_reference_are_refused(tmp_path):
    one = job(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.lora: not set.*train\.lora\.rank"):
        run(FastSlow(), dataclasses.replace(one, model=tiny_model("llama")))
    with pytest.raises(ConfigError, match="fast_slow measures both modules against the reference, but SimPO has none"):
        run(FastSlow(), dataclasses.replace(one, loss=SimPO()))


def test_a_reference_of_another_model_is_noticed_at_step_0(tmp_path):
    one = job(tmp_path)
    other = score_reference(tiny_model("llama", seed=1), pairs(), "padded", 200)
    with pytest.raises(TrainingDiverged, match="step 0: policy and reference are the same model"):
        run(FastSlow(), dataclasses.replace(one, pairs=other))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": 0.0}, r"trainer\.speed: must be in \(0, 1\]"),
        ({"speed": 1.5}, r"trainer\.speed: must be in \(0, 1\]"),
        ({"chase": -0.1}, r"trainer\.chase: must be a number ≥ 0"),
        ({"chase": math.nan}, r"trainer\.chase: must be a number ≥ 0"),
        ({"check_every": 0}, r"trainer\.check_every: must be ≥ 1"),
        ({"clamp": 0.0}, r"trainer\.clamp: must be > 0"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        FastSlow(**fields)


def test_the_second_modules_learning_rate_is_a_multiple_of_the_firsts(tmp_path):
    one = job(tmp_path)
    add_twin(one.model, MODULES[1])
    first, second = FastSlow(speed=0.25).players(one, one.model)
    assert (first.scale, second.scale) == (1.0, 0.25)
    assert not set(first.named) & set(second.named)
    assert len(make_optimizer(second.named, one.settings).param_groups) == 1
