"""Steps as slices of sampled ids: tokenizers with and without merges across steps, and GSM8K's answers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefloop.correct._splitting import Decoding, cut, separator, step_ends
from prefloop.errors import ConfigError
from tiny import SHARED, byte_tokenizer, needs_shared

END = 0
SOLUTION = "She has 3.5 eggs.\nStep 2: 3.5*2=7.\n\nSo 7 eggs. Done!\n#### 7"


def merging_tokenizer():
    """BPE whose merges do not stop at words: a line's end and the next line's beginning can be one token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOLUTION, "\nStep 2: \nStep 2: \n#### 7\n#### 7\n\nSo 7"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


BYTES, MERGING = byte_tokenizer(), merging_tokenizer()


def decoding_of(tokenizer):
    return Decoding(
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def cut_text(tokenizer, text, split="lines", finished=True):
    ids = encoded(tokenizer, text)
    ended = [*ids, tokenizer.eos_token_id] if finished else ids
    return ids, cut(ended, text, step_ends(text, separator(split), finished), decoding_of(tokenizer))


@pytest.mark.parametrize(
    ("split", "text", "expected"),
    [
        ("lines", "a\nb\n\nc", ["a\n", "b\n\n", "c"]),
        ("lines", "\n\na\n \nb\n", ["\n\na\n \n", "b\n"]),
        ("lines", "a\n   ", ["a\n   "]),
        ("lines", "  \n ", []),
        ("lines", "", []),
        (
            "sentences",
            "It costs 0.5 of $3. So 1.5! Is it? Yes.",
            ["It costs 0.5 of $3. ", "So 1.5! ", "Is it? ", "Yes."],
        ),
        ("sentences", "One e.g. this\nTwo.", ["One e.g. this\n", "Two."]),
        ("labels", "Step 1: a\nb\nStep 2: c\nThe answer is 3", ["Step 1: a\nb\n", "Step 2: c\nThe answer is 3"]),
        (r";\s*", "a; b;c", ["a; ", "b;", "c"]),
    ],
)
def test_named_and_own_separators(split, text, expected):
    assert [step.text for step in cut_text(BYTES, text, split)[1]] == expected


def test_what_the_length_limit_cut_off_is_no_step_and_neither_is_the_end_token():
    ids, steps = cut_text(BYTES, "ab\ncd\nef", finished=False)
    assert [step.text for step in steps] == ["ab\n", "cd\n"]
    ids, steps = cut_text(BYTES, "ab\ncd")
    assert sum(step.tokens for step in steps) == len(ids)


@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \nStep 2:#47.é🐍"), max_size=40),
    split=st.sampled_from(["lines", "sentences", "labels"]),
)
def test_joined_steps_are_the_completions_text_and_ids(tokenizer, text, split):
    ids, steps = cut_text(tokenizer, text, split)
    ends = step_ends(text, separator(split), True)
    assert "".join(step.text for step in steps) == text[: ends[-1] if ends else 0]
    assert sum(step.tokens for step in steps) == (len(ids) if steps else 0)
    begin, texts = 0, ""
    for step in steps:
        begin, texts = begin + step.tokens, texts + step.text
        assert step.tokens > 0
        assert tokenizer.decode(ids[:begin], clean_up_tokenization_spaces=False) == texts
    # A step ends where its text ends, or within the token that holds that place.
    reached = [len("".join(s.text for s in steps[: n + 1])) for n in range(len(steps))]
    assert all(any(at >= end for at in reached) for end in ends)
    if tokenizer is BYTES:
        assert reached == ends


def test_a_token_across_two_steps_stays_whole_and_goes_to_the_first():
    text = "So 7.\n#### 7"
    ids = encoded(MERGING, text)
    pieces = [MERGING.decode([token]) for token in ids]
    assert any("\n#" in piece for piece in pieces), "this tokenizer was to have such a token"
    _, steps = cut_text(MERGING, text)
    assert "".join(step.text for step in steps) == text
    assert steps[0].text.startswith("So 7.\n#")
    assert steps[0].text == "".join(pieces[: steps[0].tokens])


def test_two_steps_within_one_token_are_one():
    decoding = Decoding(lambda ids: "".join({END: "", 1: "a\nb\nc", 2: "x\n"}[token] for token in ids))
    text = "x\na\nb\nc"
    steps = cut([2, 1, END], text, step_ends(text, separator("lines"), True), decoding)
    assert [(step.text, step.tokens) for step in steps] == [("x\n", 1), ("a\nb\nc", 1)]


@pytest.mark.parametrize("split", ["", "(", "x*", "\\s*"])
def test_a_separator_that_cannot_be_used_is_refused(split):
    with pytest.raises(ConfigError, match=r"corrector\.split"):
        separator(split)


@needs_shared
@pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])
def test_gsm8k_answers_fall_into_their_lines(tokenizer):
    with (SHARED / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        answers = [json.loads(next(file))["answer"] for _ in range(60)]
    sentences = 0
    for answer in answers:
        ids, steps = cut_text(tokenizer, answer)
        assert "".join(step.text for step in steps) == answer
        assert sum(step.tokens for step in steps) == len(ids)
        if tokenizer is BYTES:
            assert [step.text.rstrip("\n") for step in steps] == answer.split("\n")
            assert steps[-1].text.startswith("#### ")
            sentences += len(cut_text(tokenizer, answer, "sentences")[1]) - len(steps)
    assert tokenizer is MERGING or sentences > 0
