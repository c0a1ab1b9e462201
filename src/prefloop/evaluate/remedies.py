"""What to try where the 3D diagnosis (`displacement`) names harm: losses that hold the chosen completions up."""

from collections.abc import Mapping
from typing import Any

from prefloop.evaluate.displacement import Diagnosis

TURNING_POINT = 1.28
"""β⁻·|b| beyond which a smaller β⁻ makes the rejected completion fall faster: the root of x·σ(x) = 1, derived by us;
the paper says only that there is such a point. b = log π(y_l)/π_ref(y_l)."""
BETA_BY_GAMMA = 10.0
"""β/γ of the remedy. Ours: the paper gives γ no value; on its toy γ = β/10 keeps the chosen completion up to the end
in all four scenarios (`tests/golden/test_3d_toy.py`)."""
SFT_WEIGHT = 1.0
"""Weight of the mean log-prob that the remedy adds to other losses than DPO. Of Iterative RPO, arXiv 2404.19733."""

FAMILY = ("dpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "r_dpo", "ld_dpo", "ln_dpo", "flex_dpo")
"""Losses of a difference of log-ratios, which nothing keeps from sinking both sides: those that have a remedy."""


def remedy(kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the loss that keeps the chosen completions up, as a recipe names it; `None` where there is none.

    For DPO it is SFT-DPO of the paper, with DPO's beta and γ = β/`BETA_BY_GAMMA`; for the others of `FAMILY` a mixture
    of the loss as it is and the mean log-prob of the chosen completion, as in Iterative RPO. The paper's other remedy,
    Flex-DPO, only slows the fall of the rejected completion, and only up to `TURNING_POINT`; on the toy it helps less.

    Args:
        kind: of the loss.
        settings: its fields, all of them.

    """
    if kind not in FAMILY:
        return None
    if kind == "dpo" and not settings["label_smoothing"]:
        return {"kind": "dpo_sft", "beta": settings["beta"], "gamma": settings["beta"] / BETA_BY_GAMMA}
    return {"kind": "mixture", "parts": [{"kind": kind, **settings}, {"kind": "sft", "weight": SFT_WEIGHT}]}


def advice(found: Diagnosis, kind: str, settings: Mapping[str, Any], rejected_reward: float | None) -> str:
    """Return what to try, in words; "" where there is nothing to mend.

    Args:
        found: the diagnosis.
        kind: of the round's loss.
        settings: its fields, all of them.
        rejected_reward: mean implicit reward of the rejected completions at the end, β·b.

    """
    if all(f.harmless for f in found.findings.values()):
        return ""
    tries = []
    better = remedy(kind, settings)
    if found.names_degradation and better is not None:
        named = "dpo_sft" if better["kind"] == "dpo_sft" else f"mixture of {kind} and sft"
        tries.append(f"train.remedy=auto (loss.kind {named}), which holds the chosen completions up")
    reward = abs(rejected_reward) if kind in ("dpo", "flex_dpo") and rejected_reward is not None else None
    if reward is not None and reward < TURNING_POINT:
        tries.append("loss.kind=flex_dpo with beta_minus below beta_plus, which slows the fall of the rejected ones")
    tries.append("a lower train.learning_rate or fewer train.epochs")
    text = f"Try {'; or '.join(tries)}."
    if reward is None or reward < TURNING_POINT:
        return text
    return (
        f"{text} A smaller beta of the rejected side (flex_dpo) would not help: at β·|b| = {reward:.1f}, beyond "
        f"{TURNING_POINT}, it makes them fall faster."
    )
