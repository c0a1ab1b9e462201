import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop.errors import ConfigError, DataError
from prefloop.judge import implicit_reward
from prefloop.judge.implicit_reward import ImplicitReward
from prefloop.models.logps import completion_logps
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import byte_tokenizer, save_tiny_policy

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)
PLAIN = (Message(VERBATIM, "Once upon"),)
CHAT = (Message("system", "Be kind."), Message("user", "Hello?"))
TEXTS = (" a time", " a time, there was a cat.", " x", " the end", "")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        kind: (
            str(save_tiny_policy(root / f"{kind}-policy", kind, seed=1)),
            str(save_tiny_policy(root / f"{kind}-reference", kind, seed=2)),
        )
        for kind in ("llama", "gpt2")
    }


def group_of(messages, *texts, finish="stop"):
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    completions = tuple(Completion(f"c{i}", t, None, None, finish, 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


def logp(folder, context, completion):
    """log π(completion | context) by transformers' own logits, one row alone, nats."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logps = model(torch.tensor([context + completion])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(context) - 1 + i, token]) for i, token in enumerate(completion))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [8192, 1])
def test_the_score_is_beta_times_the_log_ratio(models, kind, batch_tokens):
    policy, reference = models[kind]
    judge = ImplicitReward(policy, reference, beta=0.3, batch_tokens=batch_tokens)
    groups = [group_of(PLAIN, *TEXTS), group_of(CHAT, *TEXTS)]
    contexts = ["<bos>Once upon", "<bos>[system]Be kind.[user]Hello?[assistant]"]
    for group, verdict, before in zip(groups, judge(groups, CONTEXT), contexts, strict=True):
        assert verdict.notes == (None,) * len(TEXTS)
        context = byte_tokenizer()(before, add_special_tokens=False)["input_ids"]
        for completion, score in zip(group.completions, verdict.scores, strict=True):
            ids = [*byte_tokenizer()(completion.text, add_special_tokens=False)["input_ids"], 2]
            expected = 0.3 * (logp(policy, context, ids) - logp(reference, context, ids))
            assert score == pytest.approx(expected, abs=1e-4)
        assert len({round(score, 4) for score in verdict.scores}) == len(TEXTS)


@pytest.mark.parametrize(("budget", "sizes"), [(1, [1, 1, 1]), (24, [2, 1]), (26, [2, 1]), (36, [3])])
def test_passes_keep_to_the_token_budget(models, monkeypatch, budget, sizes):
    seen = []

    def recording(model, groups):
        seen.append([len(group.completions) for group in groups])
        return completion_logps(model, groups)

    monkeypatch.setattr(implicit_reward, "completion_logps", recording)
    # The prompt has 10 tokens and each completion 2, its end token included.
    (verdict,) = ImplicitReward(*models["llama"], batch_tokens=budget)([group_of(PLAIN, "a", "b", "c")], CONTEXT)
    assert seen == [[size] for size in sizes for _ in models["llama"]]
    assert None not in verdict.scores


def test_a_completion_that_ran_out_of_length_has_no_end_token(models):
    policy, reference = models["llama"]
    (cut,) = ImplicitReward(policy, reference)([group_of(PLAIN, *TEXTS, finish="length")], CONTEXT)
    (stopped,) = ImplicitReward(policy, reference)([group_of(PLAIN, *TEXTS)], CONTEXT)
    assert cut.scores[-1] is None
    assert cut.notes == (None, None, None, None, "the completion has no tokens")
    assert all(abs(one - other) > 1e-4 for one, other in zip(cut.scores[:-1], stopped.scores[:-1], strict=True))


def test_exchanging_the_models_changes_the_sign(models):
    policy, reference = models["llama"]
    (one,) = ImplicitReward(policy, reference)([group_of(PLAIN, *TEXTS)], CONTEXT)
    (other,) = ImplicitReward(reference, policy)([group_of(PLAIN, *TEXTS)], CONTEXT)
    assert one.scores == pytest.approx([-score for score in other.scores], abs=1e-6)


def test_what_is_too_long_is_noted_and_the_rest_scored(models):
    judge = ImplicitReward(*models["llama"])
    (verdict,) = judge([group_of(PLAIN, " a", " x" * 100, " b")], CONTEXT)
    assert [score is None for score in verdict.scores] == [False, True, False]
    assert verdict.notes[1] == "prompt and completion have 10 + 201 tokens, more than the models take ([128, 128])"
    (verdict,) = judge([group_of(PLAIN, "y" * 118, "y" * 117)], CONTEXT)
    assert [score is None for score in verdict.scores] == [True, False]


def test_calls_repeat_and_keep_the_models(models):
    judge = ImplicitReward(*models["llama"])
    groups = [group_of(PLAIN, *TEXTS), group_of(CHAT, *TEXTS)]
    first = judge(groups, CONTEXT)
    kept = judge.models
    assert judge(groups, CONTEXT) == first
    assert judge.models is kept
    assert judge(groups[::-1], CONTEXT)[::-1] == first
    assert judge([], CONTEXT) == []


def test_a_reward_that_is_not_finite_is_no_score(tmp_path, models):
    broken = save_tiny_policy(tmp_path / "broken", seed=3)
    judge = ImplicitReward(str(broken), models["llama"][1])
    group = group_of(PLAIN, " a")
    assert judge([group], CONTEXT)[0].notes == (None,)
    with torch.no_grad():
        judge.models[0].model.model.norm.weight.fill_(math.nan)
    (verdict,) = judge([group], CONTEXT)
    assert verdict.scores == (None,)
    assert verdict.notes == ("the implicit reward is nan",)


def test_twice_the_same_model_is_refused(models, tmp_path):
    policy, _ = models["llama"]
    with pytest.raises(ConfigError, match=r"judge\.reference: .* is the same model as judge\.policy, so every"):
        _ = ImplicitReward(policy, str(save_tiny_policy(tmp_path, seed=1))).models


def test_another_vocabulary_is_refused(models, tmp_path):
    save_tiny_policy(tmp_path, seed=5)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"judge\.reference: .* another vocabulary"):
        _ = ImplicitReward(models["llama"][0], str(tmp_path)).models


def test_a_missing_folder_is_named_by_its_field(models, tmp_path):
    with pytest.raises(ConfigError, match=r"judge\.reference: no folder .*none"):
        _ = ImplicitReward(models["llama"][0], str(tmp_path / "none")).models


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": ""}, r"judge\.policy: empty"),
        ({"reference": ""}, r"judge\.reference: empty"),
        ({"beta": 0.0}, r"judge\.beta: must be a number > 0, got 0\.0"),
        ({"beta": float("nan")}, r"judge\.beta: must be"),
        ({"batch_tokens": 0}, r"judge\.batch_tokens: must be ≥ 1, got 0"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ImplicitReward(**{"policy": "p", "reference": "r", **fields})
