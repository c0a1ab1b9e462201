"""What must not change a training step, for every file in `losses/`: layout, split, recomputation, when it is scored.

A new loss is found here without an edit. Losses that read views get pairs with these views, and losses that learn from
one completion at a time get pairs of which one side is absent.
"""

import dataclasses
import importlib
import pkgutil
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from prefloop import losses
from prefloop.errors import ConfigError
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import reads_squares, views_of
from prefloop.rows import TokenizedPair, TokenizedView
from prefloop.train import update
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.versus import versus
from tiny import tiny_model

PAIRS = 8
EVERYTHING = [list(range(PAIRS))]
ONE_BY_ONE = [[i] for i in range(PAIRS)]
Step = tuple[float, dict[str, torch.Tensor]]


def found() -> Iterator[type]:
    """The public dataclasses that the files of `losses/` define."""
    for module in pkgutil.iter_modules(losses.__path__, f"{losses.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            defined = vars(importlib.import_module(module.name)).values()
            here = [c for c in defined if isinstance(c, type) and c.__module__ == module.name]
            yield from (c for c in here if dataclasses.is_dataclass(c) and not c.__name__.startswith("_"))


every_loss = pytest.mark.parametrize("method", list(found()), ids=lambda method: method.__name__)


def pairs(method: type) -> list[TokenizedPair]:
    """Pairs of which some have a prompt or a completion in common, with all that `method` reads, unscored."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 90) for _ in range(draw.randint(low, high)))

    contexts = [ids(1, 12) for _ in range(PAIRS // 2)]
    sides = [(ids(1, 10), ids(1, 10)) for _ in range(PAIRS)]
    sides[1] = (sides[0][0], sides[1][1])
    names = views_of(method())
    one_sided = method().consumes == "unpaired"
    made = []
    for i, (chosen, rejected) in enumerate(sides):
        context = contexts[i // 2]
        views = tuple(
            TokenizedView(name, (ids(2, 5) if v % 2 else ()) + context, ids(1, 8), None) for v, name in enumerate(names)
        )
        if one_sided:
            # The loss of a trainer that makes its own completions sees no rejected ones.
            good = i % 2 or getattr(method, "needs_trainer", False)
            chosen, rejected = (chosen, ()) if good else ((), rejected)
        made.append(TokenizedPair(f"p{i}", context, chosen, rejected, None, None, 0.6 + i / 20, 0.5 + i / 4, views))
    return made


def job(method: type, layout: str, checkpointing: bool = False) -> Job:
    """A policy, and pairs that hold the log-probs of a reference that is another model."""
    model = tiny_model("llama").requires_grad_(True)
    if checkpointing:
        checkpoint_activations(model)
    scored = pairs(method)
    if method().needs_reference:
        scored = score_reference(reference(), scored, "padded", 64)
    return Job(
        model=model,
        pairs=scored,
        loss=method(),
        settings=TrainSettings(pairs_per_step=PAIRS, tokens_per_microbatch=1),
        layout=layout,
        seed=0,
        state_folder=Path("unused"),
        reference=None,
        starts_at_reference=False,
    )


def reference() -> torch.nn.Module:
    """The policy, moved a little: log-ratios are neither 0 nor so large that a loss is flat there."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@cache
def shared_step(method: type) -> Step:
    """What several tests compare with."""
    return step(job(method, "shared"))


def step(one: Job, microbatches: Sequence[Sequence[int]] = EVERYTHING) -> Step:
    """Loss and gradient of an optimizer step, as the update loop makes them."""
    totals = update._accumulate(one, microbatches, check_start=False)
    gradients = {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}
    one.model.zero_grad()
    assert any(gradient.any() for gradient in gradients.values())
    return float(totals.sums["loss"]), gradients


def assert_same(got: Step, expected: Step) -> None:
    assert got[0] == pytest.approx(expected[0], rel=2e-5, abs=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        gap = (got[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert gap < 1e-4, (name, float(gap))


@every_loss
def test_padded_packed_and_shared_take_the_same_step(method):
    expected = step(job(method, "padded"))
    assert_same(step(job(method, "packed")), expected)
    assert_same(shared_step(method), expected)


@every_loss
def test_eight_microbatches_of_one_are_one_of_eight(method):
    one = job(method, "shared")
    if getattr(one.loss, "couples_rows", False):
        with pytest.raises(ConfigError, match=r"train\.tokens_per_microbatch: .* compares all pairs of a step"):
            update.require_whole_steps(one, update.plan_of(one))
        return
    update.require_whole_steps(one, update.plan_of(one))
    assert_same(step(one, ONE_BY_ONE), shared_step(method))


@every_loss
def test_recomputed_activations_take_the_same_step(method):
    assert_same(step(job(method, "shared", checkpointing=True)), shared_step(method))


@every_loss
def test_stored_reference_log_probs_are_live_ones(method):
    one = job(method, "shared")
    if not one.loss.needs_reference:
        with_any = [dataclasses.replace(p, reference_chosen=(7.0,), reference_rejected=None) for p in one.pairs]
        assert_same(step(dataclasses.replace(one, pairs=with_any)), shared_step(method))
        return
    names = views_of(one.loss)
    squares = reads_squares(one.loss)
    policy = pair_logps(one.model, one.pairs, "shared", needs_reference=False, views=names, squares=squares)
    with torch.no_grad():
        live = pair_logps(reference(), one.pairs, "packed", needs_reference=False, views=names)
    both = versus(policy, live)
    loss = (one.loss(both).loss * both.weight).sum()
    (loss / PAIRS).backward()
    gradients = {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}
    one.model.zero_grad()
    assert_same(step(one), (float(loss.detach()), gradients))
