"""TensorBoard: event files in the run folder, read by `tensorboard --logdir runs`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloop.loggers._package import package, require
from prefloop.protocols import LoggedRun

FOLDER = "tensorboard"


@dataclass(frozen=True)
class TensorBoard:
    """Write event files to the folder `tensorboard` of the run: curves by optimizer step and by round.

    Nothing leaves the machine. A run that goes on adds an event file; steps since the last training state may be in it
    twice, with the same values.
    """

    flush_seconds: int = 30
    """Longest time that a number waits in memory, seconds, ≥ 1. Default 30 (ours)."""

    def __post_init__(self) -> None:
        require("tensorboard", "tensorboard")

    def __call__(self, run: LoggedRun) -> "Session":
        """Open an event file."""
        folder = str(run.root / FOLDER)
        writer = package("torch.utils.tensorboard").SummaryWriter(log_dir=folder, flush_secs=self.flush_seconds)
        writer.add_text("recipe", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))
        return Session(writer)


@dataclass(frozen=True)
class Session:
    """An open event file."""

    writer: Any

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Write values; the axis is TensorBoard's step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=at)

    def flush(self) -> None:
        """Write to disk what waits."""
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
