"""A recipe made small: what `prefloop run --smoke` runs and what `prefloop plan` measures."""

from collections.abc import Mapping
from typing import Any

from prefloop.recipe import CombineSettings, Recipe, Spec

_ORDERS = {
    "domains": Spec(kind="shuffled"),
    "easy_first": Spec.model_validate({"kind": "easy_first", "by": "margin"}),
}
"""What one round has in the place of an order by sources."""
LISTED = 400
"""Rows that are read where an order measures every prompt before the first round."""


def shrunk(recipe: Recipe, prompts: int, held_out: int, measures_all: bool, **changes: Any) -> Recipe:
    """Return `recipe` with one round on `prompts` prompts, evaluated on `held_out`; no logger hears of it.

    `measures_all` says that the order wants a margin for every prompt, so that fewer are read. An order that has a
    round for each source of the data gives way to one that a single round suffices for. `changes` are fields of the
    recipe.
    """
    less: Mapping[str, Any] = {
        "rounds": 1,
        "prompts_per_round": prompts,
        "order": _ORDERS.get(recipe.order.kind, recipe.order),
        "combine": CombineSettings(),
        "loggers": (),
        "evaluate": recipe.evaluate.model_copy(update={"prompts": held_out}),
    }
    if measures_all and recipe.prompts is not None:
        limit = min(recipe.prompts.limit or LISTED, LISTED)
        less = {**less, "prompts": recipe.prompts.model_copy(update={"limit": limit})}
    return recipe.model_copy(update={**less, **changes})


def scripted_judge(file: str) -> Spec:
    """Return a judge that costs nothing, reading the function `score` of `file`."""
    return Spec.model_validate({"kind": "verifier", "mode": "python", "file": f"{file}:score"})


SCRIPT = '''"""A stand-in for a judge that costs money: it only has to tell completions apart."""

import hashlib


def score(prompt, completion, gold):
    return hashlib.sha256(completion.encode()).digest()[0] / 255
'''
