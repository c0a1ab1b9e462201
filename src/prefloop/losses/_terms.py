"""Terms that several losses share, and the checks of their settings. Not a loss: no `kind` names this file."""

import math
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.errors import ConfigError
from prefloop.tensors import CompletionLogps, PairLogps


def refuse(kind: str, name: str, rule: str, value: object) -> NoReturn:
    """Raise ConfigError: setting `name` of the loss `kind` must be `rule` and is `value`."""
    raise ConfigError(f"loss.{name} (losses/{kind}.py): must be {rule}, got {value}")


def positive(kind: str, **settings: float) -> None:
    """Raise ConfigError unless every setting is a number > 0."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            refuse(kind, name, "> 0", value)


def not_negative(kind: str, **settings: float) -> None:
    """Raise ConfigError unless every setting is a number ≥ 0."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            refuse(kind, name, "≥ 0", value)


def noise_rate(kind: str, label_smoothing: float) -> None:
    """Raise ConfigError unless `label_smoothing` is in [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        refuse(kind, "label_smoothing", "in [0, 0.5)", label_smoothing)


def reference_of(logps: PairLogps) -> tuple[CompletionLogps, CompletionLogps]:
    """Return the reference's log-probs of (chosen, rejected). Raises ValueError where there are none."""
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError("losses/_terms.py: the reference log-probabilities are missing")
    return logps.reference_chosen, logps.reference_rejected


def mean_log_ratios(logps: PairLogps) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Return log π/π_ref of (chosen, rejected), each divided by its own length: nats per token."""
    chosen, rejected = logps.log_ratios()
    return chosen / logps.policy_chosen.length.clamp(min=1), rejected / logps.policy_rejected.length.clamp(min=1)


def smoothed(logit: Float[Tensor, " row"], label_smoothing: float) -> Float[Tensor, " row"]:
    """Return −(1 − ε)·log σ(logit) − ε·log σ(−logit), ε = label_smoothing."""
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def log1mexp(value: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Return log(1 − e^value) for value ≤ 0 without cancellation; values above −eps of the dtype count as −eps.

    Two formulas that meet at −ln 2. Each sees only arguments of its own side, because the gradient of the branch
    that `torch.where` drops would be NaN if it were infinite.
    """
    value = value.clamp(max=-torch.finfo(value.dtype).eps)
    near_zero = value > -math.log(2)
    inside = torch.where(near_zero, value, -1.0)
    outside = torch.where(near_zero, -1.0, value)
    return torch.where(near_zero, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(outside)))


def log_odds(scored: CompletionLogps) -> Float[Tensor, " row"]:
    """Return log(p / (1 − p)) of the length-normalized probability p = exp(mean log-prob)."""
    return scored.mean - log1mexp(scored.mean)


def matched_by_rank(values: Float[Tensor, " row"], others: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Return, for each row, the entry of `others` that has the rank in `others` that the row has in `values`.

    This is the optimal transport map between two samples of equal size on a line.
    """
    rank = values.argsort(stable=True).argsort(stable=True)
    return others.sort(stable=True).values[rank]
