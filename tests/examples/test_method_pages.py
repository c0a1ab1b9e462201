"""Every working method has a page, and what its page says can be set can be set."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefloop.components import build_parts, filled
from prefloop.launch import read_recipe
from prefloop.recipe import for_round
from prefloop.recipes import available

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTIONS = ["When to use it", "What it needs", "What happens in a round", "Settings", "Pitfalls"]


@pytest.fixture(params=available())
def name(request):
    return request.param


def page_of(name: str) -> str:
    return (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")


def yaml_files(page: str, folder: Path) -> list[Path]:
    files = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)):
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(block, encoding="utf-8")
    return files


def settings_rows(page: str) -> list[tuple[str, str]]:
    """Return (name, default) of each row of the page's table of settings; a row may name several."""
    section = page.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(setting, cells[1]) for cells in rows for setting in re.findall(r"`([\w.]+)`", cells[0])]


def look_up(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings[part]
    return settings


def as_value(cell: str) -> Any:
    """Read a default as the page gives it: what stands before a bracket, `none` for null, 1e-4 as a number."""
    text = cell.partition(" (")[0].strip()
    try:
        return float(text)
    except ValueError:
        return None if text == "none" else yaml.safe_load(text)


def test_every_working_method_has_a_page_and_every_page_a_method():
    assert sorted(path.stem for path in (DOCS / "methods").glob("*.md")) == available()


def test_the_page_has_the_common_sections_and_the_command(name):
    page = page_of(name)
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    assert page.startswith("# ")
    assert f"`prefloop run {name}`" in page.partition("\n## ")[0]


def test_the_pages_recipes_are_valid(name, tmp_path):
    files = yaml_files(page_of(name), tmp_path)
    assert files
    for file in files:
        recipe, _ = read_recipe(str(file), [])
        assert recipe.recipe == name
        for number in range(recipe.rounds):
            build_parts(for_round(recipe, number))


def test_the_pages_settings_exist_and_have_the_defaults_it_gives(name, tmp_path):
    page = page_of(name)
    recipe, _ = read_recipe(str(yaml_files(page, tmp_path)[0]), [])
    settings = filled(recipe, build_parts(recipe))
    rows = settings_rows(page)
    assert rows
    for setting, default in rows:
        value = look_up(settings, setting)
        if setting not in recipe.per_round:
            assert as_value(default) == value, setting


def test_what_the_page_says_can_be_typed_is_taken(name, tmp_path):
    page = page_of(name)
    target = str(yaml_files(page, tmp_path)[0])
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        overrides = shlex.split(span) if re.match(r"'?[a-z_.]+=\S", span) else []
        recipe, _ = read_recipe(target, overrides)
        for number in range(recipe.rounds):
            build_parts(for_round(recipe, number))


def test_links_lead_somewhere(name):
    page = DOCS / "methods" / f"{name}.md"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_index_lists_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(methods/(\w+)\.md\)", index)) == available()
