"""How far a run's judges can be trusted, measured on what the run has: `judging` of summary.json.

Read are the scores of training and held-out completions, the stored replies of judges that compare, the second opinions
below, and what people said on the page of `prefloop label`. Nobody is asked anything here but the second judge.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from prefloop.artifact import Artifact, Key, load_artifact, locked, read_json, write_json
from prefloop.components import Parts, key_of
from prefloop.errors import DataError
from prefloop.evaluate.agreement import TIE
from prefloop.evaluate.judging import JUDGE, PEOPLE, PERSON, SECOND, Item, Orders, Scored, compared, judge_metrics
from prefloop.evaluate.judging import notes as notes_on
from prefloop.evaluate.summary import metric_json
from prefloop.judge._llm_store import Filed, comparisons_in
from prefloop.judge.llm import FILE
from prefloop.label.consensus import majority, votes_of
from prefloop.label.pairs import key_of_pair
from prefloop.label.store import BOTH_BAD, CHOSEN, REJECTED, exchanged, open_store
from prefloop.label.store import FILE as LABELS
from prefloop.label.store import TIE as TIED
from prefloop.ledger import SUMMARY
from prefloop.protocols import RoundContext
from prefloop.recipe import Recipe
from prefloop.rows import ABSENT, JudgedGroup, PreferencePair, SampleGroup
from prefloop.stages import Run, judged_group, write_parts

OPINIONS = "6-second-opinion"
"""Artifact in 6-report: what the evaluation's judge says of some of the round's pairs."""


def same_judge(recipe: Recipe, parts: Parts) -> str:
    """Return in what way the evaluation's judge is the training judge again: `judge`, `model`, or an empty string."""
    assert recipe.judge is not None
    if recipe.eval_judge is None:
        return "judge"
    one, two = key_of(parts.judge, recipe.judge.kind), key_of(parts.eval_judge, recipe.eval_judge.kind)
    if one == two:
        return "judge"
    weights = [_weights(settings) for settings in (one, two)]
    return "model" if weights[0] is not None and weights[0] == weights[1] else ""


def _weights(settings: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what names the model behind a judge's settings; `None` for a judge without one."""
    named = settings.get("model") or settings.get("path")
    return None if named is None else (named, settings.get("base_url"))


def top_scores(parts: Parts) -> dict[str, float | None]:
    """Return the best score that each judge can give, where it has one and says so."""
    return {rater: getattr(getattr(parts, rater), "top_score", None) for rater in (JUDGE, SECOND)}


def second_opinion(
    run: Run,
    path: Path,
    judged: Artifact[JudgedGroup],
    pairs: Artifact[PreferencePair],
    context: RoundContext,
) -> Artifact[JudgedGroup] | None:
    """6-report/6-second-opinion: the evaluation's judge on some of the round's pairs, to compare it with the judge.

    `None` where there is no other judge, or `evaluate.second_opinion` is 0. Which side is shown first does not depend
    on which one is chosen.
    """
    recipe, count = run.recipe, run.recipe.evaluate.second_opinion
    if not count or recipe.eval_judge is None or not run.parts.pair_builder.needs_scores:
        return None
    if same_judge(recipe, run.parts) == "judge":
        return None
    judge, kind = run.parts.eval_judge, recipe.eval_judge.kind
    settings = {"judge": key_of(judge, kind), "pairs": count}
    opened = run.open(path, Key("second-opinion", settings, {"pairs": pairs.digest}), JudgedGroup)
    if isinstance(opened, Artifact):
        return opened
    known = {c.completion_id for group in judged for c in group.completions}
    asked = [
        _asked(pair)
        for pair in pairs
        if _whole(pair) and {pair.chosen.completion_id, pair.rejected.completion_id} <= known
    ]
    chosen = [asked[i * len(asked) // count] for i in range(count)] if len(asked) > count else asked

    def make(groups: Sequence[SampleGroup]) -> Iterator[JudgedGroup]:
        verdicts = judge(groups, context)
        return (judged_group(g, v, kind) for g, v in zip(groups, verdicts, strict=True))

    return write_parts(run, opened, [chosen] if chosen else [], make, "second opinion")


def _whole(pair: PreferencePair) -> bool:
    return ABSENT not in (pair.chosen, pair.rejected) and pair.chosen.text != pair.rejected.text


def _asked(pair: PreferencePair) -> SampleGroup:
    sides = (pair.chosen, pair.rejected) if _chosen_first(pair) else (pair.rejected, pair.chosen)
    return SampleGroup(pair.prompt, sides, pair.chosen.source, pair.round, 1.0, 1.0)


def _key(pair: PreferencePair) -> str:
    prefix = pair.prefix.text if pair.prefix is not None else ""
    return key_of_pair(pair.prompt.prompt_id, prefix, (pair.chosen.text, pair.rejected.text))


def _chosen_first(pair: PreferencePair) -> bool:
    """Return whether the chosen side is the first one of an item: by the pair's key, which no label changes."""
    return (int(_key(pair)[-1], 16) % 2 == 0) == (pair.chosen.text < pair.rejected.text)


def measured(root: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return `judging` of summary.json: what the run folder says of its judges now; see docs/artifacts.md.

    Raises:
        CorruptArtifact: an artifact is damaged.

    """
    seed, problems = summary["seed"], list[str]()
    tops = summary.get("top_scores") or {}
    numbers = [entry["round"] for entry in summary["rounds"]]
    folders = {number: root / f"round-{number:03d}" for number in numbers}
    filed = list(_filed(root, summary, problems))
    trained, held_out = _Side(), _Side()
    for folder in folders.values():
        trained.read(folder / "2-judged")
        held_out.read(folder / "6-report" / "2-judged")
    held_out.read(root / "start" / "2-judged")
    items = list(_items(root, folders, _Own(summary, filed), problems))
    found: dict[str, Any] = {}
    for rater, side in ((JUDGE, trained), (SECOND, held_out)):
        orders = _orders(filed, side.ids)
        metrics = judge_metrics(side.scored, orders, items, rater, tops.get(rater), seed)
        settings = summary.get(rater) or {}
        found[rater] = {
            "kind": settings.get("kind"),
            "metrics": {name: metric_json(metric) for name, metric in metrics.items()},
        }
    found["agreement"] = compared(items, seed)
    found["sampler"] = [gap for entry in summary["rounds"] if (gap := _sampler_gap(entry)) is not None]
    found["notes"] = [*notes_on(found), *problems]
    return found


def refresh(root: Path) -> dict[str, Any]:
    """Measure a finished run anew, for people may have judged since, and put that into its summary.json.

    Returns the summary. That of a run that is not finished is left as it is: the run itself writes it.

    Raises:
        DataError: another process works in this folder.

    """
    summary: dict[str, Any] = read_json(root / SUMMARY)
    if summary.get("state") == "done" and "judging" in summary:
        with locked(root):
            summary["judging"] = measured(root, summary)
            write_json(root / SUMMARY, summary)
    return summary


@dataclass
class _Side:
    """What one judge said of completions, and the ids of these."""

    scored: Scored = field(default_factory=Scored)
    ids: set[str] = field(default_factory=set)

    def read(self, path: Path) -> None:
        for group in load_artifact(path, JudgedGroup) or ():
            if group.judge == "unscored":
                continue  # the pair rule asked no judge
            self.scored.add(group)
            self.ids |= {completion.completion_id for completion in group.completions}


@dataclass(frozen=True)
class _Own:
    """Knows which completions the training judge's own model wrote."""

    summary: Mapping[str, Any]
    filed: Sequence[Filed]

    def names(self) -> set[str]:
        """Return what completions of the judge's model give as their source."""
        settings = self.summary.get(JUDGE) or {}
        stored = {row.judge for row in self.filed if settings.get("kind") == "llm"}
        model = settings.get("model")
        return {*stored, *(name.partition(" ")[2] for name in stored), *([model] if model else [])} - {"", "policy"}

    def is_policy(self) -> bool:
        """Whether the judge is the policy that made the round's samples."""
        settings = self.summary.get(JUDGE) or {}
        return settings.get("kind") == "self_likelihood" or (
            settings.get("model") == "policy" and not settings.get("base_url")
        )


def _filed(root: Path, summary: Mapping[str, Any], problems: list[str]) -> Iterator[Filed]:
    named = [(summary.get(rater) or {}).get("store") for rater in (JUDGE, SECOND)]
    paths = [root / "judge-store" / FILE, *(Path(name) for name in dict.fromkeys(named) if name)]
    for path in paths:
        if path.is_file():
            try:
                yield from comparisons_in(path)
            except DataError as error:
                problems.append(str(error))


def _orders(filed: Iterable[Filed], ids: set[str]) -> Orders:
    """Return the verdicts on every two of the completions `ids` that were compared in both orders."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in filed:
        for (a, first), (b, second) in combinations(enumerate(row.shown), 2):
            if first in ids and second in ids:
                key = (row.judge, row.mode, row.template, row.prompt_id, *sorted((first, second)), row.repeat)
                found.setdefault(key, {})[first] = _winner(row.values[0], (a, first), (b, second))
    orders = Orders()
    for (_, _, _, prompt, one, two, _), said in sorted(found.items()):
        if len(said) == 2:
            orders.ab.append({one: 1, two: 2}.get(said[one], TIE))
            orders.ba.append({one: 1, two: 2}.get(said[two], TIE))
            orders.prompts.append(prompt)
    return orders


def _winner(value: Any, first: tuple[int, str], second: tuple[int, str]) -> str | None:
    if isinstance(value, str):
        return {"A": first[1], "B": second[1]}.get(value)
    places = value[first[0]], value[second[0]]
    return None if places[0] == places[1] else (first if places[0] < places[1] else second)[1]


def _items(root: Path, folders: Mapping[int, Path], own: _Own, problems: list[str]) -> Iterator[Item]:
    """Yield the rounds' pairs that two raters or more judged."""
    names, is_policy = own.names(), own.is_policy()
    said = _people(root, folders, problems)
    for number, folder in folders.items():
        prompts = {
            group.prompt.prompt_id: group.policy for group in load_artifact(folder / "2-judged", JudgedGroup) or ()
        }
        second = _opinions(folder / "6-report" / OPINIONS)
        people = said(number)
        for pair in load_artifact(folder / "3-pairs", PreferencePair) or ():
            policy = prompts.get(pair.prompt.prompt_id)
            if policy is None or not _whole(pair) or pair.round != number:
                continue  # judgements that are trained on have prompts of their own
            item = _item(pair, {*names, *([policy] if is_policy else [])}, second, people)
            if len(item.ratings) > 1:
                yield item


def _item(
    pair: PreferencePair,
    own: set[str],
    second: Mapping[frozenset[str], Mapping[str, float]],
    people: Callable[[PreferencePair], Mapping[str, str]],
) -> Item:
    sides = (pair.chosen, pair.rejected) if _chosen_first(pair) else (pair.rejected, pair.chosen)
    side_of = {CHOSEN: 1 if sides[0] is pair.chosen else 2, REJECTED: 2 if sides[0] is pair.chosen else 1}
    ratings: dict[str, Any] = {}
    judge = _of_judge(pair)
    if judge is not None:
        ratings[JUDGE] = side_of.get(judge, TIE)
    opinion = second.get(frozenset(side.completion_id for side in sides))
    if opinion is not None:
        wins = opinion[sides[0].completion_id]
        ratings[SECOND] = 1 if wins > 0.5 else 2 if wins < 0.5 else TIE
    ratings |= {name: side_of.get(verdict, TIE) for name, verdict in people(pair).items()}
    mine = [place for place, side in enumerate(sides, 1) if side.source in own]
    return Item(
        prompt=pair.prompt.prompt_id,
        lengths=(len(sides[0].text), len(sides[1].text)),
        own=mine[0] if len(mine) == 1 else None,
        ratings=ratings,
    )


def _of_judge(pair: PreferencePair) -> str | None:
    """Return which side the judge prefers, whatever a correction made of the pair; `None`: it did not say."""
    if pair.chosen_score is not None and pair.rejected_score is not None:
        margin = pair.chosen_score - pair.rejected_score
    elif pair.win_prob is not None:
        margin = pair.win_prob - 0.5
    else:
        return None
    return CHOSEN if margin > 0 else REJECTED if margin < 0 else TIED


def _opinions(path: Path) -> dict[frozenset[str], dict[str, float]]:
    """Return for the two ids of each pair the second judge's preference for each of them."""
    found = {}
    for group in load_artifact(path, JudgedGroup) or ():
        scored = Scored()
        scored.add(group)
        if scored.wins:
            one, two = (completion.completion_id for completion in group.completions)
            found[frozenset((one, two))] = {one: scored.wins[0], two: 1 - scored.wins[0]}
    return found


def _people(
    root: Path, folders: Mapping[int, Path], problems: list[str]
) -> Callable[[int], Callable[[PreferencePair], dict[str, str]]]:
    """Return a function from a round to one that says what people think of a pair: the side, by rater."""
    votes: dict[int, dict[str, dict[str, str]]] = {}
    stored_chosen: dict[int, dict[str, str]] = {}
    if (root / LABELS).is_file():
        try:
            with open_store(root) as store:
                for number in folders:
                    by_key = votes_of(store.given(number))
                    votes[number] = {k: {n: one.verdict for n, one in by.items()} for k, by in by_key.items()}
                    stored_chosen[number] = {key: pair.chosen for key, pair in store.pairs(number).items()}
        except DataError as error:
            problems.append(str(error))

    def of(number: int) -> Callable[[PreferencePair], dict[str, str]]:
        def said(pair: PreferencePair) -> dict[str, str]:
            key = _key(pair)
            given = votes.get(number, {}).get(key, {})
            if not given:
                return {}
            turned = stored_chosen[number][key] != pair.chosen.text
            now = {name: exchanged(verdict) if turned else verdict for name, verdict in given.items()}
            found = {f"{PERSON}{name}": TIED if verdict == BOTH_BAD else verdict for name, verdict in now.items()}
            most = majority(list(now.values()))
            return found | ({} if most is None else {PEOPLE: TIED if most == BOTH_BAD else most})

        return said

    return of


def _sampler_gap(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    batches = (entry.get("facts") or {}).get("batches") or {}
    if "sampler_gap" not in batches:
        return None
    gap = batches["sampler_gap"]
    finite = isinstance(gap, float | int) and gap < float("inf")
    return {"round": entry["round"], "gap": gap if finite else None, "reference_logps": batches.get("reference_logps")}
