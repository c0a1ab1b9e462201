"""One file for each method: a function `recipe()` that returns the paper's settings, and `SOURCE`.

`EMBEDDED`, where a file has it, holds what differs on the story model that prefloop ships.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

from prefloop.errors import ConfigError
from prefloop.recipe import nearest

PLANNED: Mapping[str, str] = MappingProxyType(
    {
        "tso": "arXiv 2409.02118",
        "ofs_dpo": "arXiv 2406.05534",
        "cofs_dpo": "arXiv 2406.05534",
        "srpo": "arXiv 2406.01660",
        "mrdpo": "arXiv 2506.15220",
        "self_rewarding": "arXiv 2401.10020",
        "meta_rewarding": "arXiv 2407.19594",
        "step_dpo": "arXiv 2406.18629",
        "reward_model": "arXiv 2406.09279",
        "ppo": "arXiv 2406.09279",
        "egida": "arXiv 2502.13603",
        "diffusion_dpo": "arXiv 2311.12908",
        "rank_dpo": "arXiv 2410.18013",
        "ppd": "arXiv 2501.06655",
    }
)
"""Methods that prefloop is to be the home of and that do not work yet, with their source."""


@dataclass(frozen=True)
class Method:
    """A line of `prefloop methods`. `state` is works or planned; `source` an arXiv id."""

    name: str
    state: str
    source: str
    summary: str


def methods() -> list[Method]:
    """Return every method, the working ones first."""
    working = [
        Method(name, "works", _module(name).SOURCE, (_module(name).__doc__ or "").partition("\n")[0])
        for name in available()
    ]
    planned = [Method(name, "planned", source, "") for name, source in PLANNED.items() if name not in available()]
    return working + planned


def available() -> list[str]:
    """Return the names of the recipes that work: the files of this folder."""
    return sorted(item.name for item in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """Return the module of recipe `name`.

    Raises:
        ConfigError: there is none, or it is planned and does not work yet.

    """
    if name in available():
        return _module(name)
    if name in PLANNED:
        raise ConfigError(f"recipe: {name} is planned and does not work yet; working: {', '.join(available())}")
    raise ConfigError(f"recipe: no {name!r}; {nearest(name, available())}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"prefloop.recipes.{name}")
