"""What is measured and what comes out. No torch here: the parent process stays small, see `measure.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: a label, and the function `module:name` of this package that does the work."""

    label: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""
    needs: str = ""
    """Package without which this side is left out."""


@dataclass(frozen=True)
class Bar:
    """A goal from the issue for one ratio. `metric` is speed, memory or fraction; see `table.verdict`."""

    text: str
    metric: str
    goal: float
    ours: str = "prefloop"
    rival: str = ""


@dataclass(frozen=True)
class Case:
    """One row of work that every contender does: the settings are the function's first argument."""

    workload: str
    name: str
    settings: Any
    contenders: Sequence[Contender]
    bars: Sequence[Bar] = ()
    note: str = ""


@dataclass
class Measurement:
    """One contender's run of one case, measured in a process of its own."""

    wall: float
    """Seconds from the first to the last line of the timed work."""
    cpu: float
    """CPU seconds of all threads in the same stretch."""
    peak: int
    """Most bytes held: resident memory of the process on a CPU, allocated CUDA memory on a GPU."""
    base: int
    """The same before the timed work: interpreter, libraries, weights, data."""
    pairs: int = 0
    """Preference pairs trained on."""
    tokens: int = 0
    """Useful tokens: see docs/benchmarks.md."""
    flops: float = 0.0
    """Useful floating-point operations; 0 where no formula is given."""
    machine_peak: float = 0.0
    """The machine's matrix-product peak right after the work, FLOP per second of `clock`."""
    details: dict[str, float] = field(default_factory=dict)
    """Anything else worth a line: seconds of stages, counts."""

    def as_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON takes it."""
        return asdict(self)


Results = dict[str, list[Measurement]]
"""Measurements of one case by contender, in the order of repeats."""


@dataclass(frozen=True)
class Options:
    """What the command line says to every child."""

    threads: int = 1
    device: str = "cpu"
    quick: bool = False
    stories: str = ""
    """Folder of the story model; empty takes the one that prefloop ships."""
