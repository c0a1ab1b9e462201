"""Pairwise preference models: against transformers' own logits and chat template, in both orders."""

import math
import sqlite3

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefloop.errors import ConfigError, DataError
from prefloop.judge.preference_model import PreferenceModel, first_wins, turns
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import BYTE_VOCABULARY, byte_tokenizer, save_tiny_policy

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)
SHORT = "{{prompt}}|{{a}}|{{b}}?"

# As the model card of RLHFlow/pair-preference-model-LLaMA3-8B gives it.
PUBLISHED = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


def prompt_of(*said):
    roles = ("user", "assistant") * len(said)
    messages = tuple(Message(role, text) for role, text in zip(roles, said, strict=False))
    return Prompt(prompt_id(messages), messages, None, "train", "test:1")


def group_of(prompt, *texts):
    made = tuple(Completion(f"{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, made, "p", 0, 1.0, 1.0)


def classifier(folder, labels, seed=0):
    config = AutoConfig.for_model("llama", vocab_size=BYTE_VOCABULARY, hidden_size=32, intermediate_size=48)
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, 4, 2
    config.max_position_embeddings, config.num_labels, config.pad_token_id = 128, labels, 0
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return str(save_tiny_policy(tmp_path_factory.mktemp("reader") / "model", seed=5))


@pytest.mark.parametrize("said", [("Hi?",), ("Hi?", "Hello.", "And\n you?")])
def test_turns_are_those_of_the_published_template(said):
    prompt = prompt_of(*said)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PUBLISHED
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    assert turns(prompt) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("bos", [True, False])
def test_words_are_the_models_own_next_token_in_both_orders(reader, bos):
    judge = PreferenceModel(reader, template=SHORT, bos=bos)
    texts = ("a cat", "a dog", "")
    (verdict,) = judge([group_of(prompt_of("Why?"), *texts)], CONTEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(reader), AutoTokenizer.from_pretrained(reader)
    a, b = (tokenizer.encode(word, add_special_tokens=False)[0] for word in "AB")

    def first(one, two):
        message = [{"role": "user", "content": f"Why?|{one}|{two}?"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        text = text if bos else text.replace(tokenizer.bos_token, "")
        ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        return float(torch.softmax(logits[[a, b]], 0)[0])

    for i, one in enumerate(texts):
        for j, two in enumerate(texts):
            expected = 0.5 if i == j else (first(one, two) + 1 - first(two, one)) / 2
            assert verdict.win_prob[i][j] == pytest.approx(expected, abs=1e-5)
    for i, row in enumerate(verdict.win_prob):
        assert verdict.scores[i] == pytest.approx((sum(row) - 0.5) / 2)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifier_is_read_as_it_says(tmp_path, labels):
    folder = classifier(tmp_path / "model", labels)
    (verdict,) = PreferenceModel(folder, head="classifier", template=SHORT)(
        [group_of(prompt_of("Why?"), "yes", "no")], CONTEXT
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def first(one, two):
        with torch.no_grad():
            logits = model(**tokenizer(f"Why?|{one}|{two}?", return_tensors="pt")).logits[0]
        if labels == 1:
            return float(logits.sigmoid())
        shares = logits.softmax(0).tolist()
        return shares[0] + (shares[2] / 2 if labels == 3 else 0.0)

    assert verdict.win_prob[0][1] == pytest.approx((first("yes", "no") + 1 - first("no", "yes")) / 2, abs=1e-5)


def test_three_logits_without_a_tie_do_not_overflow():
    assert first_wins([900.0, 0.0, -900.0]) == pytest.approx(900.0)
    assert first_wins([math.nan]) is None


def test_equal_texts_are_a_draw_and_alone_or_too_long_is_no_verdict(reader):
    judge = PreferenceModel(reader, template=SHORT)
    long = "x" * 200
    groups = [
        group_of(prompt_of("Why?"), "same", "same"),
        group_of(prompt_of("Why?"), "alone"),
        group_of(prompt_of("Why?"), "short", "other", long),
    ]
    same, alone, cut = judge(groups, CONTEXT)
    assert same.win_prob == ((0.5, 0.5), (0.5, 0.5))
    assert alone.scores == (None,)
    assert alone.notes[0].startswith("no verdict: there is no other completion")
    assert cut.scores[2] is None
    assert cut.notes[2].startswith("no verdict: the two completions are longer together")
    assert cut.notes[0].startswith("1 of 2 comparisons without verdict in both orders")
    assert cut.win_prob is None
    assert None not in cut.scores[:2]


def test_replies_are_kept_for_the_report_and_for_a_rerun(reader, tmp_path, monkeypatch):
    context = RoundContext(0, 0, POLICY, POLICY, scratch=str(tmp_path))
    groups = [group_of(prompt_of("Why?"), "a cat", "a dog")]
    found = PreferenceModel(reader, template=SHORT)(groups, context)
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as store:
        rows = sorted(store.execute("select mode, shown, verdict from replies"))
    store.close()
    assert [row[:2] for row in rows] == [("compare", '["0", "1"]'), ("compare", '["1", "0"]')]
    assert {row[2] for row in rows} <= {'["A"]', '["B"]'}
    again = PreferenceModel(reader, template=SHORT)
    monkeypatch.setitem(again.__dict__, "_ask", lambda texts: pytest.fail("computed twice"))
    assert again(groups, context) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, r"judge\.path .*a folder or hub id"),
        ({"template": "{{a}} {{prompt}}"}, r"judge\.template .*\{\{a\}\} and \{\{b\}\}"),
        ({"template": "{{a}} {{b}}"}, r"judge\.template .*\{\{context\}\} or \{\{prompt\}\}"),
        ({"template": "{{a}} {{b}} {{prompt}} {{c}}"}, r"judge\.template .*no other placeholders"),
        ({"words": ("A", "A")}, r"judge\.words .*two different words"),
        ({"max_length": 9}, r"judge\.max_length: only judge\.head=classifier"),
        ({"head": "classifier", "bos": False}, r"judge\.bos: only judge\.head=words"),
        ({"batch_tokens": 0}, r"judge\.batch_tokens .*≥ 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceModel(**{"path": "x", **fields})


def test_models_that_do_not_fit_are_refused(tmp_path):
    groups = [group_of(prompt_of("Why?"), "yes", "no")]
    with pytest.raises(ConfigError, match=r"judge\.path: .*nowhere"):
        PreferenceModel(str(tmp_path / "nowhere"))(groups, CONTEXT)
    folder = classifier(tmp_path / "four", 4)
    with pytest.raises(DataError, match=r"a classifier of 4 labels"):
        PreferenceModel(folder, head="classifier")(groups, CONTEXT)


def test_a_plain_text_prompt_counts_as_a_users_turn():
    messages = (Message(VERBATIM, "Once"),)
    assert turns(Prompt("0", messages, None, "train", "x")) == "\n\n<turn> user\n Once\n"
