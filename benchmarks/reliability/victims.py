"""Processes that run prefloop and are hurt: forked from one that has imported torch already, or started anew."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.reliability.points import Fault, Trap

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0
"""Seconds after which a process that should have ended counts as hanging."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal; and what it said."""

    code: int
    said: str

    @property
    def traceback(self) -> bool:
        """Whether Python's own words for an unforeseen error are in what it said."""
        return "Traceback (most recent call last)" in self.said


class Victim:
    """A running process."""

    def __init__(self, pid: int, log: Path) -> None:
        """Take over process `pid`, whose words go to `log`."""
        self.pid, self._log = pid, log
        self._code: int | None = None

    def wait(self, seconds: float = LIMIT) -> Ended | None:
        """Return how it ended, or `None` if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.002)
        return Ended(self._code, self._log.read_text(encoding="utf-8", errors="replace"))

    def end(self, number: int) -> Ended:
        """Send a signal and wait."""
        if self._code is None:
            os.kill(self.pid, number)
        ended = self.wait()
        if ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            raise TimeoutError(f"process did not end within {LIMIT:.0f} s after signal {number}: {self._log}")
        return ended


def warm(modules: Sequence[str]) -> None:
    """Import what a run imports, so that a forked process need not. Nothing is computed here: threads do not fork."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in modules:
        importlib.import_module(name)


MODULES = (
    "prefloop.cli",
    "prefloop.console",
    "prefloop.launch",
    "prefloop.recipes.iterative_dpo",
    "prefloop.loop",
    "prefloop.doctor",
    "prefloop.sample.hf",
    "prefloop.judge.lexicon",
    "prefloop.pair.ranked",
    "prefloop.train.update",
    "prefloop.losses.dpo",
    "prefloop.evaluate.gate",
    "prefloop.evaluate.always",
    "prefloop.evaluate.terminal",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_fast",
    "transformers.generation.utils",
    "rich.progress",
)


def fork(
    words: Sequence[str], log: Path, fault: Fault | None = None, before: Callable[[], None] | None = None
) -> Victim:
    """Run `prefloop WORDS` in a process forked from this one; `before` is called there first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Victim(pid, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        code = _main(words, fault, before)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(words: Sequence[str], fault: Fault | None, before: Callable[[], None] | None) -> int:
    cli = importlib.import_module("prefloop.cli")
    if before is not None:
        before()
    if fault is not None:
        Trap(fault)
    sys.argv = ["prefloop", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # what Python itself would do: say it and exit with 1
        traceback.print_exc()
        return 1
    return 0


def start(words: Sequence[str], log: Path, fault: Fault | None = None) -> Victim:
    """Run `prefloop WORDS` in a process of its own, started as a person would."""
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "prefloop"]
    if fault is not None:
        spec = log.with_suffix(".fault.json")
        plain = asdict(fault) | {"root": str(fault.root), "spared": sorted(fault.spared), "hit": str(fault.hit)}
        spec.write_text(json.dumps(plain), encoding="utf-8")
        launcher = ["-m", "benchmarks.reliability.victims", str(spec)]
    with log.open("wb") as file:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        process = subprocess.Popen(
            [sys.executable, *launcher, *words], stdout=file, stderr=file, env=os.environ | {"PYTHONPATH": path}
        )
    process.returncode = 0  # this module waits for it, not subprocess
    return Victim(process.pid, log)


def read_fault(path: Path) -> Fault:
    """Read what `start` wrote."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    return Fault(plain["action"], Path(plain["root"]), frozenset(plain["spared"]), Path(plain["hit"]))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[2:], read_fault(Path(sys.argv[1])), None))
