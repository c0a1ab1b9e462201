"""Credit maps for the terminal: tokens on colours from orange (less likely than before) to blue (more likely)."""

from collections.abc import Iterator, Sequence

from rich.color import Color
from rich.style import Style
from rich.text import Text

from prefloop.evaluate.credit import Credit, CreditGroup, TokenCredit, extremes

# Five strengths of each sign, with black or white letters: readable on any terminal's own background.
_RISE = ((214, 230, 244), (171, 208, 230), (106, 174, 214), (55, 135, 192), (16, 91, 164))
_FALL = ((253, 226, 203), (253, 187, 132), (252, 141, 60), (230, 95, 13), (166, 54, 3))
_DARK_FROM = 3  # strengths from here on take white letters
# The same for a terminal of 16 colours, which has no pale ones.
_FEW_RISE = ("", "", "black on bright_cyan", "black on bright_cyan", "bright_white on blue")
_FEW_FALL = ("", "", "black on bright_yellow", "black on bright_yellow", "bright_white on red")
_STEP = 72  # characters of a step that are shown
_FAINT = 0.05  # part of the scale below which a token has no colour
_PROMPT = 300  # characters of a prompt that are shown, its end


def credit_lines(groups: Sequence[CreditGroup], scale: float, few_colours: bool = False) -> Iterator[Text]:
    """Yield what is printed: each prompt, its completions coloured, sums, steps, and the strongest tokens in words.

    The words say the same as the colours, for terminals without any. With `few_colours`, only the 16 common ones.
    """
    for group in groups:
        prompt = group.prompt if len(group.prompt) <= _PROMPT else f"… {group.prompt[-_PROMPT:]}"
        yield Text(visible(prompt), style="dim")
        if group.prefix:
            yield Text(visible(group.prefix), style="dim italic")
        for credit in group.completions:
            yield from _completion(credit, scale, few_colours)
        if group.margin is not None:
            yield Text(f"  chosen − rejected {signed(group.margin)}", style="bold")
        yield Text("")


def _completion(credit: Credit, scale: float, few_colours: bool) -> Iterator[Text]:
    score = "" if credit.score is None else f", score {credit.score:.4g}".replace("-", "−")
    yield Text(f"{credit.name}: {signed(credit.reward)} over {len(credit.tokens)} tokens{score}", style="bold")
    line = Text("  ")
    for token in credit.tokens:
        shown = visible(token.text) or f"⟨{visible(token.label)}⟩"
        line.append(shown, style=_style(token.shade, scale, few_colours))
    yield line
    for number, step in enumerate(credit.steps, 1):
        name = f"step {number}" if step.text else "the rest"
        shown = _inline(step.text).strip() or ("" if step.text else "its end")
        yield Text(f"  {name:<9}{signed(step.reward)}  {shown if len(shown) <= _STEP else shown[:_STEP] + '…'}")
    most, least = extremes(credit)
    for word, tokens in (("up", most), ("down", least)):
        if tokens:
            yield Text(f"  {word:<5}{', '.join(map(_named, tokens))}", style="dim")


def _named(token: TokenCredit) -> str:
    return f"'{_inline(token.text or token.label)}' {signed(token.shade)}"


def _style(shade: float, scale: float, few_colours: bool) -> Style:
    share = min(1.0, abs(shade) / scale) if scale > 0 else 0.0
    if share < _FAINT:
        return Style()
    strength = min(len(_RISE) - 1, int(share * len(_RISE)))
    if few_colours:
        return Style.parse((_FEW_RISE if shade > 0 else _FEW_FALL)[strength])
    paper = (_RISE if shade > 0 else _FALL)[strength]
    ink = (255, 255, 255) if strength >= _DARK_FROM else (0, 0, 0)
    return Style(bgcolor=Color.from_rgb(*paper), color=Color.from_rgb(*ink))


def signed(value: float) -> str:
    """Return a reward with its sign: `+0.123` or `−1.20`."""
    return f"{value:+.3g}".replace("-", "−")


def visible(text: str) -> str:
    """Return text in which no character steers the terminal; a line end is a sign and a line end."""
    shown = (c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(shown).replace("\n", "⏎\n  ")


def _inline(text: str) -> str:
    return visible(text).replace("⏎\n  ", "⏎")
