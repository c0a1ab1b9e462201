"""Tells the loggers that the user named what a run finds: every logged optimizer step, the start, and every round.

A logger is opened with its first number, so a run that only finds what is done leaves no trace in it. What it cannot do
is no reason to stop a run: it is switched off with a warning. Rounds that a logger was told of are noted in the run
folder and not told again; steps are told as they are made, those after the last training state again when a killed run
goes on.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefloop.artifact import read_json, write_json
from prefloop.protocols import LoggedRun, Logger, LogSession
from prefloop.rows import StepLog

TRAIN_AXIS, ROUND_AXIS = "train/step", "round/number"
START_ROUND = -1

_NOTED = ".loggers.json"
_NOT_CURVES = ("step", "extra")


@dataclass
class Watch:
    """The loggers of a run. Without any, all calls do nothing.

    `warn` is told of a logger that failed. `steps_before` counts the optimizer steps of earlier rounds: steps of all
    rounds are on one axis.
    """

    root: Path = Path()
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    loggers: dict[str, Logger] = field(default_factory=dict)
    warn: Callable[[str], None] = lambda _: None
    again: bool = False
    """Tell of all rounds anew: they may have been made again."""
    steps_before: int = 0
    _open: dict[str, LogSession] = field(default_factory=dict)

    def step(self, row: StepLog) -> None:
        """Tell of an optimizer step, as the training curve holds it."""
        if not self.loggers:
            return
        values = {k: v for k, v in asdict(row).items() if k not in _NOT_CURVES and v is not None}
        values |= {extra.name: extra.value for extra in row.extra}
        told = {f"train/{name}": float(value) for name, value in values.items()}
        for name in list(self.loggers):
            self._log(name, told, TRAIN_AXIS, self.steps_before + row.step)

    def start(self, entry: Mapping[str, Any]) -> None:
        """Tell of the starting policy, as `summary.json` holds it."""
        self._round(START_ROUND, "start", entry, {})

    def round(self, entry: Mapping[str, Any]) -> None:
        """Tell of a finished round, as `summary.json` holds it."""
        more = {"round/accepted": float(entry["accepted"]), "round/seconds": sum(entry["seconds"].values())}
        self._round(entry["round"], "round", entry, more)
        self.steps_before += int(entry["facts"].get("policy", {}).get("steps", 0))

    def close(self) -> None:
        """Close what is open."""
        for name in list(self._open):
            session = self._open.pop(name)
            self._guard(name, session.close)

    def _round(self, number: int, prefix: str, entry: Mapping[str, Any], more: Mapping[str, float]) -> None:
        if not self.loggers:
            return
        told = dict(more)
        for name, metric in (entry.get("metrics") or {}).items():
            for end, suffix in (("value", ""), ("low", "/low"), ("high", "/high")):
                if metric[end] is not None:
                    told[f"{prefix}/{name}{suffix}"] = float(metric[end])
        noted = self._noted()
        for name in list(self.loggers):
            if number > noted["rounds"].get(name, START_ROUND - 1) or self.again:
                self._log(name, told, ROUND_AXIS, number)
                session = self._open.get(name)
                if session is not None and self._guard(name, session.flush):
                    noted["rounds"][name] = number
        write_json(self.root / _NOTED, noted)

    def _log(self, name: str, values: Mapping[str, float], axis: str, at: int) -> None:
        def log() -> None:
            if name not in self._open:
                logged = LoggedRun(self.root, self.name, self._noted()["id"], self.settings)
                self._open[name] = self.loggers[name](logged)
            self._open[name].log(values, axis, at)

        self._guard(name, log)

    def _guard(self, name: str, call: Callable[[], None]) -> bool:
        """Make a call of a logger; switch it off where it fails, and return whether it did not."""
        try:
            call()
        except Exception as error:  # another's code can raise anything, and no number is worth stopping a run for
            self.loggers.pop(name, None)
            self._open.pop(name, None)
            self.warn(f"loggers: {name} failed ({type(error).__name__}: {error}) and is switched off; the run goes on")
            return False
        return True

    def _noted(self) -> dict[str, Any]:
        """Return the run's id for loggers, and which round each was told of last."""
        path = self.root / _NOTED
        if not path.is_file():
            write_json(path, {"id": secrets.token_hex(4), "rounds": {}})
        found: dict[str, Any] = read_json(path)
        return found


def named(loggers: Sequence[tuple[str, Logger]]) -> dict[str, Logger]:
    """Return loggers by kind; one that is named twice keeps both."""
    found: dict[str, Logger] = {}
    for kind, logger in loggers:
        name = kind if kind not in found else f"{kind} {sum(k.partition(' ')[0] == kind for k in found) + 1}"
        found[name] = logger
    return found
