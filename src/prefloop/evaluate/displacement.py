"""The 3D diagnosis: what training did to the likelihoods, whether it harms, and what to try. Numbers in, words out.

Source: 3D-Properties, Yan et al. 2024, arXiv 2406.07327. It names three coupled effects of DPO's gradient:

- drastic drop: the rejected likelihood moves much faster than the chosen one;
- degradation: DPO stops steering the chosen completion, which falls with the rejected one;
- dispersion: chosen and rejected both fall, and completions outside the data gain.

The paper has no numbers for "much faster", "falls" or "gain", and measured dispersion on a toy only. All thresholds
here are ours, and so is the estimate of dispersion on a language model (`unseen_share`). In the paper's own table 7
the chosen likelihood fell in its best run only: a fall is no alarm by itself. So each property is called harmless or
not by the held-out score and the repetition of the text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefloop.evaluate.bootstrap import Interval, paired_bootstrap, ratio_bootstrap
from prefloop.evaluate.summary import metric_json, number, with_interval
from prefloop.evaluate.text_metrics import SHARE
from prefloop.rows import Completion, Metric

SIDES = CHOSEN, REJECTED = "chosen", "rejected"
"""Sides of the round's pairs, whose fall is diagnosed. The kinds below are reported beside them."""
ROLLOUTS = "rollouts"
"""What a policy gradient learned from in place of pairs: reported, not diagnosed."""
HELD_OUT_CHOSEN, HELD_OUT_REJECTED = "held_out_chosen", "held_out_rejected"
"""Best and worst candidate of held-out prompts, where the data hold some."""
GOLD, START_SAMPLES = "gold", "start_samples"
"""Reference answers of held-out prompts, and what the run's first policy wrote there."""

FALL = 0.01
"""Nats per token below which a change of a mean log-prob counts as none. Ours: the smallest changes in the paper's
table 7, 0.003 nats per token, came with better answers."""
DRASTIC = 2.0
"""How many times further than the chosen completions the rejected ones must have moved. Ours."""
TYPICAL = 0.05
"""Share of the first policy's own samples that count as unseen, by definition: its least likely ones. Ours."""
UNSEEN_RISE = 0.05
"""Rise of the share of unseen samples, or of the mass outside the pair, that counts as dispersion. Ours; it is the
rise by which our repetition of the paper's toy is tested."""
FAR = 1.0
"""KL to the start, nats per token, beyond which a risen score shows nothing. Ours: the gate's default."""
SLICES = 10
"""Slices of a training curve, of which the highest is compared with the last. Ours."""
FEWEST_STEPS = 4 * SLICES
"""Steps below which a curve is not looked at. Ours."""
BEYOND_NOISE = 3.0
"""Standard errors that a fall from the peak must exceed, because the highest slice is chosen by looking. Ours."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-prob of one completion, nats, summed over its `tokens`, before and after a round's training.

    `kind` is one of the names above; `item` is the id of its pair or prompt.
    """

    kind: str
    item: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Evidence:
    """What the diagnosis reads. `changes` are of log-probs, nats per token, after − before, by kind.

    `unseen` is the share of the policy's samples, or of its mass, on completions unlike those of the data and of the
    first policy; `unseen_before` is that of the policy that the round started from. `curve` is the mean log-prob or
    log-ratio of the chosen completions at each step, nats per token; `pull` the size of the loss's gradient by it.
    `metrics` and `start` are held-out metrics of the policy and of the run's first.
    """

    changes: Mapping[str, Metric]
    unseen: Metric | None = None
    unseen_before: float = TYPICAL
    curve: Sequence[float] = ()
    pull: Sequence[float] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    start: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One property: whether it is there, whether it does no harm, and the numbers in words."""

    present: bool
    harmless: bool
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """The three findings by name, and all of them in a few sentences."""

    findings: Mapping[str, Finding]
    says: str

    @property
    def names_degradation(self) -> bool:
        """Whether the chosen completions fell and nothing shows that this is harmless: what a remedy is for."""
        found = self.findings["degradation"]
        return found.present and not found.harmless

    def as_json(self) -> dict[str, Any]:
        """Return what `summary.json` holds."""
        properties = {
            name: {"present": f.present, "harmless": f.harmless, "why": f.why} for name, f in self.findings.items()
        }
        return {"says": self.says, "properties": properties, "names_degradation": self.names_degradation}


def diagnose(evidence: Evidence) -> Diagnosis:
    """Say which of the three properties is there and whether it is harmless.

    - drastic drop: the rejected completions fell (the interval lies below −`FALL`) and moved at least `DRASTIC` times
      as far as the chosen ones;
    - degradation: the chosen completions fell in the same sense, or rose and fell back within the round;
    - dispersion: chosen and rejected fell, and the share of unseen samples rose by more than `UNSEEN_RISE`.

    A property is harmless if the held-out score is above the start's and not below the best so far's, and neither
    repetition is above the start's nor the KL to the start above `FAR`, all by 95 % intervals. Without a held-out score
    nothing is shown to be harmless. A drop of the rejected completions alone is what the loss is for, and harmless
    unless the text or the score got worse.
    """
    chosen, rejected = evidence.changes.get(CHOSEN), evidence.changes.get(REJECTED)
    turn = fall_from_peak(evidence.curve)
    harmless, because = _harmless(evidence)
    fell = chosen is not None and chosen.high < -FALL
    sunk = rejected is not None and rejected.high < -FALL
    degraded = fell or turn > 0
    unseen = evidence.unseen
    spread = unseen is not None and unseen.low > evidence.unseen_before + UNSEEN_RISE
    drop = sunk and rejected is not None and (chosen is None or -rejected.value >= DRASTIC * abs(chosen.value))
    worse = bool(_worse(evidence))
    findings = {
        "drastic_drop": Finding(drop, not drop or harmless or not (degraded or worse), _say_drop(chosen, rejected)),
        "degradation": Finding(degraded, not degraded or harmless, _say_fall(chosen, fell, turn, evidence.pull)),
        "dispersion": Finding(
            degraded and sunk and spread,
            not (degraded and sunk and spread) or harmless,
            _say_unseen(unseen, evidence.unseen_before),
        ),
    }
    return Diagnosis(findings, _sentences(findings, because, paired=chosen is not None or rejected is not None))


def change(rows: Sequence[Scored], seed: int = 0) -> Metric | None:
    """Return the mean change of log-probs per token, with its interval over completions; `None` without tokens."""
    rows = [row for row in rows if row.tokens]
    if not rows:
        return None
    found = ratio_bootstrap([r.after - r.before for r in rows], [r.tokens for r in rows], seed=seed)
    return _metric(found, "nats per token", "mean over tokens, after − before the round's training")


def unseen_share(start: Sequence[float], ours: Sequence[Sequence[float]], seed: int = 0) -> Metric | None:
    """Return the share of samples that the first policy finds unlikelier than its own typical ones.

    This estimates the mass outside what is known: the paper's toy can add it up, a language model's cannot be. A
    sample counts as unseen where its mean log-prob per token under the first policy lies below the `TYPICAL` quantile
    of that policy's own samples; the first policy itself has a share of `TYPICAL`.

    Args:
        start: mean log-prob per token of each of the first policy's held-out samples, under itself.
        ours: for each held-out prompt, that of the new policy's samples, under the first policy.
        seed: of the bootstrap over prompts.

    """
    known = [values for values in ours if values]
    if not start or not known:
        return None
    bound = float(np.quantile(start, TYPICAL))
    shares = [float(np.mean([value < bound for value in values])) for values in known]
    found = paired_bootstrap(shares, seed=seed, bounds=SHARE)
    return _metric(found, "share", f"samples below the start's {100 * TYPICAL:g} % quantile of log-prob per token")


def entropy(groups: Iterable[Sequence[Completion]], seed: int = 0) -> Metric | None:
    """Return −mean log π of the policy's own samples, nats per token: its entropy where temperature is 1.

    Args:
        groups: the completions of each prompt; those without sampling log-probs are left out.
        seed: of the bootstrap over prompts.

    """
    logps = [[v for c in group for v in c.sampler_logps or ()] for group in groups]
    known = [values for values in logps if values]
    if not known:
        return None
    found = ratio_bootstrap([-sum(v) for v in known], [len(v) for v in known], seed=seed)
    return _metric(found, "nats per token", "−mean log π of own held-out samples, as drawn")


def fall_from_peak(curve: Sequence[float]) -> float:
    """Return how far a curve fell from its highest slice to its last one; 0 where that may be noise or is small.

    The curve is cut into `SLICES` equal slices. The fall counts beyond `BEYOND_NOISE` standard errors of the two
    slices' means and beyond `FALL`.
    """
    if len(curve) < FEWEST_STEPS or not np.isfinite(curve).all():
        return 0.0
    slices = np.array_split(np.asarray(curve, dtype=np.float64), SLICES)
    peak, last = max(slices[:-1], key=lambda s: float(s.mean())), slices[-1]
    noise = float(np.sqrt(peak.var(ddof=1) / len(peak) + last.var(ddof=1) / len(last)))
    fall = float(peak.mean() - last.mean())
    return fall if fall > FALL + BEYOND_NOISE * noise else 0.0


def _harmless(evidence: Evidence) -> tuple[bool, str]:
    """Return whether the held-out text shows that nothing was harmed, and why."""
    gain = evidence.metrics.get("judge_score_gain")
    worse = _worse(evidence)
    if worse:
        return False, worse
    if gain is None:
        return False, "no held-out score was measured"
    above = gain.low > 0
    return above, f"the held-out score {'rose' if above else 'did not rise'} against the start: {with_interval(gain)}"


def _worse(evidence: Evidence) -> str:
    """Return what demonstrably got worse; "" for nothing."""
    for name, whom in (("judge_score_gain", "the start's"), ("judge_score_gain_best", "that of the best so far")):
        gain = evidence.metrics.get(name)
        if gain is not None and gain.high < 0:
            return f"the held-out score is below {whom}: {with_interval(gain)}"
    now, before = evidence.metrics.get("repetition"), evidence.start.get("repetition")
    if now is not None and before is not None and now.low > before.high:
        return f"repetition rose from {number(before.value, 'share')} to {with_interval(now)}"
    far = evidence.metrics.get("kl_policy_start")
    if far is not None and far.low > FAR:
        return f"the policy is far from the start, so a risen score may be wrecked text: KL {with_interval(far)}"
    return ""


def _say_drop(chosen: Metric | None, rejected: Metric | None) -> str:
    if rejected is None:
        return "there are no rejected completions"
    text = f"rejected completions changed by {_signed(rejected)}"
    if chosen is None or not chosen.value:
        return text
    return f"{text}, {abs(rejected.value / chosen.value):.1f} times as far as the chosen ones"


def _say_fall(chosen: Metric | None, fell: bool, turn: float, pull: Sequence[float]) -> str:
    if chosen is None:
        return "there are no chosen completions"
    stayed = "did not fall" if chosen.value >= 0 else f"did not fall beyond {FALL} nats per token"
    text = f"chosen completions {'fell' if fell else stayed}: {_signed(chosen)}"
    if turn > 0:
        text = f"chosen completions rose and fell back by {number(turn, 'nats per token')} nats per token in the round"
    left = remaining(pull)
    return text if left is None else f"{text}; the loss's pull on them ended at {100 * left:.0f} % of its first size"


def _signed(moved: Metric) -> str:
    return f"{'+' if moved.value > 0 else ''}{with_interval(moved)}"


def _say_unseen(unseen: Metric | None, before: float) -> str:
    if unseen is None:
        return "the share of unseen samples was not measured"
    now = f"{number(100 * unseen.value, '%')} % [{100 * unseen.low:.1f}, {100 * unseen.high:.1f}]"
    return f"{now} of held-out samples are unlike the start's, {100 * before:.1f} % before"


def remaining(pull: Sequence[float]) -> float | None:
    """Return the last tenth of a curve as a share of its first tenth; `None` where the first is 0 or unknown."""
    if len(pull) < 2 or not np.isfinite(pull).all():
        return None
    size = max(1, len(pull) // SLICES)
    first = float(np.mean(pull[:size]))
    return float(np.mean(pull[-size:])) / first if first > 0 else None


def _sentences(findings: Mapping[str, Finding], because: str, paired: bool) -> str:
    present = {name: f for name, f in findings.items() if f.present}
    if not present and not paired:
        return "The round learned from rollouts, which are neither chosen nor rejected: there is nothing to displace."
    if not present:
        return f"No displacement: {findings['drastic_drop'].why}; {findings['degradation'].why}."
    named = [name.replace("_", " ") for name in present]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    text = f"{listed.capitalize()}: {'; '.join(f.why for f in present.values())}."
    if all(f.harmless for f in present.values()):
        alone = list(present) == ["drastic_drop"]
        return f"{text} Harmless: {findings['degradation'].why if alone else because}."
    return f"{text} Not harmless, as far as can be told: {because}."


def _metric(found: Interval, unit: str, estimator: str) -> Metric:
    return Metric(found.value, found.low, found.high, found.n, unit, estimator)


def levels(rows: Sequence[Scored], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return, by kind, mean log-prob per token before and after, the change, and tokens of a completion on average."""
    found = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind and row.tokens]
        moved = change(of_kind, seed)
        if moved is not None:
            tokens = sum(row.tokens for row in of_kind)
            found[kind] = {
                "before": sum(row.before for row in of_kind) / tokens,
                "after": sum(row.after for row in of_kind) / tokens,
                "change": metric_json(moved),
                "length": tokens / len(of_kind),
            }
    return found


def displacement_lines(entry: Mapping[str, Any]) -> list[str]:
    """Return what `prefloop show` prints of a round's entry in the summary; nothing for a run without a diagnosis."""
    found = entry.get("displacement")
    if found is None:
        return []
    remedy_line = f"Remedy in this round: {found['remedy']}." if found["remedy"] else ""
    return [line for line in (found["says"], found["try"], remedy_line) if line]
