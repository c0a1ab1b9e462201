"""The round exit `combine`: the policy is the first one plus a weighted sum of every domain's module (COFS-DPO)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.artifact import Artifact
from prefloop.errors import ConfigError
from prefloop.models import adapters, causal_lm
from prefloop.recipe import CombineSettings
from prefloop.rows import PolicyRef, TokenizedPair
from prefloop.train.combination import fit_coefficients
from prefloop.train.job import Job
from prefloop.train.store import PairStore


@dataclass(frozen=True)
class Past:
    """Modules of earlier rounds that were promoted, and the pairs that each was trained on, oldest first."""

    modules: tuple[PolicyRef, ...] = ()
    pairs: tuple[Artifact[TokenizedPair], ...] = ()

    @property
    def inputs(self) -> dict[str, str]:
        """What the key of a stage that combines says of them."""
        found = {f"module-{i}": module.digest for i, module in enumerate(self.modules)}
        return found | {f"memory-{i}": batches.digest for i, batches in enumerate(self.pairs)}


NOTHING_PAST = Past()


def combined(
    job: Job, base: Path, module: Path, past: Past, settings: CombineSettings, own: Artifact[TokenizedPair]
) -> tuple[Any, dict[str, Any]]:
    """Return the first policy plus Σ γ_d · ΔW_d over `past` and the new module, and the facts of the choice.

    Exact: the products (alpha/rank)·B·A are added, not the factors. γ is 1 for a single module.

    Raises:
        ConfigError: as many coefficients are given as there are not modules.

    """
    folders = [Path(ref.path) / "adapter" for ref in past.modules] + [module]
    names = [f"domain-{i}" for i in range(len(folders))]
    plain = causal_lm.load(str(base), precision="fp32", device=job.settings.device, cache=False).model
    model = adapters.load_adapters(plain, dict(zip(names, folders, strict=True)))
    facts: dict[str, Any] = {"combine_rule": settings.rule}
    if len(names) == 1:
        coefficients = {names[0]: 1.0}
    elif settings.rule == "given":
        coefficients = dict(zip(names, _given(settings, len(names)), strict=True))
    elif settings.rule == "uniform":
        coefficients = dict.fromkeys(names, 1 / len(names))
    else:
        memory = [pair for batches in (*past.pairs, own) for pair in _drawn(batches, settings.memory, job.seed)]
        fit = fit_coefficients(replace(job, model=model, pairs=memory), names, settings.rule, settings.steps)
        coefficients = fit.coefficients
        facts |= {"memory_pairs": len(memory), "memory_loss": fit.loss, "memory_loss_equal_shares": fit.equal_loss}
    return adapters.combine_products(model, coefficients), facts | {"coefficients": coefficients}


def _given(settings: CombineSettings, modules: int) -> tuple[float, ...]:
    given = settings.coefficients or ()
    if len(given) < modules:
        raise ConfigError(
            f"combine.coefficients: {len(given)} given, but there are {modules} modules; give one for each round"
        )
    return given[:modules]


def _drawn(batches: Artifact[TokenizedPair], count: int, seed: int) -> Sequence[TokenizedPair]:
    """Return `count` pairs of a domain, drawn by the seed, in their own order."""
    store = PairStore(batches)
    chosen = np.random.default_rng(seed).permutation(len(store))[:count]
    return [store[int(i)] for i in np.sort(chosen)]
