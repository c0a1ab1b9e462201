"""What every file in `losses/` must do, with its default settings. A new loss is found here without an edit."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

from prefloop import losses
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps

ROWS, TOKENS = 4, 6
SIDES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def found() -> Iterator[type]:
    """The public dataclasses that the files of `losses/` define."""
    for module in pkgutil.iter_modules(losses.__path__, f"{losses.__name__}."):
        if module.name.rpartition(".")[2].startswith("_"):
            continue  # helpers that several losses share
        defined = vars(importlib.import_module(module.name)).values()
        methods = [
            c
            for c in defined
            if isinstance(c, type)
            and c.__module__ == module.name
            and dataclasses.is_dataclass(c)
            and not c.__name__.startswith("_")
        ]
        assert methods, f"{module.name}: no loss in it"
        yield from methods


LOSSES = list(found())
every_loss = pytest.mark.parametrize("method", LOSSES, ids=lambda method: method.__name__)


def side(seed: int, padding: int = 0) -> CompletionLogps:
    """Completions of 1 to TOKENS tokens; what lies outside the mask is noise that no loss may read."""
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(ROWS, TOKENS + padding, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    return CompletionLogps(values, torch.arange(TOKENS + padding) < lengths)


def pairs(needs_reference: bool) -> PairLogps:
    sides = {name: side(seed) for seed, name in enumerate(SIDES)}
    for one, other in (("reference_chosen", "policy_chosen"), ("reference_rejected", "policy_rejected")):
        sides[one] = CompletionLogps(sides[one].token_logps, sides[other].mask) if needs_reference else None
    win_prob = torch.linspace(0.6, 1.0, ROWS, dtype=torch.float64)
    return PairLogps(**sides, win_prob=win_prob, weight=torch.ones(ROWS, dtype=torch.float64))


def inputs(method: type) -> PairLogps:
    assert method.consumes == "pair", f"{method.__name__} consumes {method.consumes}: teach this suite how to make it"
    return pairs(method.needs_reference)


def change(logps: PairLogps, how) -> PairLogps:
    """Apply `how` to every side."""
    changed = {name: how(getattr(logps, name)) for name in SIDES if getattr(logps, name) is not None}
    return dataclasses.replace(logps, **changed)


def with_gradients(logps: PairLogps) -> PairLogps:
    changed = {
        name: CompletionLogps(getattr(logps, name).token_logps.clone().requires_grad_(True), getattr(logps, name).mask)
        for name in SIDES[:2]
    }
    return dataclasses.replace(logps, **changed)


@every_loss
def test_is_a_frozen_dataclass_that_says_what_it_needs(method):
    assert method.__dataclass_params__.frozen
    assert isinstance(method.needs_reference, bool)
    assert method.consumes in ("pair", "list", "labeled", "step")
    assert method.level in ("sequence", "token")
    assert "Departs from the paper" in method.__doc__
    assert "arXiv" in method.__doc__


@every_loss
def test_gives_one_finite_value_for_each_row_and_detached_rewards(method):
    output = method()(with_gradients(inputs(method)))
    assert isinstance(output, LossOutput)
    for value in (output.loss, output.chosen_reward, output.rejected_reward, *output.extra.values()):
        assert value.shape == (ROWS,)
        assert value.isfinite().all()
    assert output.loss.requires_grad
    assert not any(v.requires_grad for v in (output.chosen_reward, output.rejected_reward, *output.extra.values()))


@every_loss
def test_passes_gradcheck(method):
    logps = inputs(method)

    def loss(chosen, rejected):
        policy_chosen = CompletionLogps(chosen, logps.policy_chosen.mask)
        policy_rejected = CompletionLogps(rejected, logps.policy_rejected.mask)
        return method()(dataclasses.replace(logps, policy_chosen=policy_chosen, policy_rejected=policy_rejected)).loss

    values = [getattr(logps, name).token_logps.clone().requires_grad_(True) for name in SIDES[:2]]
    assert torch.autograd.gradcheck(loss, values)


@every_loss
def test_gradient_is_zero_outside_the_mask_and_reaches_some_token_inside(method):
    logps = with_gradients(inputs(method))
    method()(logps).loss.sum().backward()
    for scored in (logps.policy_chosen, logps.policy_rejected):
        assert scored.token_logps.grad is None or not scored.token_logps.grad[~scored.mask].any()
    gradients = [s.token_logps.grad for s in (logps.policy_chosen, logps.policy_rejected)]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@every_loss
def test_rows_do_not_depend_on_each_other(method):
    logps = inputs(method)
    order = torch.tensor([2, 0, 3, 1])
    moved = change(logps, lambda s: CompletionLogps(s.token_logps[order], s.mask[order]))
    moved = dataclasses.replace(moved, win_prob=logps.win_prob[order], weight=logps.weight[order])
    torch.testing.assert_close(method()(moved).loss, method()(logps).loss[order])


@every_loss
def test_padding_changes_nothing(method):
    logps = inputs(method)

    def pad(scored):
        more = torch.full((ROWS, 3), -7.0, dtype=torch.float64)
        mask = torch.cat([scored.mask, torch.zeros(ROWS, 3, dtype=torch.bool)], 1)
        return CompletionLogps(torch.cat([scored.token_logps, more], 1), mask)

    torch.testing.assert_close(method()(change(logps, pad)).loss, method()(logps).loss)


@every_loss
def test_the_trainers_weight_is_left_to_the_trainer(method):
    logps = inputs(method)
    heavier = dataclasses.replace(logps, weight=logps.weight * 3)
    assert torch.equal(method()(heavier).loss, method()(logps).loss)


@every_loss
def test_needs_reference_says_the_truth(method):
    without = pairs(needs_reference=False)
    if method.needs_reference:
        with pytest.raises(ValueError, match="reference"):
            method()(without)
    else:
        # `inputs` has none either: every other test has run without one.
        assert method()(without).loss.isfinite().all()
