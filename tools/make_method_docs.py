"""Write docs/methods.md and the README's table from the docstrings of recipes, losses and the other parts.

python tools/make_method_docs.py          writes
python tools/make_method_docs.py --check  exits with 1 if what is there differs
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

from prefloop import recipes
from prefloop.commands.init import field_docs
from prefloop.components import class_of, kinds

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    "loss": ("Losses", "losses"),
    "order": ("Orders of prompts", "prompts"),
    "corrector": ("Correctors", "correct"),
    "pair_builder": ("Pair rules", "pair"),
    "judge": ("Judges", "judge"),
    "sampler": ("Samplers", "sample"),
    "trainer": ("Trainers", "train"),
    "gate": ("Gates", "evaluate"),
    "loggers": ("Loggers", "loggers"),
}


def methods_page() -> str:
    """Return docs/methods.md."""
    parts = [
        "# Methods and parts\n\nMade from docstrings by `tools/make_method_docs.py`; do not edit by hand.\n",
        "## Recipes\n\nRun one with `prefloop run NAME`; on the embedded model it needs nothing else.\n",
    ]
    for method in recipes.methods():
        if method.state == "works":
            text = inspect.cleandoc(importlib.import_module(f"prefloop.recipes.{method.name}").__doc__ or "")
            parts.append(f"### `{method.name}`\n\n{_markdown(text)}\n")
    planned = ", ".join(f"`{m.name}` ({m.source})" for m in recipes.methods() if m.state == "planned")
    parts.append(f"Planned, not working yet: {planned}.\n")
    for place, (title, folder) in PLACES.items():
        parts.append(f"## {title}\n\nChosen by `{place}.kind`.\n")
        parts += [_component(place, folder, kind) for kind in kinds(place)]
    return "\n".join(parts)


def readme_table() -> str:
    """Return the rows of the README's table of methods."""
    rows = [
        f"| `{m.name}` | {'**works**' if m.state == 'works' else 'planned'} | {m.source} |" for m in recipes.methods()
    ]
    return "\n".join(["| method | state | source |", "|---|---|---|", *rows])


def _component(place: str, folder: str, kind: str) -> str:
    component = class_of(importlib.import_module(f"prefloop.{folder}.{kind}"))
    assert component is not None
    lines = [f"### `{place}.kind={kind}`\n", _markdown(inspect.cleandoc(component.__doc__ or "")), ""]
    for name, note in field_docs(component).items():
        lines.append(f"- `{name}`: {' '.join(note.split())}")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Return a docstring as Markdown: indented lines become code blocks."""
    blocks = re.split(r"\n\n+", text)
    return "\n\n".join(f"```\n{inspect.cleandoc(b)}\n```" if b.startswith("    ") else b for b in blocks)


def with_table(readme: str) -> str:
    """Return the README with its table of methods replaced."""
    return re.sub(r"\| method \| state \| source \|\n(\|.*\n)+", lambda _: readme_table() + "\n", readme)


def main() -> int:
    """Write or check both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    readme, page = ROOT / "README.md", ROOT / "docs" / "methods.md"
    wanted = {readme: with_table(readme.read_text(encoding="utf-8")), page: methods_page()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs; run make docs' if check else 'written'}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
