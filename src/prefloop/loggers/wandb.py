"""Weights & Biases: offline in the run folder unless the user says otherwise."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefloop.errors import ConfigError
from prefloop.loggers._package import package, require
from prefloop.protocols import LoggedRun

MODES = ("offline", "online")
MODE_VARIABLE = "WANDB_MODE"
AXES = ("train/step", "round/number")


@dataclass(frozen=True)
class Wandb:
    """Log to Weights & Biases: numbers and settings, never prompts or completions.

    Offline by default: files in the folder `wandb` of the run, which `wandb sync` sends when you want it to. The
    environment variable WANDB_MODE, where it is set, decides in the place of the default.
    """

    project: str = "prefloop"
    """Project that the run belongs to. Default prefloop."""

    entity: str | None = None
    """User or team. Default: that of your wandb settings."""

    mode: str | None = None
    """offline or online. Default: what WANDB_MODE says, offline where it is not set."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ConfigError(f"loggers: wandb.mode must be {' or '.join(MODES)}, got {self.mode!r}")
        require("wandb", "wandb")

    def __call__(self, run: LoggedRun) -> "Session":
        """Begin a run of Weights & Biases, or go on with it."""
        wandb = package("wandb")
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.root),
            config=dict(run.settings),
            mode=self.mode or os.environ.get(MODE_VARIABLE) or "offline",
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        for axis in AXES:
            opened.define_metric(axis)
            opened.define_metric(f"{axis.partition('/')[0]}/*", step_metric=axis)
        return Session(opened)


@dataclass(frozen=True)
class Session:
    """An open run of Weights & Biases."""

    run: Any

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Send values with their place on the axis."""
        self.run.log({**values, axis: at})

    def flush(self) -> None:
        """Do nothing: its own process writes."""

    def close(self) -> None:
        """End the run."""
        self.run.finish()
