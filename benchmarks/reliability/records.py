"""What is tried and what comes of it. Results lie in a file of JSON lines, so that a stopped series goes on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.reliability import subject
from benchmarks.reliability.points import Fault
from benchmarks.reliability.victims import Ended, Victim, fork, start

REMADE = "same bytes"
"""What a rerun after a fault should end in."""


@dataclass(frozen=True)
class Outcome:
    """One trial. `faults` were injected; `survived` says that the run ended as the uninterrupted one, or told clearly.

    `lost` counts bytes of results that are missing or differ at the end. `ended` says how the rerun ended.
    """

    kind: str
    name: str
    faults: int
    survived: bool
    lost: int
    seconds: float
    ended: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Something to try: `kind` is a row of the table, `name` is unique within it."""

    kind: str
    name: str
    attempt: Callable[["Bench", Path], Outcome]


@dataclass
class Bench:
    """Where trials run and what they are compared with."""

    folder: Path
    whole: Path
    """A run that nobody disturbed."""
    seconds: float
    """How long that took, in a forked process."""
    points: tuple[str, ...] = ()
    """Its write points, in order."""
    say: Callable[[str], None] = lambda text: None
    logs: int = field(default=0)

    def launch(
        self, out: Path, fault: Fault | None = None, before: Callable[[], None] | None = None, real: bool = False
    ) -> Victim:
        """Start the subject's command on `out`: in a forked process, or in one of its own if `real`."""
        if real:
            return start(subject.command(out), self._log(), fault)
        return fork(subject.command(out), self._log(), fault, before)

    def run(self, words: Sequence[str]) -> Victim:
        """Start a prefloop command in a forked process."""
        return fork(words, self._log())

    def _log(self) -> Path:
        self.logs = (self.logs + 1) % 100  # the latest hundred are kept
        return self.folder / "logs" / f"{self.logs}.txt"

    def finish(self, out: Path) -> tuple[Ended, int, list[str]]:
        """Run the command undisturbed, and return how it ended, the bytes lost, and what is wrong."""
        ended = self.launch(out).wait()
        if ended is None:
            return Ended(-1, "hangs"), 0, ["the rerun hangs"]
        lost, names = subject.lost(out, self.whole)
        problems = [f"differs or is missing: {name}" for name in names[:3]]
        if ended.code != 0:
            problems.append(f"exit code {ended.code}: {last_line(ended.said)}")
        left = [p for p in out.rglob(".writing-*") if "damaged" not in p.relative_to(out).parts]
        problems += [f"left behind: {p.relative_to(out)}" for p in left[:3]]
        return ended, lost, problems


def last_line(said: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def read(path: Path) -> list[Outcome]:
    """Return the outcomes of a file, the latest of each trial; a line that a kill cut off is left out."""
    found: dict[str, Outcome] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            plain = json.loads(line)
        except ValueError:
            continue
        found[plain["name"]] = Outcome(**plain | {"problems": tuple(plain["problems"])})
    return list(found.values())


def append(path: Path, outcome: Outcome) -> None:
    """Add an outcome to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
