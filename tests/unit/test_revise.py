"""Revision prompts, the pairs that carry them, and sampling that revises its own drafts."""

from dataclasses import replace

import pytest

from prefloop.errors import ConfigError
from prefloop.inputs import embedded_policy
from prefloop.models.causal_lm import folder_digest
from prefloop.pair.revisions import Revisions
from prefloop.protocols import RoundContext
from prefloop.revision import RevisionPrompt
from prefloop.rows import VERBATIM, Completion, JudgedGroup, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.hf import Hf
from prefloop.sample.revise import Revise

TEXT = (Message(VERBATIM, "Once upon"),)
CHAT = (Message("system", "Be brief."), Message("user", "Why?"))


def test_a_text_prompt_is_filled_in_once_and_a_chat_goes_on():
    assert RevisionPrompt(template="{prompt}{draft}|{prompt}").messages(TEXT, " a {prompt}")[0] == Message(
        VERBATIM, "Once upon a {prompt}|Once upon"
    )
    chat = RevisionPrompt(instruction="Again.").messages(CHAT, "Because.")
    assert chat == (*CHAT, Message("assistant", "Because."), Message("user", "Again."))


@pytest.mark.parametrize("bad", [{"template": "{draft}"}, {"template": "{prompt}"}, {"instruction": " "}])
def test_a_prompt_that_hides_the_draft_is_refused(bad):
    for part in (RevisionPrompt, Revise, Revisions):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            part(**bad)


def test_each_view_scores_one_side_after_the_draft_that_its_name_says():
    prompt = Prompt(prompt_id(TEXT), TEXT, None, "train", "here:1")
    sides = tuple(Completion(text, text, (1,), None, "stop", 0, "p") for text in (" good", " bad"))
    group = JudgedGroup(prompt, sides, "p", 0, 1.0, 1.0, (1.0, 0.0), None, "j", (None, None))
    policy = PolicyRef("p", "0", 0)
    (pair,) = Revisions(template="{prompt}{draft}>{prompt}")([group], RoundContext(0, 0, policy, policy))
    found = {view.name: (view.messages[0].content, view.completion.text) for view in pair.views}
    assert found == {
        "chosen_given_rejected": ("Once upon bad>Once upon", " good"),
        "rejected_given_rejected": ("Once upon bad>Once upon", " bad"),
        "chosen_given_chosen": ("Once upon good>Once upon", " good"),
        "rejected_given_chosen": ("Once upon good>Once upon", " bad"),
    }


@pytest.fixture(scope="module")
def context() -> RoundContext:
    policy = PolicyRef(str(embedded_policy()), folder_digest(embedded_policy()), -1)
    return RoundContext(3, 0, policy, policy)


def story(text: str) -> Prompt:
    messages = (Message(VERBATIM, text),)
    return Prompt(prompt_id(messages), messages, None, "train", "here:1")


def test_a_greedy_revision_is_what_the_policy_writes_after_its_draft(context):
    prompt, settings = story("Tom had a dog. He"), {"completions": 1, "max_new_tokens": 12, "temperature": 0.0}
    (draft,) = Hf(**settings)([prompt], context)
    asked = RevisionPrompt().messages(prompt.messages, draft.completions[0].text)
    (expected,) = Hf(**settings)([replace(prompt, messages=asked)], context)
    (found,) = Revise(revisions=1, **settings)([prompt], context)
    assert found.prompt == prompt
    assert found.completions[0].token_ids == expected.completions[0].token_ids
    assert found.completions[0].sampler_logps is None


def test_without_revisions_it_samples_as_hf_does_and_with_them_completions_differ(context):
    prompts, settings = [story("Tom had"), story("Mia saw a")], {"completions": 3, "max_new_tokens": 10}
    plain = Hf(**settings)(prompts, context)
    assert Revise(revisions=0, **settings)(prompts, context) == plain
    revised = Revise(revisions=2, **settings)(prompts, context)
    assert revised == Revise(revisions=2, **settings)(prompts, context)
    ids = [c.completion_id for group in revised for c in group.completions]
    assert len(set(ids)) == 6
    assert len({c.text for group in revised for c in group.completions}) > 3
    assert [len(group.completions) for group in revised] == [3, 3]
