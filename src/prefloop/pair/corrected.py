"""The pairs of any other rule, corrected by people."""

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import TypeAdapter, ValidationError

from prefloop.artifact import file_digest
from prefloop.errors import ConfigError
from prefloop.pair._verdicts import DROP, FLIP, VerdictFile, read_verdicts
from prefloop.protocols import ChecksSampler, PairBuilder, RoundContext, one_sided, views_of
from prefloop.rows import JudgedGroup, PreferencePair, digest_of
from prefloop.userfile import import_user

PLACE = "pair_builder.of (pair/corrected.py)"


@dataclass(frozen=True)
class Corrected:
    """The pairs of another rule, exchanged or dropped where people say so: see docs/labelling.md.

    A verdict for the pair's rejected side exchanges the sides: the pair is `flipped`, its margin is 0 where the judge's
    scores speak against people, and `win_prob` stays the judge's probability that the side which is now chosen is
    better. Tie and both bad drop the pair. Pairs on which people say nothing stay as they are.

    A correction by people as in TSO (arXiv 2409.02118, which `model_matrix` does for its own pairs), for every rule
    with two sides. That exchanged pairs keep their weight, and what happens to margin and probability, is ours.

    Raises:
        ConfigError: `of` is not a pair rule of this folder or has a wrong setting, its pairs have views or one side
            only, or the file of corrections cannot be read.
        DataError: a line of that file is wrong.

    """

    of: str | Mapping[str, Any] = "ranked"
    """The rule that makes the pairs: its kind, ./my_rule.py:Name, or a mapping with `kind` and that rule's own fields,
    such as {kind: ranked, rule: above_margin}. Default ranked, with its defaults."""
    corrections: str | None = None
    """Path of a JSONL file with people's verdicts on the pairs of one round, as `prefloop label RUN --export` writes:
    `prompt_id`, `left` and `right` (texts), or `pair_id`, whose chosen side is left; and `verdict` left, right, tie or
    both_bad. A pair that does not exist is an error. Give each round its own file by `per_round`."""

    # What the other rule makes of its settings, and the content of `corrections`: a stage's key notices a change.
    settings: Mapping[str, Any] = field(init=False, default_factory=dict)
    corrections_digest: str | None = field(init=False, default=None)

    # Of the class; an object has the values of the other rule.
    needs_scores: ClassVar[bool] = True
    needs_gold: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rule = self._rule
        object.__setattr__(self, "needs_scores", rule.needs_scores)
        object.__setattr__(self, "needs_gold", rule.needs_gold)
        kind = self.of if isinstance(self.of, str) else self.of.get("kind")
        object.__setattr__(self, "settings", dataclasses.asdict(cast("Any", rule)) | _file_of(kind))
        if self._verdicts is not None:
            object.__setattr__(self, "corrections_digest", file_digest(Path(self._verdicts.path)))

    @cached_property
    def _rule(self) -> PairBuilder:
        settings = {"kind": self.of} if isinstance(self.of, str) else dict(self.of)
        kind = settings.pop("kind", None)
        rule = _built(kind, settings)
        if one_sided(rule) or views_of(rule) or isinstance(rule, Corrected):
            raise ConfigError(
                f"{PLACE}: the pairs of {kind} cannot be exchanged; choose a rule whose pairs have two sides"
            )
        return rule

    @cached_property
    def _verdicts(self) -> VerdictFile | None:
        return None if self.corrections is None else read_verdicts(self.corrections)

    def check_sampler(self, sampler: object) -> None:
        """Let the other rule refuse a sampler.

        Raises:
            ConfigError: it does.

        """
        if isinstance(self._rule, ChecksSampler):
            self._rule.check_sampler(sampler)

    def __call__(self, groups: Iterable[JudgedGroup], context: RoundContext) -> Iterator[PreferencePair]:
        """Yield the other rule's pairs in its order, without those that people dropped.

        Raises:
            DataError: `corrections` names a pair that is not there, or two of its lines disagree on one pair.

        """
        used: set[int] = set()
        for pair in self._rule(groups, context):
            said = None
            if self._verdicts is not None:
                ids = (pair.pair_id, digest_of(pair.rejected.completion_id, pair.chosen.completion_id))
                said, lines = self._verdicts.of(pair.prompt.prompt_id, ids, (pair.chosen.text, pair.rejected.text))
                used |= lines
            if said != DROP:
                yield dataclasses.replace(
                    _exchanged(pair) if said == FLIP else pair, builder=f"corrected/{pair.builder}"
                )
        if self._verdicts is not None:
            self._verdicts.require_known(used)


def _exchanged(pair: PreferencePair) -> PreferencePair:
    margin = 0.0
    if pair.chosen_score is not None and pair.rejected_score is not None:
        margin = max(0.0, pair.rejected_score - pair.chosen_score)
    return dataclasses.replace(
        pair,
        pair_id=digest_of(pair.rejected.completion_id, pair.chosen.completion_id),
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_score=pair.rejected_score,
        rejected_score=pair.chosen_score,
        margin=margin,
        win_prob=None if pair.win_prob is None else 1 - pair.win_prob,
        flipped=not pair.flipped,
    )


def _built(kind: Any, settings: Mapping[str, Any]) -> PairBuilder:
    found = _rule_class(kind)
    known = sorted(f.name for f in dataclasses.fields(found) if f.init)
    for name in settings:
        if name not in known:
            raise ConfigError(f"{PLACE}: {kind} has no field {name!r}; it has {', '.join(known) or 'none'}")
    try:
        made: PairBuilder = TypeAdapter(found).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{PLACE}: {kind}.{place}: {first['msg']}, got {first['input']!r}") from None
    return made


def _rule_class(kind: Any) -> Any:
    if isinstance(kind, str) and ".py" in kind:
        found = import_user(kind, PLACE)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ConfigError(f"{PLACE}: {kind} is not a dataclass; its fields are the settings (see docs/extend.md)")
        return found
    known = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if kind not in known:
        raise ConfigError(
            f"{PLACE}: no pair rule {kind!r}; kind must be one of {', '.join(known)}, or ./my_rule.py:Name"
        )
    wanted = str(kind).replace("_", "")
    module = vars(importlib.import_module(f"prefloop.pair.{kind}"))
    return next(v for name, v in module.items() if name.lower() == wanted and isinstance(v, type))


def _file_of(kind: Any) -> dict[str, str]:
    """Return the content of a user's rule, so that a changed one is noticed; nothing for a rule of ours."""
    if not (isinstance(kind, str) and ".py" in kind):
        return {}
    return {"content": file_digest(Path(kind.rpartition(":")[0] if ".py:" in kind else kind))}
