"""PPO, RLOO and GRPO against double loops, enumeration, finite differences and TRL's own trainers."""

import copy
import itertools
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import tiny
from prefloop.errors import ConfigError
from prefloop.losses.rollout_kl import RolloutKL
from prefloop.rows import TokenizedPair
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.group_advantage import GroupAdvantage
from prefloop.train.group_advantage import Play as GroupPlay
from prefloop.train.job import Job
from prefloop.train.ppo import PPO, gae, value_loss, whitened
from prefloop.train.rollouts import Rollout, is_clipped, read_rollouts, surrogate
from prefloop.train.settings import TrainSettings


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_double_sum_of_discounted_errors(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    after = [*values.tolist()[1:], 0.0]
    expected = [
        sum(
            (gamma * lam) ** (later - t) * (float(rewards[later]) + gamma * after[later] - float(values[later]))
            for later in range(t, 9)
        )
        for t in range(9)
    ]
    torch.testing.assert_close(gae(rewards, values, gamma, lam), torch.tensor(expected, dtype=torch.float64))


def test_gae_at_lambda_one_is_return_less_value():
    rewards, values = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.3, 0.2, -0.7])
    torch.testing.assert_close(gae(rewards, values, 1.0, 1.0), torch.tensor([1.5, 1.0, 2.0]) - values)


def test_whitening_counts_a_row_as_often_as_it_was_drawn():
    rows = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-3.0]), torch.tensor([0.5, 0.0])]
    weights = [1.0, 3.0, 2.0]
    drawn = np.concatenate([np.tile(row.numpy(), int(w)) for row, w in zip(rows, weights, strict=True)])
    for keep in (False, True):
        found = whitened(rows, weights, keep_mean=keep)
        expected = [(row.numpy() - drawn.mean()) / drawn.std() + keep * drawn.mean() for row in rows]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.numpy() == pytest.approx(theirs, rel=1e-5, abs=1e-6)


RATIOS = torch.tensor([0.5, 0.79, 0.9, 1.1, 1.21, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("advantage", [2.0, -1.5])
def test_the_clipped_surrogates_gradient_is_that_of_finite_differences_and_stops_on_one_side(advantage):
    advantages = torch.full_like(RATIOS, advantage)
    logs = RATIOS.log().requires_grad_(True)
    surrogate(logs.exp(), advantages, 0.2).sum().backward()
    step = 1e-6
    higher, lower = (surrogate((RATIOS.log() + d).exp(), advantages, 0.2) for d in (step, -step))
    torch.testing.assert_close(logs.grad, (higher - lower) / (2 * step), rtol=1e-6, atol=1e-8)
    stops = RATIOS > 1.2 if advantage > 0 else RATIOS < 0.8
    assert torch.equal(logs.grad == 0, stops)
    assert torch.equal(is_clipped(RATIOS, advantages, 0.2), stops)
    assert torch.equal(surrogate(RATIOS, advantages, None), -RATIOS * advantages)


def test_the_value_losss_gradient_is_that_of_finite_differences():
    values = torch.tensor([0.0, 0.1, 0.5, -0.5, 0.15, 3.0], dtype=torch.float64, requires_grad=True)
    before = torch.zeros(6, dtype=torch.float64)
    returns = torch.tensor([1.0, -1.0, 2.0, 2.0, 0.12, 0.1], dtype=torch.float64)
    value_loss(values, before, returns, 0.2).sum().backward()
    step = 1e-6
    moved = [value_loss(values.detach() + d, before, returns, 0.2) for d in (step, -step)]
    torch.testing.assert_close(values.grad, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    # Beyond the clip on the side of the return there is no gradient; away from it there is.
    assert values.grad[2] == 0
    assert values.grad[3] == pytest.approx(-2.5)


def test_kl_estimators_have_the_kl_as_their_mean_and_k2_and_k3_a_gradient_that_holds():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, -0.2, 1.0], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    shares = policy.exp().detach()
    for kind in ("k1", "k3"):
        per_token = RolloutKL(estimator=kind).per_token(policy.detach(), reference)
        assert float((shares * per_token).sum()) == pytest.approx(kl.item())
    mean = {kind: (shares * RolloutKL(estimator=kind).per_token(policy, reference)).sum() for kind in ("k1", "k2")}
    ratio = (policy - policy.detach()).exp()
    mean |= {
        f"{k} corrected": (shares * ratio * RolloutKL(estimator=k).per_token(policy, reference)).sum()
        for k in ("k1", "k3")
    }
    gradients = {kind: torch.autograd.grad(value, logits, retain_graph=True)[0] for kind, value in mean.items()}
    assert float(gradients["k1"].abs().max()) < 1e-12  # why it is refused in the loss
    for kind in ("k2", "k1 corrected", "k3 corrected"):
        torch.testing.assert_close(gradients[kind], exact)
    with pytest.raises(ConfigError, match="k1's gradient has mean 0"):
        RolloutKL(place="loss")


def test_the_kl_of_a_row_is_the_sum_over_its_tokens():
    sides = [CompletionLogps(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]]))] * 2
    reference = CompletionLogps(torch.tensor([[-1.5, -1.0, 0.0]]), sides[0].mask)
    one = torch.ones(1)
    found = RolloutKL(beta=0.5)(PairLogps(*sides, reference, reference, one, one))
    assert float(found.loss) == pytest.approx(0.5 * (0.5 - 1.0))


def rollout(context: tuple[int, ...], score: float, weight: float = 1.0) -> Rollout:
    return Rollout(context, torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.8]), score, weight)


def test_group_advantages_are_those_of_a_loop_over_the_group():
    scores = {(1,): [1.0, 0.0, 0.5, 3.0], (2,): [2.0, 2.0], (3,): [7.0]}
    rollouts = [rollout(context, s) for context, of in scores.items() for s in of]
    rewards = [r.score for r in rollouts]
    _, out = GroupAdvantage(baseline="leave_one_out", scale=False).advantages(rollouts, rewards)
    expected = [
        s - sum(of[:i] + of[i + 1 :]) / (len(of) - 1) if len(of) > 1 else 0.0
        for of in scores.values()
        for i, s in enumerate(of)
    ]
    assert out == pytest.approx(expected)
    plain, standard = GroupAdvantage().advantages(rollouts, rewards)
    first = torch.tensor(scores[(1,)])
    assert standard[:4] == pytest.approx(((first - first.mean()) / (first.std() + 1e-4)).tolist())
    assert plain[:4] == pytest.approx((first - first.mean()).tolist())
    assert standard[4:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", [GroupAdvantage(), GroupAdvantage(baseline="leave_one_out", scale=False)])
def test_a_rollout_of_weight_two_is_two_rollouts(rule):
    merged = [rollout((1,), 1.0, 2.0), rollout((1,), 0.2)]
    apart = [rollout((1,), 1.0), rollout((1,), 1.0), rollout((1,), 0.2)]
    found = rule.advantages(merged, [r.score for r in merged])[1]
    expected = rule.advantages(apart, [r.score for r in apart])[1]
    assert found == pytest.approx([expected[0], expected[2]])


def test_the_reward_of_a_rollout_is_its_score_at_the_end_less_the_kl():
    found = rollout((1,), 3.0).rewards(RolloutKL(beta=0.1))
    torch.testing.assert_close(found, torch.tensor([-0.05, 3.0 + 0.02]))
    torch.testing.assert_close(rollout((1,), 3.0).rewards(RolloutKL(place="none")), torch.tensor([0.0, 3.0]))


def token_rollouts() -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, tiny.BYTE_VOCABULARY) for _ in range(count))

    contexts = [ids(6), ids(3)]
    return [(contexts[i // 3], ids(size), draw.random()) for i, size in enumerate((5, 9, 2, 7, 4, 8))]


def live_logps(model, rows) -> list[torch.Tensor]:
    """By the model's own logits, one row at a time."""
    found = []
    for context, tokens, _ in rows:
        logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        found.append(logits.gather(1, torch.tensor(tokens)[:, None]).squeeze(1))
    return found


def pairs_of(model, reference, rows, shift: float = 0.0) -> list[TokenizedPair]:
    """Rollouts whose stored log-probs are those of `model`, moved by ±`shift` from token to token."""
    with torch.no_grad():
        live, frozen = live_logps(model, rows), live_logps(reference, rows)
    pairs = []
    for number, ((context, tokens, score), now, ref) in enumerate(zip(rows, live, frozen, strict=True)):
        old = tuple(v + shift * (-1) ** i * (1 + i) / len(tokens) for i, v in enumerate(now.tolist()))
        pairs.append(
            TokenizedPair(
                str(number),
                context,
                tokens,
                (),
                tuple(ref.tolist()),
                (),
                None,
                1.0,
                chosen_score=score,
                sampled_chosen=old,
            )
        )
    return pairs


def job_of(model, pairs, loss, folder: Path = Path("unused")) -> Job:
    return Job(model, pairs, loss, TrainSettings(), "padded", 0, folder, None, starts_at_reference=False)


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_ppos_first_step_is_the_policy_gradient_with_ratio_one(lam, tmp_path):
    folder = tiny.save_tiny_policy(tmp_path / "policy")
    model = tiny.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(True)
    pairs = pairs_of(model, tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=1), token_rollouts())
    rule = PPO(lam=lam, whiten_advantages=False)
    job = job_of(model, pairs, RolloutKL(beta=0.3), tmp_path / "run" / ".state")
    rollouts = read_rollouts(job, "ppo")
    from_zero = [r.rewards(job.loss) for r in rollouts]
    expected = [torch.tensor([sum(lam ** (j - i) * float(r[j]) for j in range(i, len(r))) for i in range(len(r))])
                for r in from_zero]  # fmt: skip
    play = play_of(rule, job, rollouts)
    totals = play.accumulate(0, [[0, 1, 2], [3, 4, 5]])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert totals.mean("extra.ratio", 6) == pytest.approx(1.0, abs=1e-5)
    assert totals.mean("extra.clipped", 6) == 0
    model.zero_grad()
    logps = live_logps(model, token_rollouts())
    tokens = sum(map(len, logps))
    (-sum((a * lp).sum() for a, lp in zip(expected, logps, strict=True)) / tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def play_of(rule: PPO, job: Job, rollouts):
    from prefloop.models.value_head import value_model_for  # noqa: PLC0415  beside its one use
    from prefloop.train.ppo import Play  # noqa: PLC0415

    value, found = value_model_for(job.model, "cpu")
    assert not found
    return Play(rule, job, rollouts, value, rule.advantages(job, rollouts, value))


def trl_batch(pairs: list[TokenizedPair], advantages: list[float]) -> dict[str, torch.Tensor]:
    """The inputs of TRL's `_compute_loss`: prompts padded on the left, completions on the right."""

    def padded(rows, left: bool):
        width = max(map(len, rows))
        filled = [[0] * (width - len(r)) + list(r) if left else [*r, *[0] * (width - len(r))] for r in rows]
        masks = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
        return torch.tensor(filled), torch.tensor(masks)

    prompt_ids, prompt_mask = padded([p.context for p in pairs], left=True)
    completion_ids, completion_mask = padded([p.chosen for p in pairs], left=False)
    old = padded([p.sampled_chosen for p in pairs], left=False)[0]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": old,
        "old_logps": (old * completion_mask).sum(1),
        "ref_per_token_logps": padded([p.reference_chosen for p in pairs], left=False)[0],
        "num_items_in_batch": completion_mask.sum(),
    }


def trl_result(kind: str, model, batch, folder: Path, **settings: object):
    """Loss and gradients of TRL's trainer of this kind."""
    with warnings.catch_warnings():
        # TRL's own: it imports and calls deprecated names of transformers, torch and accelerate.
        warnings.simplefilter("ignore")
        import trl  # noqa: PLC0415  the warnings come with the import

        config = getattr(trl, f"{kind}Config")(
            output_dir=str(folder),
            per_device_train_batch_size=6,
            num_generations=3,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            **settings,
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=tiny.byte_tokenizer(chat=False),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set in a training loop, which is not run here
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}


K3 = {"beta": 0.3, "estimator": "k3", "place": "loss"}
PLAIN, CORRECTED = ({"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": c} for c in (False, True))
RLOO = {"baseline": "leave_one_out", "scale": False, "ratio": "sequence"}
CASES = {
    "grpo": ("GRPO", GroupAdvantage(), RolloutKL(**K3), PLAIN),
    "corrected": ("GRPO", GroupAdvantage(), RolloutKL(**K3, corrected=True), CORRECTED),
    "token mean": (
        "GRPO",
        GroupAdvantage(average="token"),
        RolloutKL(place="none"),
        {"loss_type": "bnpo", "beta": 0.0},
    ),
    "rloo": ("RLOO", GroupAdvantage(**RLOO, clip=0.1), RolloutKL(beta=0.3), {"beta": 0.3, "epsilon": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_group_losses_and_gradients_equal_those_of_trl(name, tmp_path):
    kind, rule, loss, settings = CASES[name]
    folder = tmp_path / "policy"  # TRL looks where a model came from
    tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=0).save_pretrained(folder)
    model = tiny.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = pairs_of(model, tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=1), token_rollouts(), shift=0.3)
    job = job_of(model, pairs, loss)
    rollouts = read_rollouts(job, "group_advantage")
    rewards = [float(r.rewards(loss).sum()) for r in rollouts]
    plain, advantages = rule.advantages(rollouts, rewards)
    theirs, expected = trl_result(kind, copy.deepcopy(model), trl_batch(pairs, advantages), tmp_path, **settings)
    totals = GroupPlay(rule, job, rollouts, advantages, plain).accumulate(0, [[0, 1], [2, 3, 4, 5]])
    assert totals.mean("loss", 6) == pytest.approx(float(theirs), abs=5e-6)
    assert 0 < totals.mean("extra.clipped", 6) < 1, "some tokens should be clipped"
    for parameter_name, parameter in model.named_parameters():
        gap = (parameter.grad - expected[parameter_name]).norm() / expected[parameter_name].norm()
        assert gap < 1e-5, (parameter_name, float(gap))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO(clip=0.0), "clip: must be a number > 0 or null"),
        (lambda: PPO(value_weight=math.nan), "value_weight: must be a number > 0, got nan"),
        (lambda: PPO(gamma=0.0), "gamma: must be in"),
        (lambda: PPO(lam=1.1), "lam: must be in"),
        (lambda: GroupAdvantage(clip=-1.0), "clip: must be a number > 0"),
        (lambda: GroupAdvantage(ratio="sequence", average="token"), "average: has no effect"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_is_no_rollout_is_refused():
    model = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY)
    (pair,) = pairs_of(model, model, token_rollouts()[:1])
    for changed, message in (
        ({"chosen_score": None}, "single scored completions"),
        ({"rejected": (5,)}, "single scored completions"),
        ({"sampled_chosen": None}, "needs the sampler's log-prob"),
        ({"reference_chosen": (-1.0,)}, "needs the reference's log-prob"),
    ):
        broken = TokenizedPair(**{**{n: getattr(pair, n) for n in pair.__slots__}, **changed})
        with pytest.raises(ConfigError, match=message):
            read_rollouts(job_of(model, [broken], RolloutKL()), "ppo")
    alone = [rollout((i,), 1.0) for i in range(3)]
    with pytest.raises(ConfigError, match="no prompt has two of them"):
        GroupAdvantage().advantages(alone, list(itertools.repeat(1.0, 3)))
