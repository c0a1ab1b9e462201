"""A weighted sum of other losses."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError

from prefloop.errors import ConfigError
from prefloop.losses._terms import refuse
from prefloop.tensors import LossOutput, PairLogps

PLACE = "loss.parts (losses/mixture.py)"


def mpo() -> tuple[Mapping[str, Any], ...]:
    """Return the parts of Mixed Preference Optimization: quality, relative and absolute preference."""
    return ({"kind": "dpo", "weight": 0.8}, {"kind": "bco", "weight": 0.2, "beta": 0.1}, {"kind": "sft", "weight": 1.0})


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of losses on the same pairs; by default MPO: Wang et al. 2024, arXiv 2411.10442.

        loss = Σ_k w_k · loss_k                                                        w_k = the weight of part k

    The reported rewards are those of the first part that has a weight; `extra` holds the loss of every part. An
    object needs a reference, works on tokens, or couples rows, if one of its parts does.

    Departs from the paper: MPO's bco part has a reward shift that is left out, see `bco`; its weights are those that
    TRL's documentation gives.

    Raises:
        ConfigError: no part, no positive weight, a negative one, an unknown kind or field, or a value out of range.

    """

    parts: tuple[Mapping[str, Any], ...] = field(default_factory=mpo)
    """Each a mapping with `kind`, a loss of this folder, optionally `weight` (≥ 0, default 1), and that loss's own
    fields. Default: MPO, with dpo 0.8, bco 0.2, sft 1 and beta 0.1."""

    # Of the class; an object has the values that its parts ask for.
    needs_reference: ClassVar[bool] = True
    consumes: ClassVar[str] = "pair"
    level: ClassVar[str] = "sequence"
    couples_rows: ClassVar[bool] = False
    views: ClassVar[tuple[str, ...]] = ()
    reads_squares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        losses = [loss for _, _, loss in self._weighted]
        object.__setattr__(self, "needs_reference", any(loss.needs_reference for loss in losses))
        object.__setattr__(self, "level", "token" if any(loss.level == "token" for loss in losses) else "sequence")
        object.__setattr__(self, "consumes", "pair" if any(loss.consumes == "pair" for loss in losses) else "unpaired")
        views = dict.fromkeys(name for loss in losses for name in getattr(loss, "views", ()))
        object.__setattr__(self, "views", tuple(views))
        object.__setattr__(self, "reads_squares", any(getattr(loss, "reads_squares", False) for loss in losses))
        # A loss that says nothing of it does not couple rows.
        object.__setattr__(self, "couples_rows", any(getattr(loss, "couples_rows", False) for loss in losses))

    @cached_property
    def _weighted(self) -> list[tuple[str, float, Any]]:
        """Name, weight and loss of each part that has a weight."""
        built = []
        for index, part in enumerate(self.parts):
            weight = part.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                refuse("mixture", f"parts[{index}].weight", "≥ 0", repr(weight))
            built.append((f"{index}_{part.get('kind')}", float(weight), _build(part)))
        weighted = [term for term in built if term[1] > 0]
        if not weighted:
            raise ConfigError(f"{PLACE}: must have a part with a weight > 0, got {self.parts}")
        return weighted

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return the loss of each pair. Raises ValueError if a part misses reference log-probabilities."""
        outputs = [(name, weight, loss(logps)) for name, weight, loss in self._weighted]
        total = torch.stack([weight * output.loss for _, weight, output in outputs]).sum(0)
        each = {name: output.loss.detach() for name, _, output in outputs}
        first = outputs[0][2]
        return LossOutput(total, first.chosen_reward, first.rejected_reward, each)


def _build(part: Mapping[str, Any]) -> Any:
    """Build the loss that `part` names. Raises ConfigError for an unknown kind or field, or a bad value."""
    kind = part.get("kind")
    known = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if kind not in known:
        raise ConfigError(f"{PLACE}: no loss {kind!r}; kind must be one of {', '.join(known)}")
    wanted = str(kind).replace("_", "")
    module = vars(importlib.import_module(f"prefloop.losses.{kind}"))
    found: Any = next(v for name, v in module.items() if name.lower() == wanted and isinstance(v, type))
    settings = {name: value for name, value in part.items() if name not in ("kind", "weight")}
    names = [item.name for item in fields(found)]
    for name in settings:
        if name not in names:
            raise ConfigError(f"{PLACE}: {kind} has no field {name!r}; it has {', '.join(names) or 'none'}")
    try:
        loss = TypeAdapter(found).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{PLACE}: {kind}.{place}: {first['msg']}, got {first['input']!r}") from None
    if loss.consumes == "list":
        raise ConfigError(f"{PLACE}: {kind} learns from whole lists, a mixture from pairs")
    return loss
