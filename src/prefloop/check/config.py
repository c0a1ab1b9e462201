"""Kinds and names of settings, looked up in the source files so that nothing has to import torch."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from prefloop.components import FOLDERS, kinds
from prefloop.errors import ConfigError
from prefloop.recipe import PARTS, Recipe, Spec, distinct_rounds, for_round, nearest


def check_names(recipe: Recipe) -> None:
    """Check that every part of the recipe, in every round, exists and has the settings that the recipe gives it.

    Values are not looked at: that takes the part itself.

    Raises:
        ConfigError: names all that is unknown.

    """
    problems: list[str] = []
    for number in distinct_rounds(recipe):
        its_recipe = for_round(recipe, number)
        for place in PARTS:
            spec = getattr(its_recipe, place)
            problems += [p for p in _problems(place, spec) if p not in problems] if spec is not None else []
    if recipe.judge is None:
        problems.append(f"judge: not set; choose judge.kind from {', '.join(kinds('judge'))}, or ./my_judge.py:MyJudge")
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(place: str, spec: Spec) -> Iterator[str]:
    if ":" in spec.kind or spec.kind.endswith(".py"):
        file = Path(spec.kind.rpartition(":")[0] if ".py:" in spec.kind else spec.kind)
        if not file.is_file():
            yield f"{place}.kind: no file {file}"
        return
    found = importlib.util.find_spec(f"prefloop.{FOLDERS[place]}.{spec.kind}") if spec.kind.isidentifier() else None
    if found is None or found.origin is None:
        yield f"{place}.kind: no {spec.kind!r}; {nearest(spec.kind, kinds(place)).replace('known keys', 'there are')}"
        return
    known = _fields(Path(found.origin))
    if known is not None:
        for name in spec.settings():
            if name not in known:
                yield f"{place}.{name}: unknown key for kind {spec.kind}; {nearest(name, known)}"


def _fields(source: Path) -> list[str] | None:
    """Return the settings of a component's file; `None` where its class inherits some."""
    wanted = source.stem.replace("_", "")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.lower() == wanted:
            if node.bases:
                return None
            annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return [
                item.target.id
                for item in annotated
                if isinstance(item.target, ast.Name) and not ast.unparse(item.annotation).startswith("ClassVar")
            ]
    return None
