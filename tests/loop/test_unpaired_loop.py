"""Runs on labelled completions and on rankings, and combinations that are refused before any work."""

import math
from pathlib import Path
from typing import Any

import pytest

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import ABSENT, PreferencePair, StepLog, TokenizedPair
from tiny import write_jsonl

SMALL = [
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "rounds=1",
    "gate.kind=always",
    "train.learning_rate=3e-4",
    "train.tokens_per_microbatch=32768",
]


def call(name: str, root: Path, *settings: str) -> dict[str, Any]:
    recipe, origins = read_recipe(name, [*SMALL, *settings])
    return run(recipe, root, origins=origins)


def labelled(path: Path) -> Path:
    """Two good completions for each bad one, one a row, as TRL's unpaired data have it."""
    rows = [
        {"prompt": f"Day {i}: Tom was", "completion": f" {word} {i}.", "label": word != "sad"}
        for i in range(60)
        for word in ("happy", "glad", "sad")
    ]
    return write_jsonl(path, rows)


def given(root: Path, *more: str) -> list[str]:
    prompts = labelled(root / "feedback.jsonl")
    held_out = ["eval_sampler.max_new_tokens=12", "eval_judge=lexicon", "prompts.holdout=0.5"]
    return ["policy=embedded", f"prompts={prompts}", *held_out, *more]


def test_kto_learns_from_labels(tmp_path):
    call("kto", tmp_path / "out", *given(tmp_path, "loss.lambda_u=2"))
    pairs = list(load_artifact(tmp_path / "out" / "round-000" / "3-pairs", PreferencePair))
    good = [pair for pair in pairs if pair.rejected == ABSENT]
    bad = [pair for pair in pairs if pair.chosen == ABSENT]
    assert len(good) == 2 * len(bad) == 2 * len(pairs) / 3
    assert {pair.rejected.text.split()[0] for pair in bad} == {"sad"}
    batch = list(load_artifact(tmp_path / "out" / "round-000" / "4-batches", TokenizedPair))
    assert all(len(pair.views[0].reference) == len(pair.views[0].tokens) > 0 for pair in batch)
    steps = list(load_artifact(tmp_path / "out" / "round-000" / "5-policy", StepLog))
    # The policy is the reference: z0 is 0, good rows cost 1/2 and bad ones λ_U/2.
    assert 0.5 < steps[0].loss < 1.0
    assert steps[-1].loss < steps[0].loss
    assert [value.name for value in steps[0].extra] == ["z0"]
    assert steps[0].extra[0].value == pytest.approx(0, abs=1e-4)


def test_unpaired_apo_zero_takes_steps_of_any_size_and_makes_no_views(tmp_path):
    more = ["loss={kind: apo_zero_unpaired, lambda_u: 2.0}", "pair_builder.mismatched=false"]
    call("kto", tmp_path / "out", *given(tmp_path, *more, "train.tokens_per_microbatch=64"))
    batch = list(load_artifact(tmp_path / "out" / "round-000" / "4-batches", TokenizedPair))
    assert not any(pair.views for pair in batch)


def test_sppo_soft_fits_own_samples_to_their_win_rates(tmp_path):
    more = ["loss.form=soft", "pair_builder=win_rates", "prompts_per_round=16", "sampler.max_new_tokens=12"]
    call("sppo", tmp_path / "out", *more)
    pairs = list(load_artifact(tmp_path / "out" / "round-000" / "3-pairs", PreferencePair))
    assert all((pair.chosen == ABSENT) != (pair.rejected == ABSENT) for pair in pairs)
    assert all(pair.win_prob > 0.5 for pair in pairs)
    steps = list(load_artifact(tmp_path / "out" / "round-000" / "5-policy", StepLog))
    targets = [(1000 * (pair.win_prob - 0.5)) ** 2 for pair in pairs]
    assert min(targets) < steps[0].loss < max(targets)


def test_rankings_of_four_train_plackett_luce(tmp_path):
    words = ["happy fun", "good", "small", "sad and bad"]
    rows = [
        {"prompt": f"Day {i}: Tom was", "completions": [f" {w} {i}." for w in words], "scores": [4, 3, 2, 1]}
        for i in range(60)
    ]
    data = ["policy=embedded", f"prompts={write_jsonl(tmp_path / 'rated.jsonl', rows)}", "prompts.holdout=0.5"]
    more = ["eval_judge=lexicon", "eval_sampler.max_new_tokens=12", "pair_builder={kind: rankings}"]
    call("curry_dpo", tmp_path / "out", *data, *more, "loss={kind: plackett_luce}")
    (first, *_) = load_artifact(tmp_path / "out" / "round-000" / "3-pairs", PreferencePair)
    assert [c.text.split()[0] for c in (first.chosen, first.rejected, *(v.completion for v in first.views))] == [
        "happy",
        "good",
        "small",
        "sad",
    ]
    steps = list(load_artifact(tmp_path / "out" / "round-000" / "5-policy", StepLog))
    assert steps[0].loss == pytest.approx(math.log(24), abs=1e-4)
    assert steps[-1].loss < steps[0].loss


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["loss=kto"], "kto reads mismatched beside the two sides of a pair, and pair_builder.kind ranked does not"),
        (["loss=dpo", "pair_builder=unpaired"], "dpo compares two sides, and pair_builder.kind unpaired makes"),
        (["loss=dpo", "pair_builder=win_rates"], "dpo compares two sides, and pair_builder.kind win_rates makes"),
        (["loss=kto", "pair_builder={kind: unpaired, mismatched: false}"], "kto reads mismatched"),
        (["loss={kind: plackett_luce, completions: 5}", "pair_builder=rankings"], "plackett_luce reads rank_5"),
        (["loss=plackett_luce"], "plackett_luce reads rank_3, rank_4"),
        (["loss=kto", "pair_builder=unpaired", "reference=none"], "reference: none, but loss.kind kto needs one"),
        (["loss={kind: kto, lambda_u: -1.0}", "pair_builder=unpaired"], r"loss\.lambda_u .*≥ 0"),
    ],
)
def test_a_loss_that_cannot_read_the_data_refuses_before_any_work(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        call("iterative_dpo", tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_a_step_of_kto_that_does_not_fit_says_what_to_change(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.tokens_per_microbatch: KTO compares all pairs of a step"):
        call("kto", tmp_path / "out", *given(tmp_path, "train.tokens_per_microbatch=64"))
