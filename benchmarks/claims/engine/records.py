"""What a claim is, in words and settings. No torch here: claims are read by tests and by the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal

Statistic = Literal["final", "first", "later_gain", "last_gain", "drafts", "revised", "revision_gain", "regressions"]


PLAIN = {"kind": "hf"}
"""Held-out completions as the policy draws them, at temperature 1."""


@dataclass(frozen=True)
class Arm:
    """One side: a recipe of prefloop and what is changed in it, on top of the claim's common settings."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    """`key=value`, as on the command line. `{parts}` stands for the folder of that name."""
    words: str = ""
    """What the arm does, for the page."""
    rate: float | None = None
    """A learning rate of its own, for a claim about learning rates. None: the claim's."""
    eval_sampler: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))
    """How held-out completions are drawn, by kind and settings: another one for revisions, say."""
    revisions: tuple[int, ...] = ()
    """The policy at the end is measured with each of these numbers of self-revisions, in the place of every round's
    policy as it is. Its curve is then the start, and one value for each number."""


@dataclass(frozen=True)
class Comparison:
    """`better` against `than`, paired by seed. Several arms on a side are averaged within the seed."""

    words: str
    """The claim's part that this decides, in words."""
    better: tuple[str, ...]
    than: tuple[str, ...] = ()
    """Empty: compared with zero."""
    statistic: Statistic = "final"
    """What of a run is compared: see `statistics.STATISTICS`."""
    sign: Literal[1, -1] = 1
    """−1: the claim is that `better` has less of it."""
    than_statistic: Statistic | None = None
    """What of the other side's runs is compared. None: `statistic`."""
    by: float = 0.0
    """The difference has to exceed this, in units of the quality."""
    quality: "Quality | None" = None
    """A quality other than the claim's, by judges that the claim has anyhow: see `Claim.judges`."""


@dataclass(frozen=True)
class Quality:
    """What counts as good, by judges of which no arm sees one in training.

    - `rank`: each judge's score becomes its rank among the starting policy's completions, 0–100, and a completion is
      as good as the lowest of its ranks. Judges of different units go together, and a text that pleases one judge at
      the cost of another is not good.
    - `percent`: the mean score of the only judge, times 100.
    """

    words: str
    judges: tuple[str, ...]
    """Names in `worlds.JUDGES`."""
    kind: Literal["rank", "percent"] = "rank"

    @property
    def unit(self) -> str:
        """The unit of a quality, for tables."""
        return "rank among the start's completions, 0–100" if self.kind == "rank" else "%"


@dataclass(frozen=True)
class Claim:
    """A headline claim and how it is tested. All arms have the `common` settings and the same grid of rates."""

    title: str
    statement: str
    """The claim as the paper makes it, in our words."""
    source: str
    judge: str
    """Name of the training judge in `worlds.JUDGES`."""
    quality: Quality
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    world: Literal["stories", "sums"] = "stories"
    common: tuple[str, ...] = ()
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Learning rates. With several each arm gets the one that does best for it on validation prompts and other seeds;
    with one, all arms have it."""
    data: Literal["prompts", "rated", "sources"] = "prompts"
    """Where completions to train on come from: sampled in the run, or a file made for each seed: see `data.py`."""
    start: Literal["shipped", "tuned"] = "shipped"
    """The policy as prefloop ships it, or fine-tuned on the human answers: see `start.py`."""
    new_tokens: int = 64
    """Longest completion, in training and in evaluation."""
    beside: tuple[str, ...] = ()
    """Judges that are shown and take no part in the verdict."""
    notes: tuple[str, ...] = ()
    """What a reader should know: readings, departures, what was decided before the first run."""
    exact: str = ""
    """For a claim without runs, such as one about a tabular optimum: `package.module:function` that takes an arm's name
    and a seed and returns its quality. The arms' recipes and the judges are then not read."""
    needs: tuple[str, ...] = ()
    """Names in `worlds.NEEDS` beside those of the judges."""

    def judges(self) -> tuple[str, ...]:
        """Return the names of all evaluation judges."""
        others = (name for c in self.comparisons if c.quality for name in c.quality.judges)
        return tuple(dict.fromkeys((*self.quality.judges, *others, *self.beside)))

    def quality_of(self, comparison: Comparison) -> Quality:
        """Return the quality that a comparison is about."""
        return comparison.quality or self.quality

    def rates_of(self, arm: Arm) -> tuple[float, ...]:
        """Return the learning rates that an arm chooses from."""
        return (arm.rate,) if arm.rate is not None else self.rates


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `quick` is for a smoke test."""

    quick: bool = False
    validation: int = 120
    """Held-out prompts on which learning rates are chosen, and which a run's own gate looks at."""
    report: int = 300
    """At most this many others, for the reported numbers."""
    completions: int = 4
    """Completions of each held-out prompt."""
    tuning_seeds: tuple[int, ...] = (1001, 1002)
    """Seeds of the runs that choose learning rates; never reported."""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a learning rate and a seed, measured on one of the two sets of held-out prompts."""

    recipe: str
    settings: tuple[str, ...]
    judge: str
    judges: tuple[str, ...]
    world: str
    data: str
    start: str
    new_tokens: int
    rate: float
    seed: int
    split: Literal["validation", "report"]
    sizes: Sizes = field(default_factory=Sizes)
    eval_sampler: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))
    revisions: tuple[int, ...] = ()
