"""What a replaceable part of the loop looks like: one method each. A class that has it fits; nothing to inherit.

A part is a frozen dataclass whose fields are its settings. Parts that load a model do so on first use and keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from prefloop.rows import (
    Completion,
    Decision,
    JudgedGroup,
    Metric,
    PolicyRef,
    PreferencePair,
    Prompt,
    SampleGroup,
    Verdict,
)

if TYPE_CHECKING:
    from prefloop.tensors import LossOutput, PairLogps


@dataclass(frozen=True, slots=True)
class RoundContext:
    """Where in a run a stage stands. `policy` made, or will make, the round's samples; `start` is the run's first.

    `seed` is the run's seed: every random stream is a function of (seed, round, prompt id, completion index).
    `versions` are the policies that were promoted so far, the first one included, oldest first. A negative `round` is a
    measurement on held-out prompts. `scratch` is a folder in which a judge may keep what must not be paid for twice.
    `logps` are the completions' log-probs under `start`, summed over tokens, in nats, by completion id: there only
    where the pair builder `needs_logps`.
    """

    seed: int
    round: int
    policy: PolicyRef
    start: PolicyRef
    versions: tuple[PolicyRef, ...] = ()
    scratch: str | None = None
    logps: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Allotment:
    """Which round asks for prompts. `margins` is empty unless the order needs them."""

    round: int
    rounds: int
    per_round: int | None
    seed: int
    margins: Mapping[str, float]


class Order(Protocol):
    """Says which prompts a round works on.

    `needs_margins`: it is given, by prompt id, how much likelier the starting policy finds a prompt's best candidate
    than its worst (`rows.PromptMargin`).
    """

    needs_margins: ClassVar[bool]

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> Sequence[Prompt]:
        """Return the prompts of round `ask.round`. They are read from disk as they are asked for: see `prompts.store`.

        Raises:
            DataError: the prompts lack what the order goes by.

        """
        ...


class Sampler(Protocol):
    """Draws completions. Same context and prompts give the same completions, whatever was asked before.

    `prompts` is one part; the floating-point result may depend on which prompts share a part, so the caller keeps
    parts fixed. A sampler that draws from earlier policies too has a class attribute `uses_versions = True`.
    """

    @property
    def completions(self) -> int:
        """Completions of each prompt."""
        ...

    @property
    def temperature(self) -> float:
        """What the logits are divided by; 0 is greedy."""
        ...

    @property
    def top_p(self) -> float:
        """Nucleus that tokens are drawn from, (0, 1]."""
        ...

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group for each prompt, in order.

        Raises:
            SamplerError: sampling failed for good.

        """
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """Where completions go on: after `prompt` and `token_ids`, whose log-probs under the policy are `logps`, in nats.

    `seeds` are those of the random streams, one for each completion.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    logps: tuple[float, ...] | None
    seeds: tuple[int, ...]


@runtime_checkable
class GoesOn(Protocol):
    """A sampler that can go on from tokens that are there already."""

    def go_on(self, starts: Sequence[Start], context: RoundContext) -> list[tuple[Completion, ...]]:
        """Return for each start one whole completion, its first tokens included, for each of its seeds.

        Raises:
            SamplerError: sampling failed for good, or a start leaves no room for a token.

        """
        ...


class Judge(Protocol):
    """Scores or compares completions."""

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order; a score is `None` where there is no verdict, with a note.

        Raises:
            JudgeError: the judge failed for good.

        """
        ...


@dataclass(frozen=True, slots=True)
class CorrectionTools:
    """What a corrector works with: the round's sampler and judge, and the recipe's `locator` where it names one."""

    sampler: GoesOn
    judge: Judge
    locator: Judge | None


class Corrector(Protocol):
    """Draws more completions of a group once its own are judged, such as corrections of the wrong ones."""

    def __call__(
        self, groups: Sequence[JudgedGroup], tools: CorrectionTools, context: RoundContext
    ) -> list[JudgedGroup]:
        """Return the groups in order, each with its completions first and then those that were added, all judged.

        Raises:
            JudgeError, SamplerError: a tool failed for good.

        """
        ...


class PairBuilder(Protocol):
    """Makes preference pairs from judged groups.

    Where `needs_scores` is false, completions are not judged first. Where `needs_gold` is true, only prompts with a
    reference answer take part; where `needs_scores` is true too, that answer is judged beside the completions. One that
    makes views for a loss has a class attribute `views`, their names: see `views_of`. Where `one_sided` is true, a pair
    may have an `ABSENT` side. One that reads `JudgedGroup.solutions` has a class attribute `needs_steps = True`; one
    that reads `RoundContext.logps` has `needs_logps = True`.
    """

    needs_scores: ClassVar[bool]
    needs_gold: ClassVar[bool]

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield pairs; a group without a usable difference yields none."""
        ...


class Loss(Protocol):
    """A published objective: see `losses/`.

    `couples_rows` says that one row's loss depends on the other rows: the rows of a step must then stay together.
    A loss that reads more than the two sides of a pair has a class attribute `views`, the names of what it reads
    beside them, and the pair builder must make these: see `views_of`.
    """

    needs_reference: ClassVar[bool]
    consumes: ClassVar[str]
    couples_rows: ClassVar[bool]
    level: ClassVar[str]

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Return one loss value for each row."""
        ...


@runtime_checkable
class ChecksPolicy(Protocol):
    """A sampler that cannot serve every policy says so before any work."""

    def check_policy(self, policy: PolicyRef) -> None:
        """Raise ConfigError if it cannot draw for a run that starts from `policy`."""
        ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """An order, a sampler or a judge that cannot use all data says so before any work."""

    def check_prompts(self, prompts: Sequence[Prompt], rounds: int) -> object:
        """Raise DataError if `prompts` lack what the part goes by, or do not suffice for `rounds`."""
        ...


@runtime_checkable
class ChecksSampler(Protocol):
    """A pair builder that cannot use every sampler's completions says so before any work."""

    def check_sampler(self, sampler: object) -> None:
        """Raise ConfigError if completions of `sampler` make no pairs."""
        ...


def uses_versions(sampler: Sampler) -> bool:
    """Return whether a sampler's completions depend on `RoundContext.versions`; most do not and do not say so."""
    return bool(getattr(sampler, "uses_versions", False))


def views_of(part: Loss | PairBuilder) -> tuple[str, ...]:
    """Return the names of the views that a loss reads or a pair builder makes; most have none and do not say so."""
    names: tuple[str, ...] = getattr(part, "views", ())
    return names


def reads_squares(loss: Loss) -> bool:
    """Return whether a loss reads `CompletionLogps.log_squares`; most do not and do not say so."""
    return bool(getattr(loss, "reads_squares", False))


def one_sided(builder: PairBuilder) -> bool:
    """Return whether a pair builder's pairs may have an absent side; most have none and do not say so."""
    return bool(getattr(builder, "one_sided", False))


def needs_logps(builder: PairBuilder) -> bool:
    """Return whether a pair builder reads the first policy's log-probs; most do not and do not say so."""
    return bool(getattr(builder, "needs_logps", False))


def needs_steps(builder: PairBuilder) -> bool:
    """Return whether a pair builder needs a corrector to cut completions into steps; most do not and do not say so."""
    return bool(getattr(builder, "needs_steps", False))


class Gate(Protocol):
    """Decides whether a round's policy is promoted."""

    def __call__(self, metrics: Mapping[str, Metric], baseline: Mapping[str, Metric]) -> Decision:
        """Compare the candidate's metrics with those of the best policy so far."""
        ...


@runtime_checkable
class SharesAlpha(Protocol):
    """A gate whose rounds share one error rate: `metric` is given to it with an interval of the level that it asks."""

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        ...

    def level(self, number: int, rounds: int) -> float:
        """Return the level, 0–1, of the interval that decides round `number`, from 0, of a run of `rounds`.

        Raises:
            ConfigError: nothing of the error rate is left for that many rounds.

        """
        ...


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """What a logger knows of a run: its folder, its name, an id that stays the same when it goes on, its settings."""

    root: Path
    name: str
    id: str
    settings: Mapping[str, Any]


class LogSession(Protocol):
    """An open connection of a logger. Whatever it raises switches the logger off and does not stop the run."""

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Tell of values by name; `axis` is what they are counted by and `at` their place on it."""
        ...

    def flush(self) -> None:
        """Put on disk what was told so far."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Logger(Protocol):
    """Sends a run's numbers somewhere. It refuses to be built where its package is missing."""

    def __call__(self, run: LoggedRun) -> LogSession:
        """Open a connection for the run, or go on with the one that it had."""
        ...


class Progress(Protocol):
    """Where long stages report to. The command line draws bars; the default says nothing."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage of `total` units, `done` of which were finished before."""
        ...

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count finished units; `note` is shown beside the bar."""
        ...

    def finish(self) -> None:
        """End the stage."""
        ...

    def say(self, text: str) -> None:
        """Show one line that stays."""
        ...


@dataclass(frozen=True)
class Quiet:
    """A `Progress` that shows nothing."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""
