import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefloop import batching
from prefloop.artifact import load_artifact
from prefloop.errors import CorruptArtifact
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import TokenizedPair, TokenizedView
from prefloop.train.reference import score_reference
from prefloop.train.reference_cache import ReferenceCache
from tiny import tiny_model, write_jsonl


class Live:
    """A reference that counts the pairs it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.model = tiny_model("llama", seed=seed)
        self.asked: list[str] = []

    def __call__(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        self.asked += [pair.pair_id for pair in pairs]
        return score_reference(self.model, pairs, "shared", 200)

    def count(self) -> int:
        asked = len(self.asked)
        self.asked.clear()
        return asked


def pairs(count: int, first: int = 0) -> list[TokenizedPair]:
    made = []
    for i in range(first, first + count):
        draw = random.Random(i)
        ids = [tuple(draw.randrange(4, 90) for _ in range(draw.randint(1, 9))) for _ in range(4)]
        view = TokenizedView("gold", ids[0], ids[3], None)
        rejected = () if i % 7 == 3 else ids[2]
        made.append(TokenizedPair(f"p{i}", ids[0], ids[1], rejected, None, None, None, 1.0, (view,)))
    return made


def test_what_one_run_scored_another_does_not(tmp_path):
    live = Live()
    first = ReferenceCache.of(tmp_path, "abc", live.model)
    expected = first.score(pairs(40), live)
    assert (live.count(), first.used) == (40, 0)
    assert expected == score_reference(live.model, pairs(40), "shared", 200)
    assert first.score(pairs(40), live) == expected
    assert (live.count(), first.used) == (16, 40)

    second = ReferenceCache.of(tmp_path, "abc", live.model)
    more = second.score(pairs(60, first=10)[::-1], live)  # 30 known ones, 30 new ones, in another order
    assert sorted(more, key=lambda p: int(p.pair_id[1:]))[:30] == expected[10:]
    assert (live.count(), second.used) == (16 + 30, 30)
    assert all(p.views[0].reference for p in more)
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def test_another_reference_or_type_of_number_knows_nothing(tmp_path):
    live = Live()
    ReferenceCache.of(tmp_path, "abc", live.model).score(pairs(5), live)
    live.count()
    for other in (
        ReferenceCache.of(tmp_path, "abd", live.model),
        ReferenceCache.of(tmp_path, "abc", tiny_model("llama").to(torch.bfloat16)),
    ):
        other.score(pairs(5), live)
        assert (live.count(), other.used) == (5, 0)


def test_a_completion_of_another_prompt_is_another_one(tmp_path):
    live = Live()
    cache = ReferenceCache.of(tmp_path, "abc", live.model)
    (pair,) = pairs(1)
    moved = replace(pair, context=pair.context + pair.chosen[:1], chosen=pair.chosen[1:] or (5,))
    cache.score([pair], live)
    live.count()
    assert cache.score([moved], live) == score_reference(live.model, [moved], "shared", 200)
    assert live.count() == 1


def test_log_probs_of_another_model_are_refused_by_name(tmp_path):
    live = Live()
    ReferenceCache.of(tmp_path, "abc", live.model).score(pairs(20), live)
    with pytest.raises(
        CorruptArtifact, match=r"abc-float32: the log-probs of pair p\d+ differ .* train\.reference_cache"
    ):
        ReferenceCache.of(tmp_path, "abc", live.model).score(pairs(20), Live(seed=1))


def test_a_damaged_file_is_named(tmp_path):
    live = Live()
    ReferenceCache.of(tmp_path, "abc", live.model).score(pairs(5), live)
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptArtifact, match=f"{path.name}: cannot be read"):
        ReferenceCache.of(tmp_path, "abc", live.model)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    live = Live()
    cache = ReferenceCache.of(tmp_path, "abc", live.model)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("prefloop.train.reference_cache.flush_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.score(pairs(5), live)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def existing_pairs(path: Path) -> Path:
    rows = [
        {"prompt": f"Day {i}: Tom was", "chosen": f" happy {i}.", "rejected": f" sad {i}. He cried."} for i in range(70)
    ]
    return write_jsonl(path, rows)


def test_a_second_run_takes_over_what_the_first_one_scored(tmp_path, monkeypatch):
    scored: list[int] = []

    def counted(model, part, **settings):
        scored.append(len(part))
        return score_reference(model, part, **settings)

    monkeypatch.setattr(batching, "score_reference", counted)
    settings = ["policy=embedded", f"prompts={existing_pairs(tmp_path / 'p.jsonl')}", "sampler.kind=given", "rounds=1"]
    settings += ["judge.kind=given", "prompts.holdout=0.5", "prompts_per_round=null", "train.pairs_per_step=16"]
    settings += ["eval_judge=lexicon", "eval_sampler={kind: hf, max_new_tokens: 4}", "evaluate.prompts=4"]
    batches = []
    cache = f"train.reference_cache={tmp_path / 'known'}"
    for name, more in (("one", []), ("two", [cache]), ("three", [cache])):
        recipe, origins = read_recipe("iterative_dpo", [*settings, *more])
        run(recipe, tmp_path / name, origins=origins)
        batches.append(list(load_artifact(tmp_path / name / "round-000" / "4-batches", TokenizedPair)))
    assert batches[0] == batches[1] == batches[2]
    count = len(batches[0])
    assert [size for size in scored if size] == [count, count, 16]
    policies = [
        (tmp_path / name / "round-000" / "5-policy" / "model.safetensors").read_bytes() for name in ("one", "three")
    ]
    assert policies[0] == policies[1]
