"""TR-DPO: the reference follows the policy as in TRL, stored log-probs are forgotten, resumed equals uninterrupted."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from trl import SyncRefModelCallback

from prefloop.errors import ConfigError, Interrupted
from prefloop.losses.dpo import DPO
from prefloop.losses.simpo import SimPO
from prefloop.models import causal_lm
from prefloop.models.adapters import add_lora, merge_lora, merged_weights
from prefloop.protocols import Quiet
from prefloop.rows import PolicyRef, StepLog, TokenizedPair
from prefloop.train.job import Job
from prefloop.train.moving_reference import MovingReference, follow
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import plan_of, train
from tiny import newest, save_tiny_policy, tiny_model


def pairs(count: int = 10) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 250, (size,), generator=generator).tolist())

    return [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(count)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicyRef:
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"))
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), -1)


def job(policy: PolicyRef, folder: Path, lora: bool = False, **settings: object) -> Job:
    model = causal_lm.load(policy.path, cache=False).model
    scored = score_reference(model, pairs(), "padded", 200)
    wanted = {"learning_rate": 3e-3, "pairs_per_step": 3, "epochs": 2, "layout": "padded", "warmup": 0.0, **settings}
    return Job(
        model=add_lora(model, 4, 8.0, seed=3) if lora else model.requires_grad_(True),
        pairs=scored,
        loss=DPO(beta=0.5),
        settings=TrainSettings.model_validate(wanted),
        layout="padded",
        seed=7,
        state_folder=folder,
        reference=policy,
        starts_at_reference=True,
    )


def weights(one: Job) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in one.model.parameters()])


def run(trainer: MovingReference, one: Job) -> tuple[list[StepLog], torch.Tensor]:
    return trainer(one, Quiet(), lambda: False), weights(one)


def updates(curve: list[StepLog]) -> list[float]:
    return [{e.name: e.value for e in row.extra}["reference_updates"] for row in curve]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("still", [MovingReference(every=None), MovingReference(every=1, share=0.0)])
def test_a_reference_that_stands_still_is_dpo_to_the_bit(lora, still, policy, tmp_path):
    one = job(policy, tmp_path / "a", lora)
    plain = train(one, Quiet(), lambda: False)
    curve, again = run(still, job(policy, tmp_path / "b", lora))
    assert curve == plain
    assert again.equal(weights(one))


@pytest.mark.parametrize("lora", [False, True])
def test_before_its_first_update_it_is_dpo_and_after_it_not(lora, policy, tmp_path):
    plain = train(job(policy, tmp_path / "a", lora), Quiet(), lambda: False)
    late, _ = run(MovingReference(every=100), job(policy, tmp_path / "b", lora))
    assert [dataclasses.replace(row, extra=()) for row in late] == plain
    curve, _ = run(MovingReference(every=3), job(policy, tmp_path / "c", lora))
    assert [dataclasses.replace(row, extra=()) for row in curve[:3]] == plain[:3]
    assert updates(curve) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert abs(curve[3].loss - plain[3].loss) > 1e-3


@pytest.mark.parametrize("lora", [False, True])
def test_a_hard_refresh_brings_the_loss_back_to_ln_2(lora, policy, tmp_path):
    curve, _ = run(MovingReference(every=2, share=1.0), job(policy, tmp_path, lora))
    assert [row.loss for row in curve[::2]] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert all(abs(row.loss - math.log(2)) > 1e-3 for row in curve[1::2])


@pytest.mark.parametrize("lora", [False, True])
def test_the_trajectory_is_that_of_a_loop_written_out_with_trls_update(lora, policy, tmp_path):
    """Own log-probs from the model's logits, torch's AdamW, and TRL's rule on merged copies."""
    one = job(policy, tmp_path / "a", lora, schedule="constant", max_grad_norm=None)
    reference = causal_lm.load(policy.path, cache=False).model.requires_grad_(False)
    trained = [p for p in one.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    losses = []
    for step, microbatches in enumerate(plan_of(one)):
        if step in (2, 4, 6):
            SyncRefModelCallback._sync_target_model(plain_copy(one.model, policy), reference, 0.7)
        rows = [one.pairs[i] for microbatch in microbatches for i in microbatch]
        margins = [margin(one.model, row) - margin(reference, row).detach() for row in rows]
        loss = -logsigmoid(0.5 * torch.stack(margins)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    settings = {"schedule": "constant", "max_grad_norm": None}
    curve, found = run(MovingReference(every=2, share=0.7), job(policy, tmp_path / "b", lora, **settings))
    assert [row.loss for row in curve] == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(found, weights(one), rtol=1e-2, atol=1e-4)


def margin(model: torch.nn.Module, row: TokenizedPair) -> torch.Tensor:
    totals = []
    for side in (row.chosen, row.rejected):
        logits = model(torch.tensor([[*row.context, *side]]), use_cache=False).logits[0, len(row.context) - 1 : -1]
        totals.append(logits.log_softmax(-1).gather(1, torch.tensor(side)[:, None]).sum())
    return totals[0] - totals[1]


def plain_copy(model: torch.nn.Module, policy: PolicyRef) -> torch.nn.Module:
    """The model's weights, merged where it has an adapter, in a model of its own."""
    copied = causal_lm.load(policy.path, cache=False).model
    if not isinstance(model, PeftModel):
        copied.load_state_dict(model.state_dict())
        return copied
    adapted = add_lora(copied, 4, 8.0)
    adapted.load_state_dict(model.state_dict())
    return merge_lora(adapted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_merged_weights_are_those_of_merging(architecture):
    model = add_lora(tiny_model(architecture), 4, 8.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = {name: value.clone() for name, value in merged_weights(model)}
    expected = dict(merge_lora(model).named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    plain = tiny_model(architecture)
    assert {n: v.data_ptr() for n, v in merged_weights(plain)} == {n: p.data_ptr() for n, p in plain.named_parameters()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_one_update_is_the_weighted_mean(share):
    reference, other = tiny_model("llama"), tiny_model("llama", seed=1)
    before = [p.detach().clone() for p in reference.parameters()]
    follow(reference, other, share)
    for found, start, end in zip(reference.parameters(), before, other.parameters(), strict=True):
        torch.testing.assert_close(found, (1 - share) * start + share * end)
    follow(other, other, 0.37)
    assert all(a.equal(b) for a, b in zip(other.parameters(), tiny_model("llama", seed=1).parameters(), strict=True))


def test_stored_log_probs_are_not_read_after_the_first_update(policy, tmp_path):
    trainer = MovingReference(every=2)
    curve, expected = run(trainer, job(policy, tmp_path / "a"))
    calls = itertools.count(1)
    with pytest.raises(Interrupted):
        trainer(job(policy, tmp_path / "b"), Quiet(), lambda: next(calls) == 2)
    one = job(policy, tmp_path / "b")
    stale = [dataclasses.replace(p, reference_chosen=None, reference_rejected=(math.nan,)) for p in one.pairs]
    resumed, found = run(trainer, dataclasses.replace(one, pairs=stale))
    assert resumed == curve
    assert found.equal(expected)
    with pytest.raises(ValueError, match="reference log-probs"):
        run(trainer, dataclasses.replace(job(policy, tmp_path / "c"), pairs=stale))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("stop_after", "every"), [(1, 100), (2, 100), (5, 2), (7, 3)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(lora, stop_after, every, policy, tmp_path):
    trainer = MovingReference(every=2, share=0.5)
    curve, expected = run(trainer, job(policy, tmp_path / "a", lora))
    calls = itertools.count(1)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 8"):
        trainer(job(policy, tmp_path / "b", lora, checkpoint_every=every), Quiet(), lambda: next(calls) == stop_after)
    state = newest(tmp_path / "b", torch.device("cpu"))
    assert any(name.startswith("reference.model.layers.0.") for name in state.weights)
    resumed, found = run(trainer, job(policy, tmp_path / "b", lora, checkpoint_every=every))
    assert resumed == curve
    assert found.equal(expected)


def test_the_models_that_others_read_are_not_moved(policy, tmp_path):
    shared = causal_lm.load(policy.path).model
    before = [p.clone() for p in shared.parameters()]
    run(MovingReference(every=1, share=1.0), job(policy, tmp_path))
    assert all(a.equal(b) for a, b in zip(causal_lm.load(policy.path).model.parameters(), before, strict=True))


def test_a_loss_without_reference_is_refused(policy, tmp_path):
    one = job(policy, tmp_path)
    with pytest.raises(ConfigError, match="moving_reference moves the reference, but SimPO has none"):
        run(MovingReference(), dataclasses.replace(one, loss=SimPO()))
    with pytest.raises(ConfigError, match="has none"):
        run(MovingReference(), dataclasses.replace(one, reference=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, r"trainer\.every: must be ≥ 1"),
        ({"share": -0.1}, r"trainer\.share: must be in \[0, 1\]"),
        ({"share": 1.1}, r"trainer\.share: must be in \[0, 1\]"),
        ({"share": math.nan}, r"trainer\.share: must be in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MovingReference(**fields)
