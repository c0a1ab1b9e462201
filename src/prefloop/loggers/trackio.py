"""trackio: a local database, read by `trackio show`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloop.loggers._package import package, require
from prefloop.protocols import LoggedRun


@dataclass(frozen=True)
class Trackio:
    """Log to trackio: numbers and settings, never prompts or completions.

    Its database is where trackio keeps it (TRACKIO_DIR, else in your cache folder), on this machine unless `space` is
    set. Machine statistics are switched off.
    """

    project: str = "prefloop"
    """Project that the run belongs to. Default prefloop."""

    space: str | None = None
    """Hub space that the numbers are sent to. Default: none, they stay on this machine."""

    def __post_init__(self) -> None:
        require("trackio", "trackio")

    def __call__(self, run: LoggedRun) -> "Session":
        """Begin a run of trackio, or go on with it."""
        opened = package("trackio").init(
            project=self.project,
            name=f"{run.name} {run.id}",
            space_id=self.space,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return Session(opened)


@dataclass(frozen=True)
class Session:
    """An open run of trackio."""

    run: Any

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Store values with their place on the axis."""
        self.run.log({**values, axis: at})

    def flush(self) -> None:
        """Do nothing: its own thread writes."""

    def close(self) -> None:
        """End the run."""
        self.run.finish()
