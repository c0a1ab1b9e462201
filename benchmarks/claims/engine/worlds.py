"""The small worlds: the models that prefloop ships, judges by name, and which files these need.

Settings that every arm of every claim has are here, so that no arm is favoured by one of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.claims.engine.records import Quality

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
PARTS = Path(__file__).resolve().parents[1] / "parts"

NEEDS = {
    "stories260k": "tinylm_stories260k/hf/config.json",
    "tinystories": "corpus_tinystories_2mb/tinystories_sample.txt",
    "opinion lexicon": "sentiment/opinion_lexicon.zip",
}
"""Files under ../shared/data, by what they are called in messages."""

_NGRAM = {"kind": "{parts}/ngram.py:Ngram", "path": "{shared}/corpus_tinystories_2mb/tinystories_sample.txt"}
JUDGES: dict[str, dict[str, Any]] = {
    "vader": {"kind": "lexicon"},
    "opinion": {"kind": "{parts}/opinion.py:Opinion", "path": "{shared}/sentiment/opinion_lexicon.zip"},
    "fluency": {"kind": "{parts}/fluency.py:Fluency", "path": "{shared}/tinylm_stories260k/hf"},
    "stories-even": {**_NGRAM, "half": "even"},
    "stories-odd": {**_NGRAM, "half": "odd"},
    "sums": {"kind": "sums"},
    "reward": {"kind": "reward_model", "path": "{made}"},
}
"""Judges as a recipe takes them. `{parts}`, `{shared}` and `{made}` are put in when a run is made: no path is in a
run's key."""
MADE = {"reward": "rated"}
"""Training judges that are made for each seed, with the data that they learn from: see `reward.py`."""
_FILES = {"opinion": "opinion lexicon", "fluency": "stories260k", "stories-even": "tinystories"}
_FILES["stories-odd"] = _FILES["stories-even"]
EXACT = frozenset({"sums"})
"""Rules that say what is right: they may both train and evaluate, as there is nothing to be fooled."""
ABOUT = {
    "vader": "VADER's sentiment (the `lexicon` judge)",
    "opinion": "sentiment by Hu and Liu's opinion lexicon, net positive words in 100",
    "fluency": "log-prob under stories260K, nats per token",
    "stories-even": "log-prob under a word trigram model of 1,158 real TinyStories, nats per word",
    "stories-odd": "log-prob under a word trigram model of 1,158 other real TinyStories, nats per word",
    "sums": "whether the final answer is right, by recomputation",
    "reward": "a reward model on the story model's backbone, one for each seed, which prefloop's `reward_model` recipe "
    "trained on VADER's best against worst of four own completions of the training prompts",
}
"""Judges in words, for the page."""

LANGUAGE = Quality("language, by two models that take no part in training", ("stories-odd", "fluency"))
PLEASANT = Quality(
    "mood and language together, by a word list and a model that take no part in training", ("opinion", "fluency")
)
FLUENT = Quality("language alone, by a model that takes no part in training", ("fluency",))
RIGHT = Quality("right answers, by recomputation", ("sums",), "percent")

WORLDS = {"stories": "embedded", "sums": "embedded-sums"}
"""Policy and prompts of each world, by the name that prefloop has for them."""
IN_WORDS = {
    "stories": "the story model that prefloop ships (0.95 M parameters) and its 600 story openings",
    "sums": "the sums model that prefloop ships (0.45 M parameters, every second answer right) and its 1,500 sums",
}
HOLDOUT = 0.4
BASE = (
    f"prompts.holdout={HOLDOUT}",
    "loss.beta=0.1",
    "gate=always",
    "train.epochs=1",
    "train.pairs_per_step=16",
    "train.schedule=constant",
    "train.warmup=0",
    "evaluate.prompts=20",
    "threads=1",
)
"""Settings of every arm, before the claim's and the arm's own. A constant rate without warm-up, because a schedule
restarts with every round, which would set one long round apart from several short ones."""
LIMIT_QUICK = 60
HELD_OUT_QUICK = 6
QUICK = (f"prompts.limit={LIMIT_QUICK}", "train.pairs_per_step=32")
"""What a smoke test changes."""


def missing(claim_needs: Iterable[str], judges: Iterable[str]) -> list[str]:
    """Return the names of files that these judges or needs want and that are not here."""
    wanted = {*claim_needs, *(_FILES[name] for name in judges if name in _FILES)}
    return sorted(name for name in wanted if not (SHARED / NEEDS[name]).exists())


def resolve(text: str, made: str = "") -> str:
    """Put folders in place of `{parts}`, `{shared}` and `{made}`."""
    return text.replace("{parts}", str(PARTS)).replace("{shared}", str(SHARED)).replace("{made}", made)


def judge_spec(name: str, made: str = "") -> dict[str, Any]:
    """Return a judge as a recipe takes it, paths put in; `made` is the folder of one that is made for each seed."""
    return {key: resolve(value, made) for key, value in JUDGES[name].items()}


def judge_settings(name: str, given: bool, made: str = "") -> list[str]:
    """Return the `key=value` that set a run's judges; `given`: the data's own ratings stand for the training judge."""
    spec = json.dumps(judge_spec(name, made))
    return ["judge=given" if given else f"judge={spec}", f"eval_judge={spec}"]
