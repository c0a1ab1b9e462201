"""`prefloop init`: a recipe file with every setting, each under a comment that says what it is."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefloop.artifact import write_text
from prefloop.components import FOLDERS, component_class
from prefloop.errors import ConfigError
from prefloop.launch import read_target
from prefloop.recipe import Spec, build_recipe, flow_yaml

PLACEHOLDERS = (
    "policy=path/to/model",
    "prompts=path/to/prompts.jsonl",
    "judge={kind: reward_model, path: path/to/reward_model}",
)
"""What a user has to replace; overrides given to `init` come after and win."""


def write_template(path: Path, target: str, overrides: Sequence[str]) -> None:
    """Write the recipe of method `target` to `path`.

    Raises:
        ConfigError: `path` exists, or target or overrides are wrong.

    """
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name with --file")
    recipe = build_recipe(read_target(target, [*PLACEHOLDERS, *overrides]))
    head = f"# prefloop run {path}\n# Any line may be removed: the value shown is then the default of the method.\n\n"
    write_text(path, head + "\n".join(_model_lines(recipe, 0)) + "\n")


def _model_lines(model: BaseModel, depth: int) -> Iterator[str]:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        yield from _comment(info.description or "", depth)
        if depth == 0 and name in FOLDERS and isinstance(value, Spec):
            yield f"{name}:"
            yield from _component_lines(name, value.kind, value.settings())
        elif isinstance(value, BaseModel):
            yield f"{'  ' * depth}{name}:"
            yield from _model_lines(value, depth + 1)
        else:
            yield f"{'  ' * depth}{name}: {flow_yaml(value)}"
        if depth == 0:
            yield ""


def _component_lines(place: str, kind: str, settings: Mapping[str, Any]) -> Iterator[str]:
    component = component_class(place, kind)
    notes = field_docs(component)
    yield f"  kind: {kind}"
    for field in dataclasses.fields(component):
        if not field.init:
            continue
        yield from _comment(notes.get(field.name, ""), 1)
        if field.name in settings:
            yield f"  {field.name}: {flow_yaml(settings[field.name])}"
        elif field.default is not dataclasses.MISSING:
            yield f"  {field.name}: {flow_yaml(field.default)}"
        else:
            yield f"  # {field.name}:"


def field_docs(component: type) -> dict[str, str]:
    """Return the docstring that stands under each field of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(component))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and _is_text(after):
            found[before.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined]
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _comment(text: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for line in textwrap.wrap(" ".join(text.split()), 100 - len(indent)):
        yield f"{indent}# {line}"
