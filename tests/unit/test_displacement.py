"""The 3D diagnosis: against the paper's published numbers, closed forms, and what the trainer's gradients must be."""

import dataclasses
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from prefloop.components import build
from prefloop.evaluate import displacement as d
from prefloop.evaluate.displacement_charts import displacement_charts
from prefloop.evaluate.remedies import FAMILY, TURNING_POINT, advice, remedy
from prefloop.losses.dpo import DPO
from prefloop.losses.dpo_sft import DPOSFT
from prefloop.losses.flex_dpo import FlexDPO
from prefloop.losses.sft import SFT
from prefloop.losses.simpo import SimPO
from prefloop.protocols import Quiet
from prefloop.recipe import Spec
from prefloop.rows import Completion, Metric, TokenizedPair
from prefloop.tensors import CompletionLogps, PairLogps
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import train
from tiny import tiny_model

TABLE_7 = {
    ("13B", 1): ((-0.9181, -0.9681), (-0.9393, -0.9982)),
    ("13B", 2): ((-1.6776, -1.6265), (-0.9238, -1.2293)),
    ("13B", 3): ((-0.9461, -0.8786), (-1.7110, -1.8848)),
    ("13B", 4): ((-1.7468, -1.6617), (-1.7110, -1.8265)),
    ("33B", 1): ((-0.3603, -0.3629), (-0.3634, -0.3670)),
    ("33B", 2): ((-1.4314, -1.2734), (-0.3525, -0.4254)),
    ("33B", 3): ((-0.3460, -0.3439), (-1.1204, -1.4333)),
    ("33B", 4): ((-1.2838, -1.2273), (-1.1451, -1.2234)),
}
"""Mean log-prob per token of chosen and rejected, before and after DPO: arXiv 2406.07327, table 7."""


def about(value: float, reach: float = 1e-4, unit: str = "nats per token") -> Metric:
    return Metric(value, value - reach, value + reach, 100, unit)


def evidence(chosen: float, rejected: float, **more) -> d.Evidence:
    return d.Evidence({d.CHOSEN: about(chosen), d.REJECTED: about(rejected)}, **more)


def present(found: d.Diagnosis) -> set[str]:
    return {name for name, finding in found.findings.items() if finding.present}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (("13B", 1), {"degradation"}),
        (("13B", 2), {"drastic_drop"}),
        (("13B", 3), {"drastic_drop"}),
        (("13B", 4), set()),
        (("33B", 1), set()),
        (("33B", 2), set()),
        (("33B", 3), {"drastic_drop"}),
        (("33B", 4), set()),
    ],
)
def test_the_papers_language_models(run, expected):
    (chosen_before, chosen), (rejected_before, rejected) = TABLE_7[run]
    found = d.diagnose(evidence(chosen - chosen_before, rejected - rejected_before))
    assert present(found) == expected


def test_the_fall_of_the_papers_best_run_is_no_alarm():
    # Table 8: with scenario 1 the 13B model rose from 6.0 to 7.9 and from 46.3 to 52.8 % right answers.
    fall = evidence(-0.05, -0.0589, metrics={"judge_score_gain": about(0.05, 0.01, "score")})
    found = d.diagnose(fall)
    assert present(found) == {"degradation"}
    assert not found.names_degradation
    assert "Harmless: the held-out score rose" in found.says


@pytest.mark.parametrize(
    ("metrics", "start", "because"),
    [
        ({}, {}, "no held-out score was measured"),
        ({"judge_score_gain": about(0.0, 0.1, "score")}, {}, "did not rise against the start"),
        ({"judge_score_gain": about(-0.3, 0.1, "score")}, {}, "is below the start's"),
        (
            {"judge_score_gain": about(0.3, 0.1, "score"), "judge_score_gain_best": about(-0.3, 0.1, "score")},
            {},
            "below that of the best so far",
        ),
        (
            {"judge_score_gain": about(0.3, 0.1, "score"), "repetition": about(0.2, 0.01, "share")},
            {"repetition": about(0.03, 0.01, "share")},
            "repetition rose from 0.030 to 0.200",
        ),
    ],
)
def test_a_fall_is_called_harmless_only_where_the_text_shows_it(metrics, start, because):
    found = d.diagnose(evidence(-0.1, -0.15, metrics=metrics, start=start))
    assert found.names_degradation
    assert because in found.says
    assert found.as_json()["names_degradation"]


def test_a_drop_of_the_rejected_alone_is_what_the_loss_is_for():
    found = d.diagnose(evidence(0.1, -0.5))
    assert present(found) == {"drastic_drop"}
    assert found.findings["drastic_drop"].harmless
    worse = d.diagnose(evidence(0.1, -0.5, metrics={"judge_score_gain": about(-0.3, 0.1, "score")}))
    assert not worse.findings["drastic_drop"].harmless


def test_dispersion_needs_both_falls_and_unseen_samples():
    many = Metric(0.3, 0.2, 0.4, 100, "share")
    assert "dispersion" in present(d.diagnose(evidence(-0.1, -0.15, unseen=many)))
    assert "dispersion" not in present(d.diagnose(evidence(0.1, -0.15, unseen=many)))
    assert "dispersion" not in present(d.diagnose(evidence(-0.1, 0.15, unseen=many)))
    assert "dispersion" not in present(d.diagnose(evidence(-0.1, -0.15, unseen=many, unseen_before=0.16)))


def test_a_fall_within_its_interval_of_nothing_is_none():
    wide = d.Evidence({d.CHOSEN: about(-0.1, 0.2), d.REJECTED: about(-0.1, 0.2)})
    assert present(d.diagnose(wide)) == set()


def test_without_rejected_completions_nothing_is_said_of_them():
    found = d.diagnose(d.Evidence({d.CHOSEN: about(0.2)}))
    assert present(found) == set()
    assert "no rejected completions" in found.says


def test_the_change_is_a_mean_over_tokens():
    rows = [d.Scored("chosen", "a", 10, -20.0, -15.0), d.Scored("chosen", "b", 30, -60.0, -75.0)]
    moved = d.change([*rows, d.Scored("chosen", "empty", 0, 0.0, 0.0)])
    assert (moved.value, moved.n) == (pytest.approx((5 - 15) / 40), 2)
    level = d.levels(rows)["chosen"]
    assert (level["before"], level["after"], level["length"]) == (-2.0, -2.25, 20.0)
    assert d.change([]) is None


def test_the_start_itself_has_the_typical_share_of_unseen_samples():
    start = np.random.default_rng(0).normal(size=20_000).tolist()
    assert d.unseen_share(start, [[v] for v in start]).value == pytest.approx(d.TYPICAL, abs=1e-4)
    # Shifted by the normal quantile, half of all samples lie below it.
    shift = NormalDist().inv_cdf(d.TYPICAL)
    assert d.unseen_share(start, [[v + shift] for v in start]).value == pytest.approx(0.5, abs=0.01)
    assert d.unseen_share(start, [[]]) is None
    assert d.unseen_share([], [[1.0]]) is None


def test_the_entropy_of_a_uniform_policy_is_the_logarithm_of_its_choices():
    def drawn(size: int) -> Completion:
        return Completion("c", "", (1,) * size, (-math.log(50),) * size, "stop", 0, "p")

    assert d.entropy([[drawn(3), drawn(7)], [drawn(5)]]).value == pytest.approx(math.log(50))
    assert d.entropy([[dataclasses.replace(drawn(3), sampler_logps=None)]]) is None


def test_a_rise_and_fall_is_seen_and_noise_is_not():
    rng = np.random.default_rng(3)
    hill = np.concatenate([np.linspace(0, 1, 50), np.linspace(1, 0.4, 50)])
    assert d.fall_from_peak((hill + rng.normal(0, 0.02, 100)).tolist()) == pytest.approx(0.5, abs=0.1)
    assert d.fall_from_peak(np.linspace(0, 1, 100).tolist()) == 0
    assert d.fall_from_peak([1.0] * 5 + [0.0] * 5) == 0  # too short to tell
    assert d.fall_from_peak([math.nan] * 100) == 0
    false_alarms = sum(d.fall_from_peak(rng.normal(0, 1, 100).tolist()) > 0 for _ in range(400))
    assert false_alarms < 0.05 * 400


def test_what_is_left_of_the_pull():
    assert d.remaining([4.0] * 10 + [2.0] * 80 + [1.0] * 10) == 0.25
    assert d.remaining([0.0, 1.0]) is None
    assert d.remaining([]) is None


# Remedies.


def logps(chosen: torch.Tensor, rejected: torch.Tensor) -> PairLogps:
    def side(values: torch.Tensor) -> CompletionLogps:
        return CompletionLogps(values, torch.ones_like(values, dtype=torch.bool))

    zero = torch.full_like(chosen.detach(), -1.0)
    ones = torch.ones(len(chosen), dtype=chosen.dtype)
    return PairLogps(side(chosen), side(rejected), side(zero), side(zero), ones, ones)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_remedy_pulls_the_chosen_completion_up_where_the_loss_has_let_go(kind):
    loss = build("loss", Spec(kind=kind))
    better = build("loss", Spec.model_validate(remedy(kind, dataclasses.asdict(loss))))
    assert better.needs_reference
    # Far beyond every margin: the rejected side has sunk by 4,000 nats.
    chosen = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    rejected = torch.full((1, 4), -1001.0, dtype=torch.float64)
    for one, least in ((loss, -1e-9), (better, 1e-3)):
        (gradient,) = torch.autograd.grad(one(logps(chosen, rejected)).loss.sum(), chosen)
        if kind != "ipo":  # which pulls chosen down again past its target
            assert (-gradient).sum() >= least
    difference = better(logps(chosen, rejected)).loss - loss(logps(chosen, rejected)).loss
    expected = 0.1 / 10 * 4 if kind == "dpo" else 1.0
    assert difference.item() == pytest.approx(expected, rel=1e-6)


def test_a_smoothed_dpo_keeps_its_smoothing():
    better = remedy("dpo", {"beta": 0.2, "label_smoothing": 0.1})
    assert better["parts"][0] == {"kind": "dpo", "beta": 0.2, "label_smoothing": 0.1}
    assert remedy("dpo", {"beta": 0.2, "label_smoothing": 0.0}) == {"kind": "dpo_sft", "beta": 0.2, "gamma": 0.02}


@pytest.mark.parametrize("kind", ["simpo", "orpo", "cpo", "sft", "kto", "rpo", "dpop", "dpo_sft", "./my.py:Loss"])
def test_losses_without_a_remedy(kind):
    assert remedy(kind, {}) is None


def test_the_turning_point_of_the_smaller_beta():
    """|∂L/∂log π(y_l)| grows with β⁻ below it and shrinks above it, for a = 0."""

    def push(beta_minus: float, b: float) -> float:
        rejected = torch.tensor([[-1.0 + b]], dtype=torch.float64, requires_grad=True)
        chosen = torch.tensor([[-1.0]], dtype=torch.float64)
        loss = FlexDPO(beta_plus=0.1, beta_minus=beta_minus)(logps(chosen, rejected)).loss.sum()
        return float(torch.autograd.grad(loss, rejected)[0])

    for x, grows in ((TURNING_POINT - 0.02, True), (TURNING_POINT + 0.02, False)):
        b = -x / 0.08
        assert (push(0.08 + 1e-4, b) > push(0.08, b)) is grows


def test_advice_depends_on_how_far_the_rejected_side_has_sunk():
    found = d.diagnose(evidence(-0.1, -0.5))
    settings = {"beta": 0.1, "label_smoothing": 0.0}
    near, far = advice(found, "dpo", settings, -0.5), advice(found, "dpo", settings, -6.0)
    assert "train.remedy=auto (loss.kind dpo_sft)" in near
    assert "or loss.kind=flex_dpo with beta_minus below beta_plus" in near
    assert "flex_dpo) would not help: at β·|b| = 6.0" in far
    assert "remedy=auto" not in advice(found, "simpo", {}, None)
    assert advice(d.diagnose(evidence(0.1, -0.1)), "dpo", settings, -0.5) == ""


# What the trainer logs.


def curve_of(loss, folder: Path, **settings):
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 90, (size,), generator=generator).tolist())

    rows = [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(7)]
    model = tiny_model("llama")
    scored = score_reference(model, rows, "padded", 200)
    wanted = {"learning_rate": 1e-2, "pairs_per_step": 7, "epochs": 3, "warmup": 0, **settings}
    chosen = TrainSettings.model_validate(wanted)
    job = Job(model.requires_grad_(True), scored, loss, chosen, "padded", 7, folder, None, True)
    return train(job, Quiet(), lambda: False)


@pytest.mark.parametrize("budget", [10**6, 1])
def test_dpo_pulls_at_both_sides_with_beta_times_the_saturation(tmp_path, budget):
    for row in curve_of(DPO(beta=0.3), tmp_path, tokens_per_microbatch=budget):
        assert row.chosen_gradient == pytest.approx(0.3 * row.saturation, rel=1e-5)
        assert row.rejected_gradient == pytest.approx(0.3 * row.saturation, rel=1e-5)


def test_other_losses_pull_as_their_equations_say(tmp_path):
    for row in curve_of(DPOSFT(beta=0.3, gamma=0.05), tmp_path / "a"):
        assert row.chosen_gradient == pytest.approx(0.3 * row.saturation + 0.05, rel=1e-5)
        assert row.rejected_gradient == pytest.approx(0.3 * row.saturation, rel=1e-5)
    first = curve_of(FlexDPO(beta_plus=0.3, beta_minus=0.1), tmp_path / "b")[0]
    assert (first.chosen_gradient, first.rejected_gradient) == (pytest.approx(0.15), pytest.approx(0.05))
    assert all(row.rejected_gradient == 0 < row.chosen_gradient for row in curve_of(SFT(), tmp_path / "c"))
    # SimPO at one pair a step: β·σ(γ − β(s_w − s_l))/n_w, and the same over n_l.
    for row in curve_of(SimPO(beta=2.0), tmp_path / "d", pairs_per_step=1):
        ratio = row.chosen_gradient / row.rejected_gradient
        assert any(ratio == pytest.approx(n_l / n_w) for n_w in range(1, 12) for n_l in range(1, 12))


# What is drawn.


def test_charts_leave_out_what_was_not_measured():
    moved = {"value": -0.1, "low": None, "high": 0.1, "n": 5, "unit": "nats per token"}
    found = {"logps": {"chosen": {"change": moved}}, "unseen": None, "entropy": None, "entropy_start": None}
    assert [c.title for c in displacement_charts([(0, found), (1, found)])] == ["The round's pairs"]
    assert displacement_charts([]) == []


def test_show_says_nothing_of_runs_without_a_diagnosis():
    assert d.displacement_lines({"round": 0}) == []
    found = {**d.diagnose(evidence(-0.1, -0.5)).as_json(), "try": "Try this.", "remedy": "loss dpo_sft"}
    assert [line.split()[0] for line in d.displacement_lines({"displacement": found})] == ["Drastic", "Try", "Remedy"]


def test_a_risen_score_far_from_the_start_is_not_called_harmless():
    gain = Metric(0.4, 0.3, 0.5, 100, "score")
    near, far = (Metric(kl, kl - 0.1, kl + 0.1, 100, "nats per token") for kl in (0.5, 4.8))
    found = [
        d.diagnose(evidence(-5.0, -5.0, metrics={"judge_score_gain": gain, "kl_policy_start": kl}, start={}))
        for kl in (near, far)
    ]
    assert [diagnosis.findings["degradation"].harmless for diagnosis in found] == [True, False]
    assert "far from the start" in found[1].says


def test_rollouts_have_no_sides_to_displace():
    moved = d.levels([d.Scored(d.ROLLOUTS, str(i), 4, -4.0, -8.0 - i) for i in range(3)])
    found = d.diagnose(
        d.Evidence(changes={d.ROLLOUTS: about(moved[d.ROLLOUTS]["change"]["value"], 0.1, "nats per token")})
    )
    assert present(found) == set()
    assert "neither chosen nor rejected" in found.says
    report = {"logps": moved, "unseen": None, "entropy": None, "entropy_start": None}
    assert [c.title for c in displacement_charts([(0, report)])] == ["Rollouts"]
