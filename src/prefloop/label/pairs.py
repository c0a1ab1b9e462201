"""The pairs of a round as people are asked about them: which, and in what order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError, DataError
from prefloop.rows import ABSENT, JudgedGroup, Message, PreferencePair, digest_of

PAIRS = "3-pairs"
JUDGED = "2-judged"


@dataclass(frozen=True, slots=True)
class Item:
    """A pair to judge.

    `key` names the prompt and the two texts, whichever of them is chosen: a pair that a correction exchanged has the
    same one. `pair_ids` are the pair's own id, and the one that it would have with its sides exchanged. `doubt` is how
    likely the run's judge takes the rejected side to be the better one, 0 to 1; `None` where it left no trace of that.
    `margin` is in the judge's units.
    """

    key: str
    pair_ids: tuple[str, str]
    prompt_id: str
    messages: tuple[Message, ...]
    prefix: str
    chosen: str
    rejected: str
    builder: str
    flipped: bool
    doubt: float | None
    margin: float


@dataclass(frozen=True)
class RoundPairs:
    """The pairs of one round, the most informative first.

    `judged` is the digest of what they were made from, `rule` the kind of the pair rule that made them.
    """

    run: str
    round: int
    judged: str
    rule: str
    items: tuple[Item, ...]
    by_key: Mapping[str, Item] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {item.key: item for item in self.items})


def load_round(root: Path, number: int | None = None) -> RoundPairs:
    """Read the pairs of round `number`, or of the latest round that has some. The artifact is not changed.

    Pairs with one side only, and pairs of two equal texts, are left out: there is nothing to choose.

    Raises:
        ConfigError: there is no such round.
        DataError: the run has no finished pairs, or none that can be shown.
        CorruptArtifact: a part is missing or damaged.

    """
    folder = _folder(root, number)
    artifact = load_artifact(folder / PAIRS, PreferencePair)
    assert artifact is not None
    doubts = _Doubts(load_artifact(folder / JUDGED, JudgedGroup) or ())
    found: dict[str, Item] = {}
    for pair in artifact:
        if pair.chosen.media or pair.rejected.media or pair.prompt.media:
            raise DataError(f"{folder / PAIRS}: pair {pair.pair_id} has images or videos; the page shows texts only")
        if ABSENT not in (pair.chosen, pair.rejected) and pair.chosen.text != pair.rejected.text:
            item = _item(pair, doubts.of(pair))
            found.setdefault(item.key, item)
    if not found:
        raise DataError(f"{folder / PAIRS}: no pair of two different texts, so there is nothing to judge")
    items = sorted(found.values(), key=informative)
    made = artifact.manifest
    return RoundPairs(
        run=root.resolve().name,
        round=_number(folder),
        judged=str(made["inputs"]["judged"]),
        rule=str(made["settings"]["pair_builder"]["kind"]),
        items=tuple(items),
    )


def informative(item: Item) -> tuple[bool, float, float, str]:
    """Return what pairs are sorted by, the most informative first.

    Pairs whose sides a judge exchanged against the pair rule come first: there two opinions differ. Then those that the
    judge itself is least sure of, then those with the smallest margin. Equals go by key, in the same order for
    everybody, so that several people judge the same pairs and can be compared.
    """
    return (not item.flipped, -(item.doubt or 0.0), item.margin, item.key)


def key_of_pair(prompt_id: str, prefix: str, texts: Iterable[str]) -> str:
    """Return the name of a pair that does not depend on which side is chosen: 16 hexadecimal digits."""
    return digest_of("pair", prompt_id, prefix, sorted(texts))


def _item(pair: PreferencePair, doubt: float | None) -> Item:
    prefix = pair.prefix.text if pair.prefix is not None else ""
    return Item(
        key=key_of_pair(pair.prompt.prompt_id, prefix, (pair.chosen.text, pair.rejected.text)),
        pair_ids=(pair.pair_id, digest_of(pair.rejected.completion_id, pair.chosen.completion_id)),
        prompt_id=pair.prompt.prompt_id,
        messages=pair.prompt.messages,
        prefix=prefix,
        chosen=pair.chosen.text,
        rejected=pair.rejected.text,
        builder=pair.builder,
        flipped=pair.flipped,
        doubt=doubt,
        margin=pair.margin,
    )


class _Doubts:
    """How often a judge that judged a completion several times said the opposite of the pair."""

    def __init__(self, groups: Iterable[JudgedGroup]) -> None:
        self._scores: dict[str, list[float]] = {}
        for group in groups:
            for judgement in group.judgements:
                if judgement.score is not None:
                    name = group.completions[judgement.completion].completion_id
                    self._scores.setdefault(name, []).append(judgement.score)

    def of(self, pair: PreferencePair) -> float | None:
        """Return the share of its judgements that favour the rejected side, ties half; else 1 − win probability."""
        chosen, rejected = (self._scores.get(side.completion_id, []) for side in (pair.chosen, pair.rejected))
        if len(chosen) > 1 and len(rejected) > 1:
            against = sum((b > a) + (b == a) / 2 for a in chosen for b in rejected)
            return against / (len(chosen) * len(rejected))
        return None if pair.win_prob is None else 1 - pair.win_prob


def _folder(root: Path, number: int | None) -> Path:
    there = {_number(path.parent.parent): path.parent.parent for path in root.glob(f"round-*/{PAIRS}/manifest.json")}
    if not there:
        raise DataError(f"{root}: no round has finished pairs yet; run it first, then label")
    if number is None:
        return there[max(there)]
    if number not in there:
        raise ConfigError(
            f"--round: {root} has no finished pairs of round {number}; there are {', '.join(map(str, sorted(there)))}"
        )
    return there[number]


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))
