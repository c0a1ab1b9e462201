"""Several judges as one: averaged, the most cautious of them, or a majority vote."""

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev, pvariance
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from prefloop.errors import ConfigError
from prefloop.protocols import Judge, RoundContext
from prefloop.rows import SampleGroup, Verdict
from prefloop.userfile import import_user

PLACE = "judge.judges (judge/ensemble.py)"


@dataclass(frozen=True)
class Ensemble:
    """Asks several judges, such as reward models of different seeds, about the same completions.

        mean:      s(y) = mean_k s_k(y)
        lowest:    s(y) = min_k s_k(y)                          worst-case optimization
        cautious:  s(y) = mean_k s_k(y) − λ · var_k s_k(y)      uncertainty-weighted optimization
        vote:      every judge votes on every two completions; the majority decides

    mean, lowest and cautious are those of Coste et al. 2023, Reward Model Ensembles Help Mitigate Overoptimization,
    arXiv:2310.02743, where lowest and cautious held against overoptimization and the mean less so. Scores of different
    judges have different units: bring them to one with `scale`, or vote.

    A completion of which one judge has no score has none (mean, lowest, cautious). In a vote such a judge abstains from
    its pairs; fewer votes than `quorum` are no verdict. `win_prob` of a vote is the share of votes, ties half, and a
    completion's score the mean of its results against the others: 1 for a majority, ½ for a draw. How votes are
    counted, and `scale`, are ours.

    Raises:
        ConfigError: a field is out of range or has no effect, or one of the judges cannot be built.

    """

    judges: tuple[Mapping[str, Any], ...]
    """Two or more judges, each with `kind` and its own fields, such as {kind: reward_model, path: rm-seed-0}."""
    how: Literal["mean", "lowest", "cautious", "vote"] = "mean"
    """How their scores become one."""
    variance_weight: float | None = None
    """cautious: λ ≥ 0, in 1 / score units; the variance is that over judges, divided by their number."""
    scale: Literal["raw", "given", "group"] = "raw"
    """raw: scores as they are. given: (score − `centers`) / `spreads`. group: for each judge the scores of a prompt's
    completions with mean 0 and standard deviation 1, all 0 where they are equal; no judge of held-out prompts then."""
    centers: tuple[float, ...] = ()
    """given: one number for each judge, such as its mean score on a fixed set of completions."""
    spreads: tuple[float, ...] = ()
    """given: one number > 0 for each judge, such as the standard deviation of its scores there."""
    quorum: int | None = None
    """vote: votes that a pair needs, ≥ 1. Default: more than half of the judges."""

    members: tuple[Mapping[str, Any], ...] = field(init=False, default=())
    """Made: every field of every judge on which a verdict depends. Not a setting."""
    without_effect: ClassVar[tuple[str, ...]] = ("judges",)
    """Its content is in `members`, without budgets and the like."""

    def __post_init__(self) -> None:
        for name, holds, rule in self._rules():
            if not holds:
                raise ConfigError(f"judge.{name} (judge/ensemble.py): must be {rule}, got {getattr(self, name)!r}")
        object.__setattr__(self, "members", tuple(map(_facts, self._built, self.judges)))

    def _rules(self) -> Any:
        count = len(self.judges)
        given = self.scale == "given"
        yield "judges", count >= 2, "two judges or more, each with its kind"
        yield "how", self.how in ("mean", "lowest", "cautious", "vote"), "mean, lowest, cautious or vote"
        yield "scale", self.scale in ("raw", "given", "group"), "raw, given or group"
        yield "scale", self.how != "vote" or self.scale == "raw", "raw with how=vote: votes have no unit"
        weight = self.variance_weight
        yield (
            "variance_weight",
            (weight is not None) == (self.how == "cautious"),
            "set with how=cautious, and only then",
        )
        yield "variance_weight", weight is None or 0 <= weight < math.inf, "≥ 0"
        for name in ("centers", "spreads"):
            values = getattr(self, name)
            rule = "one number for each judge" if given else "left out: only scale=given reads it"
            yield name, len(values) == (count if given else 0), rule
        yield "spreads", all(0 < value < math.inf for value in self.spreads), "numbers > 0"
        yield "quorum", self.quorum is None or self.how == "vote", "left out: only how=vote reads it"
        yield "quorum", self.quorum is None or 1 <= self.quorum <= count, f"from 1 to the number of judges, {count}"

    @cached_property
    def _built(self) -> tuple[Judge, ...]:
        return tuple(map(_built, self.judges))

    @property
    def is_policy(self) -> bool:
        """Whether one of the judges is the policy: another judge in every round."""
        return any(getattr(judge, "is_policy", False) for judge in self._built)

    @property
    def within_groups(self) -> bool:
        """Whether scores only compare completions of one prompt, and so no two policies."""
        return self.scale == "group" or any(getattr(judge, "within_groups", False) for judge in self._built)

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order.

        Raises:
            ConfigError, DataError, JudgeError: one of the judges does.

        """
        asked = [judge(groups, context) for judge in self._built]
        combine = self._voted if self.how == "vote" else self._combined
        return [combine([verdicts[place] for verdicts in asked]) for place in range(len(groups))]

    def _combined(self, verdicts: Sequence[Verdict]) -> Verdict:
        scaled = [self._scaled(number, verdict.scores) for number, verdict in enumerate(verdicts)]
        scores: list[float | None] = []
        for several in zip(*scaled, strict=True):
            known = [score for score in several if score is not None]
            scores.append(self._one(known) if len(known) == len(several) else None)
        notes = [self._note([v.notes[i] for v in verdicts], [s[i] for s in scaled]) for i in range(len(scores))]
        return Verdict(tuple(scores), tuple(notes))

    def _scaled(self, number: int, scores: Sequence[float | None]) -> list[float | None]:
        known = [score for score in scores if score is not None]
        center, spread = 0.0, 1.0
        if self.scale == "given":
            center, spread = self.centers[number], self.spreads[number]
        elif self.scale == "group" and known:
            center, spread = fmean(known), pstdev(known)
            if len(set(known)) == 1:
                center, spread = known[0], 1.0
        return [None if score is None else (score - center) / spread for score in scores]

    def _one(self, scores: Sequence[float]) -> float:
        if self.how == "lowest":
            return min(scores)
        return fmean(scores) - (self.variance_weight * pvariance(scores) if self.variance_weight is not None else 0.0)

    def _note(self, notes: Sequence[str | None], scores: Sequence[float | None]) -> str | None:
        """Say which judges have no score, and repeat what they note."""
        said = [
            f"{self._name(number)}: {note or 'no score'}"
            for number, (note, score) in enumerate(zip(notes, scores, strict=True))
            if note or score is None
        ]
        return "; ".join(said) or None

    def _name(self, number: int) -> str:
        return f"judge {number + 1} ({self.judges[number]['kind']})"

    def _voted(self, verdicts: Sequence[Verdict]) -> Verdict:
        count = len(verdicts[0].scores)
        quorum = self.quorum if self.quorum is not None else len(verdicts) // 2 + 1

        def share(i: int, j: int) -> float | None:
            votes = [vote for verdict in verdicts if (vote := _vote(verdict, i, j)) is not None]
            return fmean(votes) if len(votes) >= quorum else None

        table = [[0.5 if i == j else share(i, j) for j in range(count)] for i in range(count)]
        scores: list[float | None] = []
        for i, row in enumerate(table):
            known = [value for j, value in enumerate(row) if j != i and value is not None]
            scores.append(fmean(_outcome(value) for value in known) if known else None)
        notes = [self._note([v.notes[i] for v in verdicts], [v.scores[i] for v in verdicts]) for i in range(count)]
        for i, score in enumerate(scores):
            if score is None and notes[i] is None:
                notes[i] = f"no pair with {quorum} votes: there is no other completion, or too few judges compare"
        rows = [tuple(value for value in row if value is not None) for row in table]
        whole = count > 1 and all(len(row) == count for row in rows)
        return Verdict(tuple(scores), tuple(notes), tuple(rows) if whole else None)


def _vote(verdict: Verdict, i: int, j: int) -> float | None:
    """Return a judge's vote for completion i over j: 1, ½ or 0; `None`: it abstains."""
    if verdict.win_prob is not None:
        return _outcome(verdict.win_prob[i][j])
    one, two = verdict.scores[i], verdict.scores[j]
    return None if one is None or two is None else _outcome(0.5 if one == two else float(one > two))


def _outcome(share: float) -> float:
    return 1.0 if share > 0.5 else 0.0 if share < 0.5 else 0.5


def _built(given: Mapping[str, Any]) -> Judge:
    settings = dict(given)
    kind = settings.pop("kind", None)
    found = _judge_class(kind)
    known = sorted(f.name for f in dataclasses.fields(found) if f.init)
    for name in settings:
        if name not in known:
            raise ConfigError(f"{PLACE}: {kind} has no field {name!r}; it has {', '.join(known) or 'none'}")
    try:
        made: Judge = TypeAdapter(found).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{PLACE}: {kind}.{place}: {first['msg']}") from None
    return made


def _facts(judge: Judge, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a judge on which its verdicts depend."""
    skipped = getattr(judge, "without_effect", ())
    settings = dataclasses.asdict(judge)  # type: ignore[call-overload]
    return {"kind": given["kind"], **{name: value for name, value in settings.items() if name not in skipped}}


def _judge_class(kind: Any) -> Any:
    if isinstance(kind, str) and ".py" in kind:
        found = import_user(kind, PLACE)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ConfigError(f"{PLACE}: {kind} is not a dataclass; its fields are the settings (see docs/extend.md)")
        return found
    known = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if kind not in known:
        raise ConfigError(f"{PLACE}: no judge {kind!r}; kind must be one of {', '.join(known)}, or ./my_judge.py:Name")
    wanted = str(kind).replace("_", "")
    module = vars(importlib.import_module(f"prefloop.judge.{kind}"))
    return next(value for name, value in module.items() if name.lower() == wanted and isinstance(value, type))
