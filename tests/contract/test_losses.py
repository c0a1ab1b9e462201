"""What every file in `losses/` must do, with its default settings. A new loss is found here without an edit."""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Iterator

import pytest
import torch

from prefloop import losses
from prefloop.errors import ConfigError
from prefloop.protocols import reads_squares, views_of
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps, ViewLogps

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


def view(seed: int, needs_reference: bool) -> ViewLogps:
    policy = side(seed)
    reference = CompletionLogps(side(seed + 1).token_logps, policy.mask) if needs_reference else None
    return ViewLogps(policy, reference)


def inputs(method: type) -> PairLogps:
    logps = pairs(method.needs_reference)
    views = {name: view(10 + 2 * i, method.needs_reference) for i, name in enumerate(views_of(method))}
    logps = dataclasses.replace(logps, views=views)
    if reads_squares(method):
        squares = -torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        sides = {name: dataclasses.replace(getattr(logps, name), log_squares=squares) for name in SIDES[:2]}
        logps = dataclasses.replace(logps, **sides)
    if method.consumes == "pair":
        return logps
    assert method.consumes == "unpaired", f"{method.__name__} consumes {method.consumes}: teach this suite to make it"
    return one_sided(logps)


def one_sided(logps: PairLogps) -> PairLogps:
    """Take the rejected side from even rows and the chosen one from odd rows."""
    even = torch.arange(ROWS) % 2 == 0
    absent = {"chosen": ~even, "rejected": even}

    def without(name: str) -> CompletionLogps | None:
        side = getattr(logps, name)
        return side and CompletionLogps(side.token_logps, side.mask & ~absent[name.rpartition("_")[2]][:, None])

    return dataclasses.replace(logps, **{name: without(name) for name in SIDES})


def change(logps: PairLogps, how) -> PairLogps:
    """Apply `how` to every side and view."""
    changed = {name: how(getattr(logps, name)) for name in SIDES if getattr(logps, name) is not None}
    views = {
        name: ViewLogps(how(found.policy), found.reference and how(found.reference))
        for name, found in logps.views.items()
    }
    return dataclasses.replace(logps, **changed, views=views)


def by_token(scored: CompletionLogps, how) -> CompletionLogps:
    """Apply `how` to everything that a side has for each token."""
    squares = None if scored.log_squares is None else how(scored.log_squares)
    return CompletionLogps(how(scored.token_logps), how(scored.mask), squares)


def with_gradients(logps: PairLogps) -> PairLogps:
    changed = {
        name: dataclasses.replace(
            getattr(logps, name), token_logps=getattr(logps, name).token_logps.clone().requires_grad_(True)
        )
        for name in SIDES[:2]
    }
    return dataclasses.replace(logps, **changed)


@every_loss
def test_is_a_frozen_dataclass_that_says_what_it_needs(method):
    assert method.__dataclass_params__.frozen
    assert isinstance(method.needs_reference, bool)
    assert method.consumes in ("pair", "unpaired", "list")
    assert method.level in ("sequence", "token")
    assert "Departs from the paper" in method.__doc__
    assert "arXiv" in method.__doc__


def out_of_range(method: type) -> Iterator[tuple[str, float]]:
    """Values that no objective can have for its number fields, whatever these are called."""
    for field in dataclasses.fields(method):
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            yield field.name, -1
        if isinstance(field.default, float):
            yield from ((field.name, value) for value in (math.nan, -math.inf, -1.0))
            if field.name in ("beta", "beta_plus", "tau"):
                yield field.name, 0.0
            if field.name == "label_smoothing":
                yield from ((field.name, value) for value in (0.5, 1.0))


@every_loss
def test_numbers_out_of_their_range_are_refused_by_file_and_field(method):
    for name, value in out_of_range(method):
        with pytest.raises(ConfigError, match=rf"^loss\.{name} \(losses/{method.__module__.rpartition('.')[2]}\.py\)"):
            method(**{name: value})


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
    if reads_squares(method):
        pytest.skip("its weights have no gradient by design: see tests/golden/test_wpo.py")
    logps = inputs(method)

    def loss(chosen, rejected):
        policy_chosen = dataclasses.replace(logps.policy_chosen, token_logps=chosen)
        policy_rejected = dataclasses.replace(logps.policy_rejected, token_logps=rejected)
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
    moved = change(logps, lambda s: by_token(s, lambda values: values[order]))
    moved = dataclasses.replace(moved, win_prob=logps.win_prob[order], weight=logps.weight[order])
    torch.testing.assert_close(method()(moved).loss, method()(logps).loss[order])


@every_loss
def test_padding_changes_nothing(method):
    logps = inputs(method)

    def pad(scored):
        def longer(values):
            return torch.cat([values, torch.full((ROWS, 3), -7.0).to(values)], 1)

        padded = by_token(scored, longer)
        return dataclasses.replace(padded, mask=torch.cat([scored.mask, torch.zeros(ROWS, 3, dtype=torch.bool)], 1))

    torch.testing.assert_close(method()(change(logps, pad)).loss, method()(logps).loss)


@every_loss
def test_the_trainers_weight_is_left_to_the_trainer(method):
    logps = inputs(method)
    heavier = dataclasses.replace(logps, weight=logps.weight * 3)
    assert torch.equal(method()(heavier).loss, method()(logps).loss)


@every_loss
def test_needs_reference_says_the_truth(method):
    logps = inputs(method)
    views = {name: ViewLogps(found.policy, None) for name, found in logps.views.items()}
    without = dataclasses.replace(logps, reference_chosen=None, reference_rejected=None, views=views)
    if method.needs_reference:
        with pytest.raises(ValueError, match="reference"):
            method()(without)
    else:
        assert method()(without).loss.isfinite().all()
