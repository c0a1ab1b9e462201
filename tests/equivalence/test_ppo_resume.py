"""PPO and group baselines: resumed equals uninterrupted, microbatches change nothing, the value model goes on."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from prefloop.errors import ConfigError, DataError, Interrupted
from prefloop.losses.dpo import DPO
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.models import adapters, causal_lm
from prefloop.models.logps import TokenGroup
from prefloop.models.value_head import FILE, ValueModel, value_model_for
from prefloop.protocols import Quiet
from prefloop.rows import StepLog, TokenizedPair
from prefloop.train import group_advantage, ppo, update
from prefloop.train.group_advantage import GroupAdvantage
from prefloop.train.job import Job
from prefloop.train.ppo import PPO
from prefloop.train.reference import rows_of
from prefloop.train.settings import TrainSettings
from tiny import newest, save_tiny_policy

RULES = [PPO(value_learning_rate=1e-2), GroupAdvantage(), GroupAdvantage("leave_one_out", False, "sequence")]
NAMES = ["ppo", "grpo", "rloo"]


def rollouts(model, count: int = 12) -> list[TokenizedPair]:
    """Groups of three; their stored log-probs are those of `model`, their scores how many of their ids are even."""
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 250, (size,), generator=generator).tolist())

    contexts = [ids(2, 9) for _ in range(count // 3)]
    texts = [(contexts[i // 3], ids(1, 12)) for i in range(count)]
    with torch.no_grad():
        from_model = [causal_logps(model, context, tokens) for context, tokens in texts]
    return [
        TokenizedPair(
            f"r{i}",
            context,
            tokens,
            (),
            old,
            (),
            None,
            2.0 if i == 4 else 1.0,
            chosen_score=sum(t % 2 == 0 for t in tokens) / len(tokens),
            sampled_chosen=old,
        )
        for i, ((context, tokens), old) in enumerate(zip(texts, from_model, strict=True))
    ]


def causal_logps(model, context: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[float, ...]:
    from prefloop.models.logps import completion_logps  # noqa: PLC0415  beside its one use

    return rows_of(completion_logps(model, [TokenGroup(context, (tokens,))], layout="padded"))[0]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def job(policy: Path, folder: Path, **settings: object) -> Job:
    model = causal_lm.load(str(policy), cache=False).model
    wanted = {"learning_rate": 3e-3, "pairs_per_step": 5, "epochs": 2, "layout": "padded", "warmup": 0.0, **settings}
    return Job(
        model=model.requires_grad_(True),
        pairs=rollouts(model),
        loss=RolloutKL(beta=0.1),
        settings=TrainSettings.model_validate(wanted),
        layout="padded",
        seed=7,
        state_folder=folder / ".state",
        reference=None,
        starts_at_reference=False,
    )


def run(rule: PPO | GroupAdvantage, one: Job) -> tuple[list[StepLog], torch.Tensor]:
    one.state_folder.parent.mkdir(parents=True, exist_ok=True)
    curve = rule(one, Quiet(), lambda: False)
    return curve, torch.cat([p.detach().flatten() for p in one.model.parameters()])


def logged(curve: list[StepLog], name: str) -> list[float]:
    return [{e.name: e.value for e in row.extra}[name] for row in curve]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize(("stop_after", "every"), [(1, 100), (4, 2)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(rule, stop_after, every, policy, tmp_path):
    curve, weights = run(rule, job(policy, tmp_path / "a"))
    calls = itertools.count(1)
    (tmp_path / "b").mkdir()
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 6"):
        rule(job(policy, tmp_path / "b", checkpoint_every=every), Quiet(), lambda: next(calls) == stop_after)
    resumed, again = run(rule, job(policy, tmp_path / "b", checkpoint_every=every))
    assert resumed == curve
    assert again.equal(weights)
    if isinstance(rule, PPO):
        assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_memory_probe_of_a_gpu_computes_what_a_step_does_and_moves_nothing(rule, policy, tmp_path, monkeypatch):
    _, weights = run(rule, job(policy, tmp_path / "a"))
    computed = []

    def probed(one, players, accumulate, progress, stop, probe):
        plan = update.plan_of(one)
        update.probe_memory(one, plan, lambda batch: computed.append(probe(batch).mean("loss", len(batch[0]))))
        return update.take_steps(one, players, accumulate, progress, stop, probe=probe)

    for module in (ppo, group_advantage):
        monkeypatch.setattr(module, "take_steps", probed)
    _, again = run(rule, job(policy, tmp_path / "b"))
    assert again.equal(weights)
    assert len(computed) == 1
    assert math.isfinite(computed[0])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_microbatch_budget_does_not_change_the_result(rule, policy, tmp_path):
    whole, _ = run(rule, job(policy, tmp_path / "a", tokens_per_microbatch=10**6))
    split, _ = run(rule, job(policy, tmp_path / "b", tokens_per_microbatch=1))
    assert [row.loss for row in split] == pytest.approx([row.loss for row in whole], rel=1e-3, abs=1e-5)
    for name in ("ratio", "clipped", "kl_old", "kl_reference"):
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_first_steps_ratio_is_one_and_training_makes_good_rollouts_likelier(rule, policy, tmp_path):
    one = job(policy, tmp_path, epochs=6)
    before = [sum(p.sampled_chosen) for p in one.pairs]
    curve, _ = run(rule, one)
    assert logged(curve, "ratio")[0] == pytest.approx(1, abs=1e-5)
    assert logged(curve, "clipped")[0] == 0
    assert logged(curve, "kl_old")[-1] > 1e-4
    with torch.no_grad():
        after = [sum(causal_logps(one.model, p.context, p.chosen)) for p in one.pairs]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    pairs = [(i, i + j) for i in range(0, 12, 3) for j in (1, 2)]
    told_apart = [(i, j) for i, j in pairs if abs(one.pairs[i].chosen_score - one.pairs[j].chosen_score) > 0.2]
    right = [(gains[i] - gains[j]) * (one.pairs[i].chosen_score - one.pairs[j].chosen_score) > 0 for i, j in told_apart]
    assert sum(right) > len(right) / 2


def test_the_value_model_learns_and_the_next_round_goes_on_with_it(policy, tmp_path):
    one = job(policy, tmp_path / "round", epochs=10, schedule="constant")
    curve, _ = run(PPO(value_learning_rate=1e-2, value_clip=None), one)
    losses = logged(curve, "value_loss")
    assert losses[-1] < losses[0] / 2
    causal_lm.export(one.model, causal_lm.load_tokenizer(policy), tmp_path / "round", "")
    exported = causal_lm.load(str(tmp_path / "round"), cache=False).model
    value, found = value_model_for(exported, "cpu")
    assert found
    group = [TokenGroup(one.pairs[0].context, (one.pairs[0].chosen,))]
    with torch.no_grad():
        assert value(group).abs().max() > 0.05
        assert not ValueModel(exported)(group).any()
    (tmp_path / "round" / FILE).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="not a value model that can be read"):
        value_model_for(exported, "cpu")


def test_the_training_state_holds_the_value_model_and_its_moments(policy, tmp_path):
    with pytest.raises(Interrupted):
        RULES[0](job(policy, tmp_path), Quiet(), lambda: True)
    state = newest(tmp_path / ".state", torch.device("cpu"))
    assert {"value.head.weight", "value.decoder.norm.weight"} <= set(state.weights)
    assert "value.head.weight.exp_avg_sq" in state.moments


def test_an_adapter_is_trained_and_the_value_model_is_the_bases(policy, tmp_path):
    one = job(policy, tmp_path)
    adapted = adapters.add_lora(causal_lm.load(str(policy), cache=False).model, rank=2, alpha=4.0)
    curve, _ = run(RULES[0], Job(**{**vars(one), "model": adapted}))
    assert logged(curve, "ratio")[0] == pytest.approx(1, abs=1e-5)
    assert logged(curve, "kl_old")[-1] > 0
    assert (tmp_path / FILE).is_file()


def test_another_loss_is_refused(policy, tmp_path):
    one = job(policy, tmp_path)
    for rule in RULES:
        with pytest.raises(ConfigError, match=r"set loss\.kind=rollout_kl"):
            run(rule, Job(**{**vars(one), "loss": DPO()}))
