"""The plan of steps, and pairs that are read from disk as training comes to them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefloop.artifact import Key, open_artifact
from prefloop.errors import CorruptArtifact
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair, TokenizedView
from prefloop.train import plan as plan_module
from prefloop.train import store as store_module
from prefloop.train.batches import pair_logps
from prefloop.train.plan import PairIndex, Plan, context_numbers
from prefloop.train.reference import score_reference
from prefloop.train.store import PairStore
from tiny import tiny_model


def pair(number: int, context: int = 0) -> TokenizedPair:
    chosen = tuple(range(5, 6 + number % 4))
    rejected = tuple(range(20, 22 + number % 3))
    return TokenizedPair(f"p{number}", (1, 2 + context), chosen, rejected, None, None, None, 1.0)


@pytest.fixture
def artifact(tmp_path):
    building = open_artifact(tmp_path / "batches", Key("batches", {}), TokenizedPair)
    for part in range(10):
        building.write_part(part, [pair(10 * part + i, context=(10 * part + i) // 2) for i in range(10)])
    return building.finish()


def test_a_store_holds_what_the_artifact_holds(artifact):
    store, rows = PairStore(artifact), list(artifact)
    assert len(store) == 100
    assert [store[i] for i in range(100)] == rows
    assert store[95:] == rows[95:]
    with pytest.raises(IndexError):
        store[100]
    in_memory = PairIndex.of(rows)
    assert np.array_equal(store.pairs.lengths, in_memory.lengths)
    assert np.array_equal(store.pairs.owners, in_memory.owners)
    assert store.pairs.starts.tolist() == list(range(0, 101, 10))


def test_the_same_context_has_the_same_number_and_no_other_has_it():
    contexts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (7, 8, 9), (9, 8, 7), (7, 8), (31999,) * 3]
    twice = contexts + contexts[::-1]
    ids = np.array([token for context in twice for token in context])
    found = context_numbers(ids, np.array([len(context) for context in twice])).tolist()
    assert found == [*found[:10], *found[:10][::-1]]
    assert len(set(found)) == len(contexts)


def test_data_that_fit_into_a_window_are_planned_alike_in_memory_and_on_disk(artifact):
    plans = [Plan(index, 7, 2, 3, 50) for index in (PairStore(artifact).pairs, PairIndex.of(list(artifact)))]
    assert list(plans[0]) == list(plans[1])


def test_larger_data_open_each_part_once_an_epoch_and_are_shuffled(artifact, monkeypatch):
    monkeypatch.setattr(plan_module, "WINDOW", 3)
    monkeypatch.setattr(store_module, "WINDOW", 3)
    opened: Counter[str] = Counter()
    store = PairStore(artifact)
    read = store_module.pq.read_table
    monkeypatch.setattr(store_module.pq, "read_table", lambda path: (opened.update([path.name]), read(path))[1])
    plan = Plan(store.pairs, 5, 1, 0, 1000)
    order = [i for step in plan for batch in step for i in batch]
    assert sorted(order) == list(range(100))
    assert order != sorted(order)
    for step in plan:
        for batch in step:
            assert [store[i].pair_id for i in batch] == [f"p{i}" for i in batch]
    assert set(opened.values()) == {1}
    assert len(opened) == 10
    assert len(store._held) <= 3


def test_a_damaged_part_is_found_when_the_store_is_made(artifact):
    path = artifact.path / "part-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="part-00003"):
        PairStore(artifact)


def test_the_longest_microbatch_of_a_long_plan_holds_the_longest_pair(monkeypatch):
    lengths = [(3, 2, 2, 0)] * 50 + [(90, 5, 5, 0)] + [(3, 2, 2, 0)] * 50
    short = Plan(PairIndex.of_lengths(lengths, None), 4, 1, 0, 100).longest()
    monkeypatch.setattr(plan_module, "KNOWN_STEPS", 2)
    assert Plan(PairIndex.of_lengths(lengths, None), 4, 1, 0, 100).longest() == short
    assert 50 in short


def with_view(number: int) -> TokenizedPair:
    view = TokenizedView("other", (9, 8, number), (30, 31, 32)[: 1 + number % 3], None)
    return replace(pair(number), views=(view,))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_views_are_scored_under_their_own_context(layout):
    model = tiny_model("llama")
    rows = score_reference(model, [with_view(i) for i in range(4)], layout, 40)
    logps = pair_logps(model, rows, layout, views=("other",))
    for i, row in enumerate(rows):
        view = row.views[0]
        alone = completion_logps(model, [TokenGroup(view.context, (view.tokens,))], layout="padded")
        torch.testing.assert_close(logps.views["other"].policy.total[i], alone.total[0])
        assert logps.views["other"].log_ratio()[i].abs() < 1e-5
        assert logps.log_ratios()[0][i].abs() < 1e-5


def test_views_count_towards_the_budget_and_a_missing_one_is_named():
    assert PairIndex.of([with_view(2)]).lengths.tolist() == [[2, 3, 4, 6]]
    with pytest.raises(ValueError, match="pair p1: the loss reads the view 'other', and it has none"):
        pair_logps(tiny_model("llama"), [pair(1)], needs_reference=False, views=("other",))


def test_a_side_that_is_absent_is_an_empty_row():
    logps = pair_logps(tiny_model("llama"), [replace(pair(0), rejected=()), pair(1)], needs_reference=False)
    assert logps.policy_rejected.length.tolist() == [0, len(pair(1).rejected)]
    assert logps.policy_rejected.total[0] == 0
