import pytest

from prefloop.errors import ConfigError
from prefloop.judge.lexicon import Lexicon
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)

# The output in the README of vaderSentiment 3.3.2 for its example sentences: text, compound, pos, neg.
# Where the package of that version itself differs from its README, it is left out: the sentence with emoji (compound
# 0.875, README 0.7003), and the shares of "At least it isn't a horrible book." (pos 0.322, README 0.363).
PUBLISHED = [
    ("VADER is smart, handsome, and funny.", 0.8316, 0.746, 0.0),
    ("VADER is smart, handsome, and funny!", 0.8439, 0.752, 0.0),
    ("VADER is very smart, handsome, and funny.", 0.8545, 0.701, 0.0),
    ("VADER is VERY SMART, handsome, and FUNNY.", 0.9227, 0.754, 0.0),
    ("VADER is VERY SMART, handsome, and FUNNY!!!", 0.9342, 0.767, 0.0),
    ("VADER is VERY SMART, uber handsome, and FRIGGIN FUNNY!!!", 0.9469, 0.706, 0.0),
    ("VADER is not smart, handsome, nor funny.", -0.7424, 0.0, 0.646),
    ("The book was good.", 0.4404, 0.492, 0.0),
    ("At least it isn't a horrible book.", 0.431, None, None),
    ("The book was only kind of good.", 0.3832, 0.303, 0.0),
    ("The plot was good, but the characters are uncompelling and the dialog is not great.", -0.7042, 0.094, 0.327),
    ("Today SUX!", -0.5461, 0.0, 0.779),
    ("Today only kinda sux! But I'll get by, lol", 0.5249, 0.317, 0.127),
    ("Make sure you :) or :D today!", 0.8633, 0.706, 0.0),
    ("Not bad at all", 0.431, 0.487, 0.0),
]


def group_of(*texts):
    messages = (Message(VERBATIM, "Say something terrible."),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    completions = tuple(Completion(f"c{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


def scores(judge, *texts):
    (verdict,) = judge([group_of(*texts)], CONTEXT)
    assert verdict.notes == (None,) * len(texts)
    return verdict.scores


def test_scores_are_the_published_ones():
    texts = [text for text, *_ in PUBLISHED]
    assert scores(Lexicon(), *texts) == tuple(compound for _, compound, _, _ in PUBLISHED)
    shares = {text: pos - neg for text, _, pos, neg in PUBLISHED if pos is not None}
    assert scores(Lexicon(score="positive_minus_negative"), *shares) == pytest.approx(tuple(shares.values()))


def test_sign_turns_the_preference_around():
    nice, neutral, bad = scores(Lexicon(sign=-1), "A wonderful day.", "A table.", "A horrible day.")
    assert nice < neutral < bad
    assert str(neutral) == "0.0"


def test_no_text_scores_zero():
    assert scores(Lexicon(), "", " \n") == (0.0, 0.0)
    assert Lexicon()([], CONTEXT) == []


@pytest.mark.parametrize("fields", [{"sign": 0}, {"sign": 2.0}, {"sign": float("nan")}, {"score": "pos"}])
def test_bad_settings_are_refused(fields):
    with pytest.raises(ConfigError, match=rf"judge\.{next(iter(fields))}: must be"):
        Lexicon(**fields)
