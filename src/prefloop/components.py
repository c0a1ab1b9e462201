"""Find and build the part that a recipe names by `kind`: the file's name in its folder, or `./my_file.py:Name`.

There is no list to register in. A file `judge/reward_model.py` holds the class `RewardModel`: the class whose name,
in lower case, is the file's name without underscores.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from prefloop.artifact import file_digest
from prefloop.errors import ConfigError
from prefloop.protocols import Corrector, Gate, Judge, Logger, Loss, Order, PairBuilder, Sampler
from prefloop.recipe import Recipe, Spec, nearest
from prefloop.rows import digest_of
from prefloop.train.job import Trainer
from prefloop.userfile import import_user

FOLDERS = {
    "order": "prompts",
    "sampler": "sample",
    "eval_sampler": "sample",
    "judge": "judge",
    "eval_judge": "judge",
    "corrector": "correct",
    "locator": "judge",
    "pair_builder": "pair",
    "loss": "losses",
    "trainer": "train",
    "gate": "evaluate",
    "loggers": "loggers",
}
"""The folder in which the `kind` of each recipe field is looked up."""
LONGEST_PATH = 200
"""Characters of a setting up to which it may name a file."""
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model")
"""Files of a model folder on which its scores depend."""


@dataclass(frozen=True)
class Parts:
    """The components of a run, built and validated."""

    order: Order
    sampler: Sampler
    eval_sampler: Sampler
    judge: Judge
    eval_judge: Judge
    pair_builder: PairBuilder
    loss: Loss
    trainer: Trainer
    gate: Gate
    corrector: Corrector | None = None
    locator: Judge | None = None
    loggers: tuple[Logger, ...] = ()


def build_parts(recipe: Recipe) -> Parts:
    """Build every component that `recipe` names.

    Raises:
        ConfigError: unknown kind or field, or a value of the wrong type or out of range.

    """
    if recipe.judge is None:
        raise ConfigError(
            f"judge: not set; choose judge.kind from {', '.join(kinds('judge'))}, or ./my_judge.py:MyJudge"
        )
    sampler = build("sampler", recipe.sampler)
    judge = build("judge", recipe.judge)
    eval_judge = build("eval_judge", recipe.eval_judge) if recipe.eval_judge else judge
    if getattr(eval_judge, "is_policy", False):
        raise ConfigError(
            "eval_judge: the policy itself, which is another judge in every round, so that scores would not compare; "
            "set eval_judge to a judge that stays the same"
        )
    if getattr(eval_judge, "within_groups", False):
        raise ConfigError(
            f"eval_judge: {(recipe.eval_judge or recipe.judge).kind} scores a prompt's completions against each other "
            "only, so that scores of two policies would not compare; set eval_judge to another judge"
        )
    return Parts(
        order=build("order", recipe.order),
        sampler=sampler,
        eval_sampler=_eval_sampler(recipe, sampler),
        judge=judge,
        eval_judge=eval_judge,
        pair_builder=build("pair_builder", recipe.pair_builder),
        loss=build("loss", recipe.loss),
        trainer=build("trainer", recipe.trainer),
        gate=build("gate", recipe.gate),
        corrector=build("corrector", recipe.corrector) if recipe.corrector else None,
        locator=build("locator", recipe.locator) if recipe.locator else None,
        loggers=tuple(build("loggers", spec) for spec in recipe.loggers),
    )


def _eval_sampler(recipe: Recipe, sampler: Any) -> Any:
    if recipe.sampler.kind == "given" and recipe.eval_sampler is None:
        raise ConfigError("eval_sampler: not set; sampler.kind given draws nothing, so set eval_sampler.kind=hf")
    if recipe.judge is not None and recipe.judge.kind == "given" and recipe.eval_judge is None:
        raise ConfigError("eval_judge: not set; judge.kind given knows only the data's completions, not new ones")
    chosen = build("eval_sampler", recipe.eval_sampler) if recipe.eval_sampler else sampler
    return dataclasses.replace(chosen, completions=recipe.evaluate.completions)


def build(place: str, spec: Spec) -> Any:
    """Build the component `spec` of the recipe field `place`.

    Raises:
        ConfigError: unknown kind or field, or a value of the wrong type or out of range.

    """
    component = component_class(place, spec.kind)
    settings = spec.settings()
    known = [f.name for f in dataclasses.fields(component) if f.init]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{place}.{name}: unknown key for kind {spec.kind}; {nearest(name, known)}")
    try:
        return TypeAdapter(component).validate_python(settings)
    except ValidationError as error:
        lines = [
            f"{place}.{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
            if e["type"] not in ("missing", "missing_argument")
            else f"{place}.{e['loc'][0]}: not set, and kind {spec.kind} needs it"
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None


def component_class(place: str, kind: str) -> type:
    """Return the class that `kind` names in the folder of the recipe field `place`.

    Raises:
        ConfigError: there is no such file or class, or it is not a dataclass.

    """
    if ":" in kind or kind.endswith(".py"):
        found = import_user(kind, f"{place}.kind")
    else:
        folder = FOLDERS[place]
        module_name = f"prefloop.{folder}.{kind}"
        if not kind.isidentifier() or importlib.util.find_spec(module_name) is None:
            hint = nearest(kind, kinds(place)).replace("known keys", "there are")
            raise ConfigError(f"{place}.kind: no {kind!r} in prefloop/{folder}; {hint} Or ./my_file.py:Name")
        found = class_of(importlib.import_module(module_name))
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{place}.kind: {kind} is not a dataclass; its fields are the settings (see docs/extend.md)")
    return found


def class_of(module: Any) -> type | None:
    """Return the component class of a module: the one named like the file; `None` for a file of helpers."""
    wanted = module.__name__.rpartition(".")[2].replace("_", "")
    for name, value in vars(module).items():
        if isinstance(value, type) and name.lower() == wanted and value.__module__ == module.__name__:
            return value
    return None


def kinds(place: str) -> list[str]:
    """Return the kinds that the recipe field `place` can have: the files of its folder that define one."""
    package = importlib.import_module(f"prefloop.{FOLDERS[place]}")
    found = []
    for item in pkgutil.iter_modules(package.__path__):
        source = Path(package.__path__[0], f"{item.name}.py").read_text(encoding="utf-8")
        wanted = item.name.replace("_", "")
        if any(line.lower().startswith((f"class {wanted}:", f"class {wanted}(")) for line in source.splitlines()):
            found.append(item.name)
    return found


def key_of(component: Any, kind: str) -> dict[str, Any]:
    """Return what a stage's key says of a component: kind, every field, and the content of files that it names."""
    without_effect = getattr(component, "without_effect", ())  # such as a budget: it changes no result
    settings: dict[str, Any] = {"kind": kind, **dataclasses.asdict(component)}
    settings = {name: value for name, value in settings.items() if name not in without_effect}
    contents = {value: _content(value) for value in _strings(settings)}
    return settings | {f"content of {value}": digest for value, digest in contents.items() if digest}


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in settings, those of a component inside a component too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _content(named: str) -> str | None:
    """Return the digest of a user's Python file, a template or a model folder; `None` for a value that names none."""
    if len(named) > LONGEST_PATH:
        return None  # a text, and the system would not look it up
    path = Path(named.rpartition(":")[0] if ".py:" in named else named)
    if path.suffix in (".py", ".txt") and path.is_file():
        return file_digest(path)
    if (path / "config.json").is_file():
        return digest_of([(p.name, file_digest(p)) for p in sorted(path.iterdir()) if p.suffix in MODEL_FILES])
    return None


def filled(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """Return the recipe with every default of every component written out."""
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for place in ("order", "sampler", "judge", "pair_builder", "loss", "trainer", "gate"):
        values[place] = {"kind": values[place]["kind"], **_plain(getattr(parts, place))}
    for place in ("eval_sampler", "eval_judge", "corrector", "locator"):
        if values[place] is not None:
            values[place] = {"kind": values[place]["kind"], **_plain(getattr(parts, place))}
    named = zip(recipe.loggers, parts.loggers, strict=True)
    values["loggers"] = [{"kind": spec.kind, **_plain(logger)} for spec, logger in named]
    return values


def _plain(component: Any) -> Mapping[str, Any]:
    return {f.name: getattr(component, f.name) for f in dataclasses.fields(component) if f.init}
