"""Credit maps as one page that loads nothing and runs nothing."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from prefloop.evaluate.credit import CreditGroup, TokenCredit
from prefloop.evaluate.credit_terminal import signed

_STRONGEST = 0.75  # opacity at the end of the scale: letters stay readable on light and on dark paper
_FAINT = 0.02


def credit_page(found: Mapping[str, Any], groups: Sequence[CreditGroup]) -> str:
    """Return the page; `found` is what `credit.credit` returns. Every text of a model or a file is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cell = partial(_cell, scale=found["scale"])
    text = environment.get_template("credit.html.j2").render(found=found, groups=groups, cell=cell)
    return text.encode("utf-8", "replace").decode("utf-8")


def _cell(token: TokenCredit, scale: float) -> Markup:
    """Return a token on its colour, with its number where a pointer rests on it."""
    if not token.text:
        shown = Markup('<span class="l">⟨{}⟩</span>').format(token.label)
    else:
        shown = escape(token.text.replace("\n", "⏎\n"))
    opacity = _STRONGEST * min(1.0, abs(token.shade) / scale) if scale > 0 else 0.0
    title = f"{token.text or token.label!r} {signed(token.reward)}"
    if opacity < _FAINT:
        return Markup('<span title="{}">{}</span>').format(title, shown)
    side = "u" if token.shade > 0 else "d"
    return Markup('<span class="{}" style="--a:{}" title="{}">{}</span>').format(side, f"{opacity:.2f}", title, shown)
