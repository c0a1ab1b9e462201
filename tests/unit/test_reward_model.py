import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefloop.errors import ConfigError, DataError
from prefloop.judge.reward_model import RewardModel
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import ARCHITECTURES, BYTE_VOCABULARY, byte_tokenizer, save_tiny_policy

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)
CHAT = (Message("system", "Be kind."), Message("user", "Hello?"))
PLAIN = (Message(VERBATIM, "Once upon"),)
TEXTS = (" a time, there was a very long story.", "", " x", " the end", " a cat. A dog.")

# A decoder without a padding token, a decoder with one, and an encoder that reads its logit at the first token.
KINDS = {
    "gpt2": {**ARCHITECTURES["gpt2"], "pad_token_id": None},
    "llama": {**ARCHITECTURES["llama"], "pad_token_id": 0},
    "bert": {"pad_token_id": 0},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Write tiny classifiers, each once."""
    made = {}

    def save(kind="gpt2", labels=1, chat=True, name=""):
        key = (kind, labels, chat, name)
        if key not in made:
            config = AutoConfig.for_model(
                kind,
                vocab_size=BYTE_VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                num_labels=labels,
                eos_token_id=2,
                bos_token_id=1,
                **{k: v for k, v in KINDS[kind].items() if k != "max_position_embeddings"},
            )
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(8.0)
            made[key] = tmp_path_factory.mktemp("classifier")
            model.save_pretrained(made[key])
            byte_tokenizer(chat).save_pretrained(made[key])
        return str(made[key])

    return save


def group_of(messages, *texts):
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    completions = tuple(Completion(f"c{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


def plain_score(folder, ids, label=0):
    """What transformers itself says of one row without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, label])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_row_alone(saved, kind):
    folder = saved(kind)
    groups = [group_of(CHAT, *TEXTS), group_of(PLAIN, *TEXTS[::-1])]
    together = RewardModel(folder)(groups, CONTEXT)
    alone = RewardModel(folder, batch_tokens=1)(groups, CONTEXT)
    tokenizer = byte_tokenizer()
    for group, one, other in zip(groups, together, alone, strict=True):
        assert one.notes == (None,) * len(TEXTS)
        assert one.scores == pytest.approx(other.scores, abs=2e-5)
        assert len({round(score, 3) for score in one.scores}) > 3
        for completion, score in zip(group.completions, one.scores, strict=True):
            if group.prompt.messages is CHAT:
                text = "<bos>[system]Be kind.[user]Hello?[assistant]" + completion.text
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert ids[:2] != [1, 1]
            else:
                ids = tokenizer("Once upon" + completion.text)["input_ids"]
            assert score == pytest.approx(plain_score(folder, ids), abs=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_same_call_gives_the_same_numbers_and_order_does_not_matter(saved, kind):
    judge = RewardModel(saved(kind))
    groups = [group_of(CHAT, *TEXTS), group_of(PLAIN, *TEXTS)]
    first = judge(groups, CONTEXT)
    assert judge(groups, CONTEXT) == first
    assert RewardModel(saved(kind))(groups, CONTEXT) == first
    for one, other in zip(judge(groups[::-1], CONTEXT)[::-1], first, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-5)
    assert judge([], CONTEXT) == []
    assert judge([group_of(CHAT)], CONTEXT)[0].scores == ()


def test_batches_keep_to_the_token_budget_longest_first(saved):
    judge = RewardModel(saved("gpt2"), batch_tokens=40)
    shapes = []
    judge.classifier.model.register_forward_pre_hook(
        lambda model, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    judge([group_of(PLAIN, "a", "b" * 50, "c" * 3, "d" * 9)], CONTEXT)
    assert shapes == [(1, 60), (2, 19), (1, 11)]


def test_a_text_that_ends_in_the_fallback_padding_id_keeps_its_last_token(saved):
    # Id 0 is what a classifier without a padding token is first offered; here it ends a row.
    folder = saved("gpt2", chat=False)
    ids = byte_tokenizer()("Once upon" + " a<pad>")["input_ids"]
    assert ids[-1] == 0
    (verdict,) = RewardModel(folder)([group_of(PLAIN, " a<pad>", " longer than that")], CONTEXT)
    assert verdict.scores[0] == pytest.approx(plain_score(folder, ids), abs=2e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_input_says_how_prompt_and_completion_are_joined(saved, chat):
    folder = saved("gpt2", chat=chat)
    tokenizer = byte_tokenizer()

    def score(messages, **fields):
        return RewardModel(folder, **fields)([group_of(messages, " yes")], CONTEXT)[0].scores[0]

    def expected(text):
        return pytest.approx(plain_score(folder, tokenizer(text)["input_ids"]), abs=2e-5)

    joined = "system: Be kind.\nuser: Hello?\n yes"
    rendered = "[system]Be kind.[user]Hello?[assistant] yes"
    assert score(CHAT, input="concat") == expected(joined)
    assert score(CHAT) == expected(rendered if chat else joined)
    assert score(PLAIN) == expected("Once upon yes")
    if chat:
        assert score(PLAIN, input="chat") == expected("[user]Once upon[assistant] yes")
    else:
        with pytest.raises(ConfigError, match=r"judge\.input: .* no chat template; use concat or auto"):
            score(PLAIN, input="chat")


def test_a_long_text_is_cut_and_noted(saved):
    folder = saved("gpt2")
    group = group_of(PLAIN, " x" * 100, " y", " x" * 200)
    (verdict,) = RewardModel(folder)([group], CONTEXT)
    assert verdict.notes[0] == "cut from 210 to 128 tokens for the reward model"
    assert verdict.notes[1] is None
    assert verdict.scores[0] == pytest.approx(verdict.scores[2], abs=2e-5)
    assert None not in verdict.scores
    (short,) = RewardModel(folder, max_length=12)([group], CONTEXT)
    ids = byte_tokenizer()("Once upon y")["input_ids"]
    assert short.notes[1] is None
    assert len(ids) == 12
    assert "to 12 tokens" in short.notes[0]


def test_a_choice_among_several_labels(saved):
    folder = saved("gpt2", labels=3)
    ids = byte_tokenizer()("Once upon yes")["input_ids"]
    for label, index in ((2, 2), ("LABEL_1", 1)):
        (verdict,) = RewardModel(folder, label=label)([group_of(PLAIN, " yes")], CONTEXT)
        assert verdict.scores[0] == pytest.approx(plain_score(folder, ids, index), abs=2e-5)
    for label in (None, 3, "good"):
        with pytest.raises(ConfigError, match=r"judge\.label: .* has 0 \(LABEL_0\), 1 \(LABEL_1\), 2 \(LABEL_2\)"):
            _ = RewardModel(folder, label=label).classifier


def test_the_only_label_needs_no_choice_and_takes_no_wrong_one(saved):
    assert RewardModel(saved("gpt2"), label="LABEL_0").classifier.label == 0
    with pytest.raises(ConfigError, match=r"judge\.label"):
        _ = RewardModel(saved("gpt2"), label=1).classifier


def test_no_score_without_a_finite_logit_or_a_rendered_chat(saved):
    judge = RewardModel(saved("gpt2", name="broken"))
    with torch.no_grad():
        judge.classifier.model.score.weight.fill_(math.nan)
    judge.classifier.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
        "{{ messages[0].content }}"
    )
    refused, broken, empty = judge([group_of(CHAT, "a"), group_of(PLAIN, "b", "c"), group_of(())], CONTEXT)
    assert refused.scores == (None,)
    assert refused.notes == ("the reward model's chat template refuses the messages: no system",)
    assert broken.scores == (None, None)
    assert broken.notes == ("the reward model's logit is nan",) * 2
    assert empty.scores == ()


def test_no_score_without_tokens(saved):
    judge = RewardModel(saved("gpt2", name="silent"))
    judge.classifier.tokenizer.chat_template = "{{ '' }}"
    (verdict,) = judge([group_of(CHAT, "a")], CONTEXT)
    assert verdict.scores == (None,)
    assert verdict.notes == ("prompt and completion have no tokens",)


def test_a_language_model_without_a_reward_head_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no trained value for score\.weight; .* without a reward head"):
        _ = RewardModel(str(save_tiny_policy(tmp_path))).classifier


def test_what_cannot_be_loaded_is_refused(tmp_path, saved):
    with pytest.raises(ConfigError, match=r"judge\.path: no folder .*/none"):
        _ = RewardModel(str(tmp_path / "none")).classifier
    with pytest.raises(DataError, match=r"no config\.json"):
        _ = RewardModel(str(tmp_path)).classifier
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((type(tmp_path)(saved("gpt2")) / file).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match="pickle"):
        _ = RewardModel(str(tmp_path)).classifier
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="not a sequence classifier that transformers can read"):
        _ = RewardModel(str(tmp_path)).classifier


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, r"judge\.path: empty"),
        ({"input": "pair"}, r"judge\.input: must be auto, chat or concat, got 'pair'"),
        ({"batch_tokens": 0}, r"judge\.batch_tokens: must be ≥ 1, got 0"),
        ({"max_length": 1}, r"judge\.max_length: must be ≥ 2, got 1"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RewardModel(**{"path": "x", **fields})


def test_settings_that_do_not_fit_the_model_are_refused(saved):
    with pytest.raises(ConfigError, match=r"judge\.max_length: .* takes at most 128 tokens, got 129"):
        _ = RewardModel(saved("gpt2"), max_length=129).classifier
    with pytest.raises(ConfigError, match="precision"):
        _ = RewardModel(saved("gpt2"), precision="fp8").classifier
    with pytest.raises(ConfigError, match="device"):
        _ = RewardModel(saved("gpt2"), device="nowhere").classifier
