"""What the command line shows while a run goes on: a bar for each long stage, and lines that stay."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ConsoleProgress:
    """A `protocols.Progress` drawn by rich; on a stream that is no terminal, one line for each finished stage."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._console = console
        self._bar: Progress | None = None
        self._label = ""
        self._unit = ""
        self._amount = 0
        self._began = 0.0

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage of `total` units, `done` of which were finished before."""
        self.close()
        self._label, self._unit, self._amount, self._began = label, unit, 0, time.monotonic()
        self._bar = Progress(
            TextColumn("  {task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>16}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar.add_task(label, total=total, completed=done, rate="", note="")
        self._bar.start()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._amount += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=amount, rate=self._rate(), note=note)

    def finish(self) -> None:
        """End the stage and leave one line about it."""
        seconds = time.monotonic() - self._began
        self.close()
        self._console.print(
            f"  {self._label:<22}{self._amount:>7} {self._unit:<6} {seconds:>6.1f} s {self._rate():>16}",
            highlight=False,
            style="dim",
        )

    def say(self, text: str) -> None:
        """Show one line that stays."""
        self.close()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Show how far a long part is: beside the bar, or on a stream that is no terminal as a line."""
        if self._bar is not None and self._console.is_terminal:
            self.advance(0, text)
        else:
            self._console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True, style="dim")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _rate(self) -> str:
        seconds = time.monotonic() - self._began
        return f"{self._amount / seconds:,.1f} {self._unit}/s" if seconds > 0 else ""


class _Telling(logging.Handler):
    """Passes log lines on to a progress."""

    def __init__(self, progress: ConsoleProgress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Show one line."""
        self._progress.tell(record.getMessage())


@contextmanager
def telling(progress: ConsoleProgress) -> Iterator[None]:
    """Show what judges log meanwhile: their rate, the time that is left, and the tokens used."""
    log, handler = logging.getLogger("prefloop.judge"), _Telling(progress)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
