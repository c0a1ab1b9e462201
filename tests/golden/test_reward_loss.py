"""The reward model's loss and gradients equal those of TRL's RewardTrainer, and its metrics those counted by hand."""

import copy
import math
import random
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import tiny
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.reward_accuracy import best_of_n, longer_wins, pair_metrics
from prefloop.losses.dpo import DPO
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PreferencePair, Prompt, TokenizedPair
from prefloop.train.job import Job
from prefloop.train.reward_model import RewardModel, bradley_terry
from prefloop.train.settings import TrainSettings


def token_pairs() -> list[TokenizedPair]:
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, tiny.BYTE_VOCABULARY) for _ in range(count))

    return [
        TokenizedPair(str(i), ids(4), ids(a), ids(b), None, None, None, 1.0, chosen_score=i + 1.0, rejected_score=0.5)
        for i, (a, b) in enumerate([(6, 3), (1, 9), (5, 5), (12, 2)])
    ]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tiny.save_tiny_policy(tmp_path_factory.mktemp("policy"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.mul_(20)  # so that the loss is not ln 2 everywhere
    return model


@pytest.mark.parametrize(("margin", "center"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.01), (0.5, 0.1)])
def test_loss_and_gradients_equal_those_of_trl(classifier, tmp_path, margin, center):
    pairs = token_pairs()
    rows = [
        {
            "chosen_ids": list(p.context + p.chosen),
            "rejected_ids": list(p.context + p.rejected),
            **({"margin": margin * (p.chosen_score - p.rejected_score)} if margin else {}),
        }
        for p in pairs
    ]
    with warnings.catch_warnings():
        # TRL's own: it imports and calls deprecated names of transformers, torch and accelerate.
        warnings.simplefilter("ignore")
        from trl import RewardConfig, RewardTrainer  # noqa: PLC0415  the warnings come with the import

        trainer = RewardTrainer(
            model=copy.deepcopy(classifier),
            args=RewardConfig(
                output_dir=str(tmp_path),
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
                center_rewards_coefficient=center or None,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
            processing_class=tiny.byte_tokenizer(chat=False),
        )
        trainer.model.eval()
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        theirs.backward()
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    classifier.zero_grad()
    job = Job(classifier, pairs, DPO(), TrainSettings(), "padded", 0, tmp_path, None, starts_at_reference=False)
    totals = RewardModel(margin, center)._accumulate(job, [[0], [1, 2, 3]])
    assert totals.mean("loss", 4) == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(theirs.item() - math.log(2)) > 0.01
    for name, parameter in classifier.named_parameters():
        gap = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert gap < 1e-5, (name, float(gap))


def test_bradley_terry_has_its_minimum_where_the_rewards_are_the_log_odds():
    difference = torch.linspace(-3, 3, 601, dtype=torch.float64)
    zeros = torch.zeros_like(difference)
    share = 0.8
    mixed = share * bradley_terry(difference, zeros) + (1 - share) * bradley_terry(zeros, difference)
    assert float(difference[mixed.argmin()]) == pytest.approx(math.log(share / (1 - share)), abs=0.01)
    assert float(bradley_terry(torch.tensor([2.0]), torch.tensor([2.0]), center=0.5)) == pytest.approx(math.log(2) + 8)


def test_margins_need_scores_and_bad_settings_are_refused(classifier, tmp_path):
    bare = [TokenizedPair("p", (5,), (6,), (7,), None, None, None, 1.0)]
    job = Job(classifier, bare, DPO(), TrainSettings(), "padded", 0, tmp_path, None, starts_at_reference=False)
    with pytest.raises(ConfigError, match="has no scores"):
        RewardModel(margin=1.0)._accumulate(job, [[0]])
    for field in ("margin", "center"):
        with pytest.raises(ConfigError, match=rf"trainer\.{field}: must be a number ≥ 0"):
            RewardModel(**{field: -1.0})


def completion(name: str, text: str) -> Completion:
    return Completion(name, text, None, None, "stop", 0, "data")


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message(VERBATIM, name),), None, "holdout", "t")


def pair(name: str, chosen: str, rejected: str) -> PreferencePair:
    sides = completion(f"{name}+{chosen}", chosen), completion(f"{name}-{rejected}", rejected)
    return PreferencePair(chosen + rejected, prompt(name), *sides, 1.0, 0.0, 1.0, None, 1.0, "b", 0)


def test_accuracy_counts_pairs_by_prompt_and_stands_beside_the_rule_on_length():
    pairs = [pair("a", "long text", "no"), pair("a", "x", "longer"), pair("b", "even", "same"), pair("c", "abc", "d")]
    rewards = {side.completion_id: 0.0 for p in pairs for side in (p.chosen, p.rejected)}
    for right in (pairs[0], pairs[1], pairs[2]):
        rewards[right.chosen.completion_id] = 2.0
    found = pair_metrics(pairs, rewards, longer=True)
    assert found["accuracy"].value == pytest.approx((100 + 100 + 50) / 3)  # the last pair is a tie
    assert found["accuracy_length"].value == pytest.approx((50 + 50 + 100) / 3)
    assert found["accuracy_over_length"].value == pytest.approx(50 / 3)
    assert found["reward_margin"].value == pytest.approx(4 / 3)
    shorter = pair_metrics(pairs, rewards, longer=False)
    assert shorter["accuracy_length"].value == pytest.approx((50 + 50 + 0) / 3)
    assert longer_wins(pairs)
    assert not longer_wins([pairs[1]])
    with pytest.raises(DataError, match="no held-out pair has a reward"):
        pair_metrics(pairs, {}, longer=True)


def test_best_of_n_is_the_score_of_the_choice_less_that_of_chance():
    def group(name: str, scores: tuple[float | None, ...]) -> JudgedGroup:
        texts = tuple(completion(f"{name}{i}", str(i)) for i in range(len(scores)))
        return JudgedGroup(prompt(name), texts, "p", -1, 1.0, 1.0, scores, None, "j", (None,) * len(scores))

    groups = [group("a", (0.0, 3.0)), group("b", (1.0, None, 5.0, 0.0)), group("c", (4.0,))]
    rewards = {"a0": 0.1, "a1": 0.7, "b0": 9.0, "b1": 99.0, "b2": 3.0, "b3": 1.0, "c0": 1.0}
    found = best_of_n(groups, rewards)
    assert found["best_of_n_gain"].value == pytest.approx((1.5 - 1.0) / 2)
    assert found["best_of_n_share"].value == pytest.approx((1.5 - 1.0) / (1.5 + 3.0))
    assert best_of_n([group("c", (4.0,))], rewards) == {}
