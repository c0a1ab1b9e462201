"""The policy as its own judge, by the likelihood of two words."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.errors import ConfigError
from prefloop.inputs import embedded_policy
from prefloop.judge.llm import Llm
from prefloop.judge.self_likelihood import SelfLikelihood
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import save_tiny_policy

FOLDER = str(embedded_policy())
CONTEXT = RoundContext(0, 0, PolicyRef(FOLDER, "0", 0), PolicyRef(FOLDER, "0", 0))
STORY = SelfLikelihood(question="\nEveryone was very", good=" happy", bad=" sad")


def group_of(messages, *texts):
    prompt = Prompt(prompt_id(messages), messages, None, "train", "here:1")
    made = tuple(Completion(f"{i}", text, None, None, "stop", 0, "p") for i, text in enumerate(texts))
    return SampleGroup(prompt, made, "p", 0, 1.0, 1.0)


def plain(text, *texts):
    return group_of((Message(VERBATIM, text),), *texts)


GLAD, GRIM = " They laughed and played all day.", " The dog died and everyone cried."
GROUPS = [plain("Tom had a dog.", GLAD, GRIM), plain("Mia went home.", GRIM, "", GLAD)]


def by_transformers(text, *words):
    """Log-probs of words after a text, straight from the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    totals = []
    for word in words:
        before, after = tokenizer(text)["input_ids"], tokenizer(word, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        totals.append(sum(float(logps[len(before) + i - 1, token]) for i, token in enumerate(after)))
    return totals


def test_the_score_is_the_log_odds_of_the_two_words():
    verdicts = STORY(GROUPS, CONTEXT)
    for group, verdict in zip(GROUPS, verdicts, strict=True):
        for completion, score in zip(group.completions, verdict.scores, strict=True):
            good, bad = by_transformers(group.prompt.text + completion.text + STORY.question, " happy", " sad")
            assert score == pytest.approx(good - bad, abs=1e-4)
        assert verdict.notes == (None,) * len(group.completions)
        assert verdict.judgements == ()
    assert verdicts[0].scores[0] > verdicts[0].scores[1]


def test_words_of_several_tokens_count_as_a_whole():
    judge = replace(STORY, good=" wonderfully happy", bad=" unhappy")
    score = judge(GROUPS[:1], CONTEXT)[0].scores[0]
    good, bad = by_transformers(f"Tom had a dog.{GLAD}\nEveryone was very", " wonderfully happy", " unhappy")
    assert score == pytest.approx(good - bad, abs=1e-4)


def test_exchanged_words_and_small_batches_give_the_same():
    scores = [verdict.scores for verdict in STORY(GROUPS, CONTEXT)]
    turned = replace(STORY, good=" sad", bad=" happy")(GROUPS, CONTEXT)
    assert [tuple(-score for score in verdict.scores) for verdict in turned] == [pytest.approx(some) for some in scores]
    one_by_one = replace(STORY, batch_tokens=1)(GROUPS, CONTEXT)
    assert [verdict.scores for verdict in one_by_one] == [pytest.approx(some, abs=1e-5) for some in scores]


def test_kept_judgements_are_the_words_with_the_policys_own_log_probs():
    judge = replace(STORY, keep_judgements=True, meta_question="\nThey felt")
    (verdict,) = judge(GROUPS[:1], CONTEXT)
    assert [(j.completion, j.judgement.text, j.score) for j in verdict.judgements] == [
        *((0, " happy", 1.0), (0, " sad", 0.0)),
        *((1, " happy", 1.0), (1, " sad", 0.0)),
    ]
    for j in verdict.judgements:
        text = f"Tom had a dog.{GROUPS[0].completions[j.completion].text}"
        assert j.messages == (Message(VERBATIM, f"{text}\nEveryone was very"),)
        (logp,) = by_transformers(j.messages[0].content, j.judgement.text)
        assert sum(j.judgement.sampler_logps) == pytest.approx(logp, abs=1e-4)
        good, bad = by_transformers(f"{text}\nThey felt", " happy", " sad")
        assert j.rating == pytest.approx((good - bad) * (1 if j.score else -1), abs=1e-4)
        assert j.judgement.finish_reason == "length"  # no end token is learned after a word
    unrated = replace(STORY, keep_judgements=True)(GROUPS[:1], CONTEXT)[0].judgements
    assert [j.rating for j in unrated] == [None] * 4


def test_in_a_conversation_the_question_is_the_next_turn(tmp_path):
    folder = str(save_tiny_policy(tmp_path / "chat"))
    context = RoundContext(0, 0, PolicyRef(folder, "0", 0), PolicyRef(folder, "0", 0))
    asked = (Message("system", "Be brief."), Message("user", "Why?"))
    (verdict,) = SelfLikelihood(question="\nGood?", keep_judgements=True)([group_of(asked, "So.")], context)
    expected = (*asked, Message("assistant", "So."), Message("user", "Good?"))
    assert {j.messages for j in verdict.judgements} == {expected}


def test_what_is_too_long_has_no_verdict():
    (verdict,) = replace(STORY, keep_judgements=True)([plain("Tom", " ran" * 600, " ran.")], CONTEXT)
    assert verdict.scores[0] is None
    assert "longer" in verdict.notes[0]
    assert verdict.scores[1] is not None
    assert {j.completion for j in verdict.judgements} == {1}


@pytest.mark.parametrize("judge", [STORY, Llm(model="policy")])
def test_the_policy_judges_no_held_out_prompts(judge):
    assert judge.is_policy
    assert judge([], replace(CONTEXT, round=-1)) == []
    with pytest.raises(ConfigError, match=r"eval_judge: .* set eval_judge to a judge that stays"):
        judge(GROUPS, replace(CONTEXT, round=-1))


def test_a_model_that_is_called_policy_at_an_endpoint_is_not_the_policy():
    assert not Llm(model="policy", base_url="http://127.0.0.1:1/v1").is_policy
    assert not Llm(model=FOLDER).is_policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": " \n"}, r"judge\.question"),
        ({"good": ""}, r"judge\.good"),
        ({"good": " no"}, r"judge\.good: needs two different words"),
        ({"meta_question": "Else?"}, r"judge\.meta_question: .*keep_judgements=true"),
        ({"question": "Q?", "meta_question": "Q?", "keep_judgements": True}, r"judge\.meta_question"),
        ({"batch_tokens": 0}, r"judge\.batch_tokens"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SelfLikelihood(**fields)
