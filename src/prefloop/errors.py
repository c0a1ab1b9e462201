"""The exceptions of prefloop. Each says what was wrong, where, and what to do, and knows its exit code.

PrefloopError
├── ConfigError          2   a choice cannot be carried out; raised before any work
│   ├── StaleArtifact    2   a folder holds the result of other settings
│   └── RunLocked        2   another process works on the run folder
├── DataError            3   prompts, pairs or a model folder that cannot be used
│   └── CorruptArtifact  3   a finished artifact no longer matches its manifest
├── JudgeError           4   a judge failed for good
├── SamplerError         4   a sampler or its server failed for good
├── TrainingDiverged     5   loss or gradient is not finite, or the reference changed
├── MachineFailed       74   the disk is full, read-only or broken, or memory ran out; the same command continues
├── Interrupted         75   stopped on request; the same command continues
└── RankLost            75   another process of the run is gone, or failed: then with its exit code
"""

import re

LONGEST = 3_000
"""Characters of a message that are shown; what is in the middle of a longer one is left out."""
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return `text` with control characters, lone surrogates and changes of direction as escapes such as \\x1b.

    A terminal obeys the first, cannot write the second, and shows other text than there is after the third.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class PrefloopError(Exception):
    """Base of every error that prefloop raises on purpose. Its text can be shown on any terminal."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message: `printable`, and of a very long one the beginning and the end."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        return printable(text)


class ConfigError(PrefloopError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    exit_code = 2


class StaleArtifact(ConfigError):
    """A stage's folder was made with other settings or other inputs."""


class RunLocked(ConfigError):
    """The run folder is in use by another process."""


class DataError(PrefloopError):
    """Input data cannot be used: the message names file and line."""

    exit_code = 3


class CorruptArtifact(DataError):
    """A file of a finished artifact is missing or does not have the bytes that its manifest records."""


class JudgeError(PrefloopError):
    """The judge failed for good; what it scored before is kept."""

    exit_code = 4


class SamplerError(PrefloopError):
    """The sampler failed for good; finished parts are kept."""

    exit_code = 4


class TrainingDiverged(PrefloopError):
    """Loss, gradient or weights became infinite or NaN: the message names step, tensor and last good state.

    Or the reference is not what it was: its weights, or the log-probs that were stored for it.
    """

    exit_code = 5


class MachineFailed(PrefloopError):
    """The machine could not do what was asked: a disk is full, read-only or broken, or memory ran out."""

    exit_code = 74


class Interrupted(PrefloopError):
    """The run was asked to stop and did so at a safe point."""

    exit_code = 75


class RankLost(PrefloopError):
    """Another rank of the run failed or is gone; the message names it and its cause, the exit code is its own."""

    exit_code = 75
