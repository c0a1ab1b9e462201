"""The optimizer loop: the result does not depend on the split, nor on being stopped."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch

from prefloop.errors import ConfigError, CorruptArtifact, Interrupted, TrainingDiverged
from prefloop.losses.aot import AOT
from prefloop.losses.dpo import DPO
from prefloop.protocols import Quiet
from prefloop.rows import TokenizedPair
from prefloop.train import update
from prefloop.train.checkpoint import save_state
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import learning_rate, train
from tiny import newest, tiny_model


def pairs(count: int = 10) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 90, (size,), generator=generator).tolist())

    return [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(count)]


def job(folder: Path, **settings: object) -> Job:
    model = tiny_model("llama")
    scored = score_reference(model, pairs(), "padded", 200)
    wanted = {"learning_rate": 1e-2, "pairs_per_step": 3, "epochs": 2, "layout": "padded", **settings}
    return Job(
        model=model.requires_grad_(True),
        pairs=scored,
        loss=DPO(),
        settings=TrainSettings.model_validate(wanted),
        layout="padded",
        seed=7,
        state_folder=folder,
        reference=None,
        starts_at_reference=True,
    )


def run(one: Job) -> tuple[list[float], torch.Tensor]:
    curve = train(one, Quiet(), lambda: False)
    return [row.loss for row in curve], torch.cat([p.detach().flatten() for p in one.model.parameters()])


def test_training_lowers_the_loss_from_ln_2(tmp_path):
    losses, _ = run(job(tmp_path, epochs=6))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.4


def test_the_microbatch_budget_does_not_change_the_result(tmp_path):
    whole, weights = run(job(tmp_path / "a", tokens_per_microbatch=10**6))
    split, again = run(job(tmp_path / "b", tokens_per_microbatch=1))
    assert split == pytest.approx(whole, rel=1e-5)
    # AdamW divides by the root of tiny second moments, which magnifies rounding in weights that barely move.
    torch.testing.assert_close(again, weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop_after", [1, 2, 5, 7])
@pytest.mark.parametrize("every", [2, 100])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, stop_after, every):
    losses, weights = run(job(tmp_path / "a"))
    first = job(tmp_path / "b", checkpoint_every=every)
    calls = itertools.count(1)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 8"):
        train(first, Quiet(), lambda: next(calls) == stop_after)
    resumed, again = run(job(tmp_path / "b", checkpoint_every=every))
    assert resumed == losses
    assert again.equal(weights)


def test_a_reference_of_another_model_is_noticed_at_step_0(tmp_path):
    wrong = job(tmp_path)
    other = score_reference(tiny_model("llama", seed=1), pairs(), "padded", 200)
    with pytest.raises(TrainingDiverged, match="step 0: policy and reference are the same model"):
        run(dataclasses.replace(wrong, pairs=other))


def test_stored_reference_equals_live_reference(tmp_path):
    one = job(tmp_path)
    for pair in one.pairs:
        (live,) = score_reference(one.model, [pair], "padded", 1)
        assert live.reference_chosen == pytest.approx(pair.reference_chosen, abs=1e-5)
        assert live.reference_rejected == pytest.approx(pair.reference_rejected, abs=1e-5)


def test_divergence_names_the_step_and_keeps_no_bad_state(tmp_path):
    bad = job(tmp_path, learning_rate=1e30, max_grad_norm=None, warmup=0, checkpoint_every=1)
    with pytest.raises(
        TrainingDiverged,
        match=r"step 2: loss .*; the gradient of model\.embed_tokens\.weight .* is not finite\. .*step-00000001",
    ):
        run(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def poisoned(folder: Path, **settings: object) -> Job:
    """A job in which the loss of pair p4 is not a number, once in each epoch."""
    one = job(folder, **settings)
    return dataclasses.replace(
        one, pairs=[dataclasses.replace(p, weight=math.nan if p.pair_id == "p4" else 1.0) for p in one.pairs]
    )


def test_a_loss_that_is_no_number_names_its_pair_and_the_last_good_policy(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step \d: loss nan, from pair p4, .* There is no training state yet"):
        run(poisoned(tmp_path))


def test_updates_are_skipped_up_to_a_cap_counted_and_exactly_resumed(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"from pair p4, .* after 1 updates were skipped"):
        run(poisoned(tmp_path / "one", skip_nonfinite=1))
    whole = poisoned(tmp_path / "two", skip_nonfinite=2)
    losses, weights = run(whole)
    assert whole.counts == {"skipped_updates": 2}
    assert len(losses) == 8 - 2
    assert weights.isfinite().all()
    for stop_after in range(1, 8):
        folder = tmp_path / f"stopped-{stop_after}"
        calls = itertools.count(1)
        with pytest.raises(Interrupted):
            train(poisoned(folder, skip_nonfinite=2), Quiet(), lambda c=calls, n=stop_after: next(c) == n)
        resumed = poisoned(folder, skip_nonfinite=2)
        assert run(resumed)[0] == losses
        assert resumed.counts == whole.counts


def test_weights_that_the_last_update_ruins_are_noticed(tmp_path, monkeypatch):
    one = job(tmp_path, epochs=1)

    def ruin(players, move):
        with torch.no_grad():
            one.model.model.norm.weight[0] = math.inf

    monkeypatch.setattr(update, "_step", ruin)
    one = dataclasses.replace(one, settings=one.settings.model_copy(update={"pairs_per_step": 10}))
    with pytest.raises(TrainingDiverged, match=r"the weights model\.norm\.weight are not finite after the last update"):
        train(one, Quiet(), lambda: False)


@pytest.mark.parametrize("part", ["weights", "moments"])
def test_a_missing_part_of_the_state_is_an_error_unless_it_is_waived(tmp_path, part):
    first, calls = job(tmp_path), itertools.count(1)
    with pytest.raises(Interrupted):
        train(first, Quiet(), lambda: next(calls) == 2)
    state = newest(tmp_path, torch.device("cpu"))
    name = "model.norm.weight"
    tensors = getattr(state, part)
    kept = {n: v for n, v in tensors.items() if not n.startswith(name)}
    shutil.rmtree(tmp_path / "step-00000002")
    save_state(tmp_path, dataclasses.replace(state, **{part: kept}))
    with pytest.raises(CorruptArtifact, match=rf"lacks {part} of model.norm.weight, .*waive_state=.{part}"):
        run(job(tmp_path))
    waived = job(tmp_path, waive_state=[part])
    run(waived)
    assert waived.counts == {"waived_state_parts": 1}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]),
    ],
)
def test_schedules(schedule, expected):
    settings = TrainSettings(learning_rate=1.0, warmup=0.2, schedule=schedule)
    assert [learning_rate(step, 10, settings) for step in range(10)] == pytest.approx(expected)


def test_every_step_is_logged_or_every_nth_and_the_last(tmp_path):
    curve = train(job(tmp_path, log_every=3), Quiet(), lambda: False)
    assert [row.step for row in curve] == [3, 6, 8]


def test_weights_of_pairs_scale_their_loss(tmp_path):
    one = job(tmp_path, pairs_per_step=10, epochs=1)
    doubled = dataclasses.replace(one, pairs=[dataclasses.replace(p, weight=2.0) for p in one.pairs])
    assert run(doubled)[0] == pytest.approx([2 * math.log(2)], abs=1e-5)


def test_the_memory_probe_takes_the_largest_microbatch_and_leaves_no_gradient(tmp_path, monkeypatch):
    one = job(tmp_path, tokens_per_microbatch=1)
    lengths = [len(p.context) + len(p.chosen) + len(p.rejected) for p in one.pairs]
    longest = lengths.index(max(lengths))
    seen = []
    accumulate = update._accumulate
    monkeypatch.setattr(update, "_accumulate", lambda *a, **k: (seen.append(a[1]), accumulate(*a, **k)))
    update.probe_memory(one, update.plan_of(one))
    assert seen == [[[longest]]]
    assert all(p.grad is None for p in one.model.parameters())


@pytest.mark.parametrize(("budget", "words"), [(10**6, "tokens_per_microbatch"), (1, r"train\.max_tokens")])
def test_memory_that_does_not_suffice_names_the_setting(tmp_path, budget, words):
    one = job(tmp_path, tokens_per_microbatch=budget)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    one.model.register_forward_pre_hook(fail)
    one.model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(ConfigError, match=words):
        update.probe_memory(one, update.plan_of(one))


def test_a_loss_that_couples_rows_is_never_split(tmp_path):
    whole = dataclasses.replace(job(tmp_path / "a", tokens_per_microbatch=10**6), loss=AOT())
    assert len(run(whole)[0]) == 8
    split = dataclasses.replace(job(tmp_path / "b", tokens_per_microbatch=1), loss=AOT())
    with pytest.raises(ConfigError, match=r"train\.tokens_per_microbatch: AOT compares all pairs"):
        run(split)
