"""Published settings of losses, by name, each with its source. Not a loss: no `kind` names this file.

A preset says what the loss is and what its source trained it with: a layer of a recipe, `{loss: …, train: …}`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prefloop.errors import ConfigError

_INDEX = "as TRL's index of papers gives the settings"
_SIMPO = "arXiv 2405.14734: the authors' README and configurations"


@dataclass(frozen=True)
class Preset:
    """Settings of a loss and of its training, and where they were published."""

    source: str
    loss: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)

    def layer(self) -> dict[str, Any]:
        """Return the settings as a layer of a recipe."""
        return {"loss": dict(self.loss)} | ({"train": dict(self.train)} if self.train else {})


def preset(name: str) -> Preset:
    """Return the preset `name`.

    Raises:
        ConfigError: there is none.

    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"preset: no {name!r}; {hint}")


def _simpo(beta: float, ratio: float, learning_rate: float) -> Preset:
    """SimPO: `ratio` is the authors' gamma_beta_ratio, whose product with beta is our gamma."""
    train = {"learning_rate": learning_rate, "pairs_per_step": 128, "schedule": "cosine", "warmup": 0.1, "epochs": 1}
    return Preset(_SIMPO, {"kind": "simpo", "beta": beta, "gamma": round(beta * ratio, 10)}, train)


def _indexed(arxiv: str, learning_rate: float, pairs_per_step: int, **loss: Any) -> Preset:
    train = {"learning_rate": learning_rate, "pairs_per_step": pairs_per_step}
    return Preset(f"arXiv {arxiv}, {_INDEX}", loss, train)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "dpo": _indexed("2305.18290", 1e-6, 64, kind="dpo", beta=0.1),
        "robust_dpo": _indexed("2403.00409", 1e-3, 16, kind="robust_dpo", beta=0.01, label_smoothing=0.1),
        "exo": _indexed("2402.00856", 1e-6, 64, kind="exo", beta=0.1),
        "nca": _indexed("2402.05369", 5e-6, 32, kind="nca", beta=0.01),
        "bco": _indexed("2404.04656", 5e-7, 128, kind="bco", beta=0.01),
        "sppo": _indexed("2405.00675", 5e-7, 64, kind="sppo", beta=1e-3, form="hard"),
        "discopop": _indexed("2406.08414", 5e-7, 64, kind="discopop", beta=0.05, tau=0.05),
        "apo_zero": _indexed("2408.06266", 2e-7, 64, kind="apo_zero", beta=0.1),
        "apo_down": _indexed("2408.06266", 2e-7, 64, kind="apo_down", beta=0.1),
        "simpo_mistral_base": _simpo(2.0, 0.8, 3e-7),
        "simpo_mistral_instruct": _simpo(2.5, 0.1, 5e-7),
        "simpo_llama3_base": _simpo(2.0, 0.5, 6e-7),
        "simpo_llama3_instruct": _simpo(2.5, 0.55, 1e-6),
        "simpo_llama3_instruct_v2": _simpo(10.0, 0.3, 1e-6),
        "simpo_gemma2_9b_it": _simpo(10.0, 0.5, 8e-7),
        "orpo": Preset("arXiv 2403.07691", {"kind": "orpo", "lam": 0.1}, {"learning_rate": 5e-6}),
        "cpo": Preset("arXiv 2401.08417", {"kind": "cpo", "beta": 0.1, "alpha": 1.0}),
        "slic": Preset("arXiv 2305.10425, in the code of HALOs", {"kind": "slic", "delta": 1.0, "lam": 0.1}),
        "ld_dpo": Preset("arXiv 2409.06411, as TRL's documentation gives it", {"kind": "ld_dpo", "alpha": 0.5}),
        "iterative_rpo": Preset("arXiv 2404.19733", {"kind": "rpo", "alpha": 1.0}),
        "rpo_regularized": Preset("arXiv 2405.16436, as TRL's documentation gives it", {"kind": "rpo", "alpha": 0.005}),
        "mpo": Preset(
            "arXiv 2411.10442, as TRL's documentation gives it",
            {
                "kind": "mixture",
                "parts": (
                    {"kind": "dpo", "weight": 0.8},
                    {"kind": "bco", "weight": 0.2, "beta": 0.1},
                    {"kind": "sft", "weight": 1.0},
                ),
            },
            {"learning_rate": 5e-6},
        ),
        "ln_dpo_tulu3_8b": Preset(
            "Tulu 3, arXiv 2411.15124; the paper of LN-DPO gives no values that were found",
            {"kind": "ln_dpo", "beta": 5.0},
            {"learning_rate": 5e-7, "pairs_per_step": 128, "schedule": "linear", "warmup": 0.1, "epochs": 1},
        ),
        "ln_dpo_tulu3_70b": Preset(
            "Tulu 3, arXiv 2411.15124; the paper of LN-DPO gives no values that were found",
            {"kind": "ln_dpo", "beta": 5.0},
            {"learning_rate": 2e-7, "pairs_per_step": 128, "schedule": "linear", "warmup": 0.1, "epochs": 1},
        ),
        "kto": Preset(
            "arXiv 2402.01306: the authors' code",
            {"kind": "kto", "beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0},
            {"learning_rate": 5e-6, "pairs_per_step": 32, "epochs": 1, "max_grad_norm": 5.0},
        ),
    }
)
"""By name. Where a field is not named, its source does not say, and it keeps its default."""
