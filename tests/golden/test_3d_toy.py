"""The toy of 3D-Properties (arXiv 2406.07327): shared parameters degrade and disperse, free logits do not.

The paper's figures 1 to 3 show it; the numbers here are those of an independent repetition in NumPy (ten seeds), as the
paper gives neither widths nor optimizer. The policies and the training are in `tools/displacement_toy.py`.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from prefloop.evaluate.bootstrap import paired_bootstrap
from prefloop.evaluate.displacement import CHOSEN, REJECTED, Evidence, Scored, change, diagnose, fall_from_peak
from prefloop.losses.dpo import DPO
from prefloop.losses.dpo_sft import DPOSFT
from prefloop.losses.flex_dpo import FlexDPO
from prefloop.rows import Metric

TOOL = Path(__file__).resolve().parents[2] / "tools" / "displacement_toy.py"
SEEDS = list(range(10))
EPOCHS = 2000


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("displacement_toy", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared(toy):
    return toy.train(toy.Networks(toy.start_of([2] * len(SEEDS)), SEEDS), DPO(beta=0.02), EPOCHS)


@pytest.fixture(scope="module")
def free(toy):
    return toy.train(toy.FreeLogits(toy.start_of([1, 2, 3, 4])), DPO(beta=0.02), EPOCHS)


def over_prompts(values):
    """Mean over the prompts of each run: [epoch run]."""
    return values.mean(-1)


def between(curves, first: int, last: int) -> Evidence:
    """The toy between two epochs as a round of training; a completion is one token. Mass is compared within a run."""
    changes = {}
    for kind, values in ((CHOSEN, curves.chosen), (REJECTED, curves.rejected)):
        sides = zip(values[first].flatten().tolist(), values[last].flatten().tolist(), strict=True)
        changes[kind] = change([Scored(kind, str(i), 1, *side) for i, side in enumerate(sides)])
    before, after = over_prompts(curves.other)[[first, last]]
    rise, mean = paired_bootstrap((after - before).tolist()), before.mean().item()
    unseen = Metric(mean + rise.value, mean + rise.low, mean + rise.high, rise.n, "share")
    return Evidence(changes, unseen, mean, curve=curves.chosen.mean((1, 2)).tolist()[first : last + 1])


def test_every_run_starts_where_the_paper_says(toy, shared):
    start = shared.chosen[0].exp()
    assert (start - 0.02).abs().max() < 0.003
    assert (shared.rejected[0].exp() - 0.12).abs().max() < 0.003


def test_with_shared_parameters_the_chosen_completion_rises_and_falls(shared):
    chosen = over_prompts(shared.chosen.exp())
    peaks, ends = chosen.max(0).values, chosen[-1]
    assert ((peaks - ends) > 0.05).sum() >= 9  # the repetition: ten of ten
    assert peaks.mean() == pytest.approx(0.50, abs=0.08)
    assert ends.mean() == pytest.approx(0.27, abs=0.05)  # 1/4: the network hardly tells the prompts apart


def test_with_shared_parameters_the_lost_mass_goes_to_completions_outside_the_pair(shared):
    other = over_prompts(shared.other)
    assert ((other[-1] - other.min(0).values) > 0.05).sum() >= 9


def test_with_shared_parameters_the_rejected_completion_drops_out_of_sight(shared):
    assert over_prompts(shared.rejected)[500].mean() / math.log(10) == pytest.approx(-127, abs=15)


def test_free_logits_do_not_degrade(free):
    assert (free.chosen.diff(dim=0) > 0).all()
    assert (free.chosen[-1] > free.chosen[0] + 0.5).all()


def test_the_diagnosis_beyond_the_peak_names_all_three_properties(shared):
    peak = int(over_prompts(shared.chosen.exp()).mean(1).argmax())
    found = diagnose(between(shared, peak, EPOCHS)).findings
    assert {name: f.present for name, f in found.items()} == {
        "drastic_drop": True,
        "degradation": True,
        "dispersion": True,
    }


def test_the_fall_within_training_shows_in_the_curve(shared, free):
    assert fall_from_peak(shared.chosen.mean((1, 2)).tolist()) > 1
    assert fall_from_peak(free.chosen.mean((1, 2)).tolist()) == 0


def test_the_diagnosis_of_free_logits_names_neither_degradation_nor_dispersion(free):
    found = diagnose(between(free, 0, EPOCHS))
    assert not found.names_degradation
    assert not any(f.present for f in found.findings.values())


@pytest.mark.parametrize("scenario", [1, 4])
def test_the_papers_remedy_keeps_the_chosen_completion_up(toy, scenario):
    runs = toy.Networks(toy.start_of([scenario] * 5), SEEDS[:5])
    curves = toy.train(runs, DPOSFT(beta=0.1, gamma=1e-3), EPOCHS)
    assert over_prompts(curves.chosen.exp())[-1].min() > 0.85


def test_flex_dpo_on_free_logits_pushes_completions_outside_the_pair_down(toy):
    """dL/dθ_j = c·(−β⁺[j = w] + β⁻[j = l] + (β⁺ − β⁻)·π_j), c = σ(−u): differentiated by hand."""
    plus, minus = 0.1, 0.03
    policy = toy.FreeLogits(toy.start_of([2]))
    reference = policy().detach()
    with torch.no_grad():
        policy.logits += torch.linspace(-1, 1, policy.logits.numel()).view_as(policy.logits)
    logps = policy()
    toy_loss = FlexDPO(beta_plus=plus, beta_minus=minus)(toy.as_pairs(logps, reference)).loss.sum()
    toy_loss.backward()
    log_ratio = (logps - reference).detach()[0]
    for prompt in range(4):
        chosen, rejected = int(toy.CHOSEN[prompt]), int(toy.REJECTED[prompt])
        c = torch.sigmoid(-(plus * log_ratio[prompt, chosen] - minus * log_ratio[prompt, rejected]))
        expected = c * (plus - minus) * logps.detach()[0, prompt].exp()
        expected[chosen] -= c * plus
        expected[rejected] += c * minus
        torch.testing.assert_close(policy.logits.grad[0, prompt], expected)
        assert (expected[[8, 9]] > 0).all()
