"""How much of each domain's LoRA module goes into the policy: COFS-DPO's coefficients, fitted on a memory of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from prefloop.errors import ConfigError
from prefloop.models.adapters import mixed
from prefloop.protocols import views_of
from prefloop.train.batches import pair_logps
from prefloop.train.job import Job
from prefloop.train.plan import Plan
from prefloop.train.store import index_of
from prefloop.train.update import autocast

Rule = Literal["simplex", "free", "grid"]
Objective = Callable[[Tensor], tuple[float, Tensor]]
"""From coefficients `[module]` to the loss and its gradient `[module]`, all float64 on the CPU."""


@dataclass(frozen=True)
class Fit:
    """Coefficients by module, and the memory's mean loss with them and with equal shares."""

    coefficients: dict[str, float]
    loss: float
    equal_loss: float


def fit_coefficients(job: Job, modules: Sequence[str], rule: Rule = "simplex", steps: int = 20) -> Fit:
    """Choose γ in W + Σ γ_d · ΔW_d so that the mean loss over the memory `job.pairs` is small.

    COFS-DPO (Qi et al. 2024, arXiv 2406.05534) deploys such a combination; its rule for γ was not found, and this is a
    reading: the loss on a small memory of past domains and the current data. Only γ moves; no weight does. A module
    alone gets 1. The memory's pairs should hold log-probs of one common reference, the base.

    Args:
        job: the model with its modules (see `adapters.load_adapters`), the memory, the loss, and the settings for
            precision and microbatches. Nothing is written to its folder.
        modules: names of the adapters that take part, in order.
        rule: simplex: γ ≥ 0 with sum 1, by L-BFGS on their logits from equal shares. free: any γ, by L-BFGS from
            equal shares; a loss without a finite minimum, such as DPO's, lets them grow with `steps`. grid: of two
            modules, the best of `steps` + 1 points (g, 1 − g).
        steps: iterations, or parts of the grid, ≥ 1.

    Raises:
        ConfigError: no pairs, no modules or one that the model does not have, a rule that does not fit, or steps < 1.

    """
    model = job.model
    if not isinstance(model, PeftModel) or not len(job.pairs):
        raise ConfigError("train/combination.py: needs a model with LoRA modules, and at least one pair of memory")
    if rule not in ("simplex", "free", "grid") or steps < 1 or (rule == "grid" and len(modules) != 2):
        raise ConfigError(
            "train/combination.py: rule must be simplex, free, or grid for two modules, and steps ≥ 1, got "
            f"{rule!r} for {len(modules)} modules and {steps} steps"
        )

    def objective(gamma: Tensor) -> tuple[float, Tensor]:
        return _memory_loss(job, model, modules, gamma)

    equal = torch.full((len(modules),), 1 / max(1, len(modules)), dtype=torch.float64)
    equal_loss, _ = objective(equal)
    if len(modules) == 1:
        return Fit({modules[0]: 1.0}, equal_loss, equal_loss)
    gamma = minimise(objective, equal, rule, steps)
    loss, _ = objective(gamma)
    return Fit(dict(zip(modules, gamma.tolist(), strict=True)), loss, equal_loss)


def minimise(objective: Objective, start: Tensor, rule: Rule, steps: int) -> Tensor:
    """Return the coefficients with the smallest loss that `rule` finds from `start`."""
    if rule == "grid":
        points = [torch.tensor([k / steps, 1 - k / steps], dtype=torch.float64) for k in range(steps + 1)]
        return min(points, key=lambda point: objective(point)[0])
    free = (start.log() if rule == "simplex" else start.clone()).requires_grad_(True)
    optimizer = torch.optim.LBFGS([free], max_iter=steps, line_search_fn="strong_wolfe")

    def gamma() -> Tensor:
        return free.softmax(0) if rule == "simplex" else free

    def closure() -> float:
        optimizer.zero_grad()
        current = gamma()
        loss, gradient = objective(current.detach())
        current.backward(gradient)
        return loss

    optimizer.step(closure)
    return gamma().detach().clone()


def _memory_loss(job: Job, model: PeftModel, modules: Sequence[str], gamma: Tensor) -> tuple[float, Tensor]:
    """Return the mean loss over the memory and its gradient with respect to `gamma`."""
    pairs = job.pairs
    budget = job.settings.tokens_per_microbatch
    (microbatches,) = Plan(index_of(pairs), len(pairs), 1, job.seed, budget)
    leaf = gamma.to(model.device, torch.float32).requires_grad_(True)
    total = 0.0
    with mixed(model, dict(zip(modules, leaf.unbind(), strict=True))):
        for microbatch in microbatches:
            rows = [pairs[i] for i in microbatch]
            with autocast(model.device, job.settings.precision):
                logps = pair_logps(
                    model, rows, job.layout, needs_reference=job.loss.needs_reference, views=views_of(job.loss)
                )
            loss = (job.loss(logps).loss * logps.weight).sum() / len(pairs)
            # The way from the coefficients to their leaves is shared by all microbatches.
            loss.backward(retain_graph=True)
            total += float(loss.detach())
    assert leaf.grad is not None  # backward has filled it
    return total, leaf.grad.double().cpu()
