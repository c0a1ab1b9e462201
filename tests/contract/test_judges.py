"""Every file in judge/ is tested here: its class is found by the file's name. A judge that cannot be built from its
defaults gets its arguments from `ARGUMENTS`, one line."""

import dataclasses
import importlib
import math
import pkgutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import prefloop.judge
from prefloop.inputs import embedded_policy
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from scripted_endpoint import ScriptedEndpoint, comparer
from tiny import BYTE_VOCABULARY, byte_tokenizer, save_tiny_policy

POLICY = PolicyRef(str(embedded_policy()), "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)


def tiny_classifier(folder):
    config = AutoConfig.for_model(
        "bert", vocab_size=BYTE_VOCABULARY, hidden_size=32, intermediate_size=48, num_labels=1
    )
    config.num_hidden_layers, config.num_attention_heads = 1, 2
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


ARGUMENTS = {
    "verifier": lambda folder: {"mode": "exact"},
    "llm": lambda folder: {"model": "judge", "base_url": ScriptedEndpoint(comparer).start().url, "mode": "compare"},
    "reward_model": lambda folder: {"path": tiny_classifier(folder / "classifier")},
    "preference_model": lambda folder: {"path": str(save_tiny_policy(folder / "reader", seed=3))},
    "ensemble": lambda folder: {"judges": ({"kind": "lexicon"}, {"kind": "verifier", "mode": "exact"})},
    "implicit_reward": lambda folder: {
        "policy": str(save_tiny_policy(folder / "policy", seed=1)),
        "reference": str(save_tiny_policy(folder / "reference", seed=2)),
    },
}


def judge_classes():
    """Return file name and class of every judge; a file without such a class holds helpers."""
    found = {}
    for item in pkgutil.iter_modules(prefloop.judge.__path__):
        module = importlib.import_module(f"prefloop.judge.{item.name}")
        wanted = item.name.replace("_", "")
        for name, value in vars(module).items():
            if isinstance(value, type) and name.lower() == wanted and value.__module__ == module.__name__:
                found[item.name] = value
    return found


JUDGES = judge_classes()


@pytest.fixture(scope="module", params=JUDGES)
def judge(request, tmp_path_factory):
    kind, made = request.param, JUDGES[request.param]
    needed = [
        f.name
        for f in dataclasses.fields(made)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if needed and kind not in ARGUMENTS:
        pytest.fail(
            f"judge/{kind}.py: {made.__name__} has no default for {', '.join(needed)}; add a line to ARGUMENTS in "
            "tests/contract/test_judges.py that gives values with which it can score without network"
        )
    return made(**ARGUMENTS.get(kind, lambda folder: {})(tmp_path_factory.mktemp(kind)))


def group_of(question, gold, *texts):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, gold, "train", "test:1")
    completions = tuple(Completion(f"{question}/{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


GROUPS = [
    group_of("Say yes.", "yes", "yes", "no", "yes, a wonderful day!"),
    group_of("What is 9 + 9?", "18", "18"),
    group_of("No gold here.", None, "a horrible day", "a good day"),
    group_of("Nothing was sampled.", "x"),
    group_of("Odd texts.", "x", "", " \n", "\N{SNAKE} é"),
]


def check(groups, verdicts):
    assert len(verdicts) == len(groups)
    for group, verdict in zip(groups, verdicts, strict=True):
        count = len(group.completions)
        assert len(verdict.scores) == len(verdict.notes) == count
        for score, note in zip(verdict.scores, verdict.notes, strict=True):
            assert note if score is None else isinstance(score, float) and math.isfinite(score)
        if verdict.win_prob is not None:
            assert [len(row) for row in verdict.win_prob] == [count] * count
            for i in range(count):
                for j in range(count):
                    assert verdict.win_prob[i][j] + verdict.win_prob[j][i] == pytest.approx(1.0)


def test_there_are_judges():
    assert {"lexicon", "verifier", "reward_model", "implicit_reward"} <= set(JUDGES)


def test_a_judge_is_a_frozen_dataclass_with_documented_fields(judge):
    assert dataclasses.is_dataclass(judge)
    assert type(judge).__doc__
    assert not type(judge).__doc__.startswith(f"{type(judge).__name__}(")
    field = next((f.name for f in dataclasses.fields(judge)), "anything")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(judge, field, None)


def test_one_verdict_for_each_group_and_one_score_or_note_for_each_completion(judge):
    check(GROUPS, judge(GROUPS, CONTEXT))
    assert judge([], CONTEXT) == []


def test_the_same_call_gives_the_same_verdicts(judge):
    first = judge(GROUPS, CONTEXT)
    assert judge(GROUPS, CONTEXT) == first
    assert dataclasses.replace(judge)(GROUPS, CONTEXT) == first


def test_a_verdict_does_not_depend_on_the_order_of_groups(judge):
    verdicts = judge(GROUPS, CONTEXT)
    for one, other in zip(verdicts, judge(GROUPS[::-1], CONTEXT)[::-1], strict=True):
        assert one.notes == other.notes
        for score, again in zip(one.scores, other.scores, strict=True):
            assert again is None if score is None else again == pytest.approx(score, abs=1e-4)


def test_groups_are_left_as_they_are(judge):
    before = repr(GROUPS)
    judge(GROUPS, CONTEXT)
    assert repr(GROUPS) == before
