"""The stages of a round. Each reads artifacts, writes one artifact, and does nothing if that is already there."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefloop import shelf
from prefloop.artifact import Artifact, Building, Key, StoredPart
from prefloop.components import Parts, key_of
from prefloop.errors import DataError, Interrupted, JudgeError
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, choose_layout, completion_logps
from prefloop.prompts.choice import by_id
from prefloop.prompts.store import ids_of, index_of, sides_of
from prefloop.protocols import Allotment, Judge, Progress, RoundContext, Sampler, uses_versions
from prefloop.recipe import Recipe
from prefloop.rows import (
    Completion,
    CompletionScore,
    JudgedGroup,
    PolicyRef,
    PreferencePair,
    Prompt,
    PromptMargin,
    SampleGroup,
    Verdict,
    digest_of_list,
    gold_completion,
)
from prefloop.team import ALONE, Team
from prefloop.together import open_shared
from prefloop.watch import Watch

R = TypeVar("R")
T = TypeVar("T")

PAIRS_PER_PART = 512
"""Pairs of one part of an artifact."""
PROMPTS_PER_PART = 8192
CHARACTERS_PER_PART = 2**25
"""Prompts, and characters of them, of one part of an artifact of prompts alone."""


@dataclass(frozen=True)
class Run:
    """What every stage needs to know: where, by which recipe, with which parts, whom to tell, and who works along."""

    root: Path
    recipe: Recipe
    parts: Parts
    progress: Progress
    stop: Callable[[], bool]
    begin: Callable[[], None]
    redo: bool = False
    team: Team = ALONE
    watch: Watch = field(default_factory=Watch)

    def open(self, path: Path, key: Key, record: type[R] | None, together: bool = False) -> Artifact[R] | Building[R]:
        """Open an artifact of this run; `begin` hears of it if there is something to make.

        With several ranks the main one makes it, and the others wait; with `together` all of them make it.
        """
        opened = open_shared(self.team, path, key, record, self.redo, together)
        if isinstance(opened, Building):
            self.begin()
        return opened

    def check_stop(self, where: str) -> None:
        """Raise `Interrupted` if the run was asked to stop; `where` names what is finished."""
        if self.stop():
            raise Interrupted(f"{where}: stopped; what is finished is on disk")


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut `items` into slices of `size`; the last may be shorter. Of prompts on disk they are views."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items as they come; the last may be shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def write_parts(  # noqa: PLR0913  the last two by name
    run: Run,
    building: Building[R],
    inputs: Sequence[Sequence[T] | StoredPart[T]],
    make: Callable[[Sequence[T]], Iterable[R]],
    label: str,
    count: Callable[[Iterable[R]], Mapping[str, Any]] | None = None,
    ahead: Callable[[int, Sequence[T]], Iterable[R] | None] = lambda *_: None,
) -> Artifact[R]:
    """Make one part from each of `inputs`, those that are missing, and finish the artifact with what `count` says.

    At most one part is in memory at a time, unless `inputs` are. Ranks that make it together take parts as they come
    to them; what is in a part does not depend on who makes it. `ahead` returns what was made of a part beforehand.
    """
    team = run.team if building.shared else ALONE
    began = time.monotonic()
    total = sum(len(part) for part in inputs)
    done = sum(len(part) for index, part in enumerate(inputs) if building.has_part(index))
    run.progress.start(label, total, "rows", done)
    for index in team.claims(len(inputs)):
        part = inputs[index]
        if building.has_part(index):
            continue
        rows = list(part)
        known = ahead(index, rows)
        building.write_part(index, make(rows) if known is None else known)
        run.progress.advance(len(part))
        run.check_stop(f"{label}, part {index + 1} of {len(inputs)}")
    team.gathered()
    if building.shared:
        building.look_again()
    run.progress.finish()
    facts = count(row for part in building.parts() for row in part) if count and team.main else {}
    return building.finish(facts, seconds=time.monotonic() - began)


def prompt_parts(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Yield prompts as parts of an artifact of them, at least one; the same prompts give the same parts."""
    part: list[Prompt] = []
    characters = 0
    for prompt in prompts:
        if len(part) == PROMPTS_PER_PART or characters > CHARACTERS_PER_PART:
            yield part
            part, characters = [], 0
        part.append(prompt)
        characters += sum([len(m.content) for m in prompt.messages])
        characters += sum([len(c.text) for c in prompt.candidates]) if prompt.candidates else 0
    yield part


def divisible(component: object) -> bool:
    """Return whether several ranks may use a sampler or judge at once, each on prompts of its own.

    Not those behind an endpoint, which ask many questions at a time from one process, nor those that say
    `one_process`, such as a judge that keeps count of what it has spent.
    """
    return getattr(component, "base_url", None) is None and not getattr(component, "one_process", False)


def store_prompts(run: Run, path: Path, prompts: Sequence[Prompt], threads: int) -> Artifact[Prompt]:
    """prompts: every prompt of the run with its split, so that a later change of the file is noticed.

    `threads` is noted for a rerun: sums depend on it, and a damaged summary must not change them.
    """
    opened = run.open(path, Key("all-prompts", {}, {"prompts": digest_of_list(sides_of(prompts))}), Prompt)
    if isinstance(opened, Artifact):
        return opened
    for number, part in enumerate(prompt_parts(prompts)):
        opened.write_part(number, part)
    train = len(prompts) - int(index_of(prompts).held_out.sum())
    return opened.finish({"train": train, "prompts": len(prompts), "threads": threads})


def measure_margins(run: Run, path: Path, prompts: Sequence[Prompt], start: PolicyRef) -> Artifact[PromptMargin]:
    """margins: how much likelier the first policy finds each prompt's best candidate than its worst.

    Raises:
        DataError: a prompt has no two candidates with different scores.

    """
    inputs = {"prompts": digest_of_list((p.prompt_id, [c.text for c in p.candidates]) for p in prompts)}
    key = Key("margins", {"layout": run.recipe.train.layout}, {**inputs, "start": start.digest})
    opened = run.open(path, key, PromptMargin, together=True)
    if isinstance(opened, Artifact):
        return opened
    lm = causal_lm.load(start.path, precision="auto", device=run.recipe.train.device)
    layout, _ = layout_of(run, lm.model)

    def make(part: Sequence[Prompt]) -> list[PromptMargin]:
        groups = [_best_and_worst(lm, prompt) for prompt in part]
        with torch.inference_mode():
            totals = completion_logps(lm.model, groups, layout=layout).total.tolist()
        return [
            PromptMargin(prompt.prompt_id, start.digest, totals[2 * i] - totals[2 * i + 1])
            for i, prompt in enumerate(part)
        ]

    return write_parts(run, opened, chunks(prompts, run.recipe.prompts_per_part), make, "margins under start")


def _best_and_worst(lm: causal_lm.CausalLM, prompt: Prompt) -> TokenGroup:
    rated = sorted((c.score, c.text) for c in prompt.candidates if c.score is not None)
    if len(rated) < 2 or rated[0][0] == rated[-1][0]:
        raise DataError(
            f"{prompt.source}: needs two completions with different scores to measure its difficulty; give chosen and "
            "rejected, or set order.kind=shuffled"
        )
    sides = (rated[-1][1], rated[0][1])
    encoded = tuple(tuple(causal_lm.encode_completion(lm.tokenizer, text, stop=True)) for text in sides)
    return TokenGroup(tuple(causal_lm.encode_prompt(lm.tokenizer, prompt)), encoded)


def take_prompts(run: Run, path: Path, prompts: Sequence[Prompt], ask: Allotment) -> Artifact[Prompt]:
    """0-prompts: the prompts that the recipe's order gives to round `ask.round`."""
    order = run.parts.order
    settings = {
        "order": key_of(order, run.recipe.order.kind),
        "prompts_per_round": ask.per_round,
        "seed": ask.seed,
        "round": ask.round,
        "rounds": ask.rounds if order.needs_margins else None,
    }
    inputs = {"prompts": digest_of_list(ids_of(prompts))}
    if order.needs_margins:
        inputs["margins"] = digest_of_list(by_id(ask.margins))
    opened = run.open(path, Key("prompts", settings, inputs), Prompt)
    if isinstance(opened, Artifact):
        return opened
    for number, part in enumerate(prompt_parts(order(prompts, ask))):
        opened.write_part(number, part)
    return opened.finish()


@dataclass(frozen=True)
class Draw:
    """Who samples, and what its settings are called in a key."""

    sampler: Sampler
    settings: dict[str, Any]


def sample(run: Run, path: Path, prompts: Sequence[Prompt], draw: Draw, context: RoundContext) -> Artifact[SampleGroup]:
    """1-samples: completions of each prompt by `context.policy`."""
    key = samples_key(run, prompts, draw, context)
    opened = run.open(path, key, SampleGroup, together=divisible(draw.sampler))
    if isinstance(opened, Artifact):
        return opened
    parts = chunks(prompts, run.recipe.prompts_per_part)
    return write_parts(run, opened, parts, lambda part: draw.sampler(part, context), "sample", _sample_facts)


def samples_key(run: Run, prompts: Sequence[Prompt], draw: Draw, context: RoundContext) -> Key:
    """Return what 1-samples depends on."""
    settings = {
        "sampler": draw.settings,
        "seed": context.seed,
        "round": context.round,
        "prompts_per_part": run.recipe.prompts_per_part,
    }
    inputs = {"prompts": digest_of_list(ids_of(prompts)), "policy": context.policy.digest}
    if uses_versions(draw.sampler):
        inputs |= {f"version-{i}": version.digest for i, version in enumerate(context.versions)}
    return Key("samples", settings, inputs)


def _sample_facts(groups: Iterable[SampleGroup]) -> dict[str, int]:
    facts = Counter(prompts=0, completions=0, tokens=0)
    for group in groups:
        facts["prompts"] += 1
        facts["completions"] += len(group.completions)
        facts["tokens"] += sum(len(c.token_ids or ()) for c in group.completions)
    return dict(facts)


@dataclass(frozen=True)
class NamedJudge:
    """A judge and its kind. `with_gold`: it judges the prompts' reference answers beside the completions."""

    judge: Judge
    kind: str
    with_gold: bool = False


def judge(
    run: Run, path: Path, samples: Artifact[SampleGroup], named: NamedJudge, context: RoundContext
) -> Artifact[JudgedGroup]:
    """2-judged: every completion with its score; the prompts' gold answers too, where `named` says so."""
    key = Key("judged", judging_settings(named), {"samples": samples.digest})
    opened = run.open(path, key, JudgedGroup, together=divisible(named.judge))
    if isinstance(opened, Building):
        made = judged_ahead(path, named) if run.team.main and shelf.folder_of(path).is_dir() else None

        def ahead(index: int, groups: Sequence[SampleGroup]) -> list[JudgedGroup] | None:
            found = made.take(index) if made else None
            return found if found is not None and judges_these(found, groups, named) else None

        parts = samples.stored_parts()
        opened = write_parts(run, opened, parts, lambda g: judge_part(g, named, context), "judge", ahead=ahead)
    if run.team.main:
        shelf.clear(path)
    return opened


def judging_settings(named: NamedJudge) -> dict[str, Any]:
    """Return the settings that 2-judged depends on."""
    return {"judge": key_of(named.judge, named.kind), "with_gold": named.with_gold}


def judge_part(groups: Sequence[SampleGroup], named: NamedJudge, context: RoundContext) -> list[JudgedGroup]:
    """Return the groups with the judge's verdicts."""
    groups = [_with_gold(g) for g in groups] if named.with_gold else groups
    verdicts = named.judge(groups, context)
    return [judged_group(g, v, named.kind) for g, v in zip(groups, verdicts, strict=True)]


def judged_ahead(path: Path, named: NamedJudge) -> shelf.Shelf[JudgedGroup]:
    """Return what was judged for 2-judged in folder `path` while its samples were being drawn."""
    return shelf.Shelf.of(path, ahead_key(named), JudgedGroup)


def ahead_key(named: NamedJudge) -> Key:
    """Return what judging ahead depends on, beside the completions."""
    return Key("judged", judging_settings(named))


def judges_these(judged: Sequence[JudgedGroup], groups: Sequence[SampleGroup], named: NamedJudge) -> bool:
    """Return whether `judged` are these groups, completion by completion."""
    groups = [_with_gold(g) for g in groups] if named.with_gold else groups
    drawn = [(g.prompt, g.completions, g.policy, g.round, g.temperature, g.top_p) for g in groups]
    return drawn == [(g.prompt, g.completions, g.policy, g.round, g.temperature, g.top_p) for g in judged]


def _with_gold(group: SampleGroup) -> SampleGroup:
    if group.prompt.gold is None:
        return group
    return replace(group, completions=(*group.completions, gold_completion(group.prompt)))


def judged_group(group: SampleGroup, verdict: Verdict, judge_name: str) -> JudgedGroup:
    """Return the group with its verdict.

    Raises:
        JudgeError: the verdict is not one score and one note for each completion, or a score is not a finite number.

    """
    count, place = len(group.completions), f"judge {judge_name}, {group.prompt.source}"
    if (len(verdict.scores), len(verdict.notes)) != (count, count):
        raise JudgeError(
            f"{place}: {len(verdict.scores)} scores and {len(verdict.notes)} notes for {count} completions; return one "
            "of each for every completion, None where there is none"
        )
    for index, score in enumerate(verdict.scores):
        if score is not None and not math.isfinite(score):
            raise JudgeError(
                f"{place}, completion {index}: score {score}, which has no place in an order; return a finite number, "
                "or None with a note that says why"
            )
    return JudgedGroup(
        prompt=group.prompt,
        completions=group.completions,
        policy=group.policy,
        round=group.round,
        temperature=group.temperature,
        top_p=group.top_p,
        scores=verdict.scores,
        win_prob=verdict.win_prob,
        judge=judge_name,
        notes=verdict.notes,
        judgements=verdict.judgements,
    )


def pair(
    run: Run,
    path: Path,
    judged: Artifact[JudgedGroup],
    context: RoundContext,
    logps: Artifact[CompletionScore] | None = None,
) -> Artifact[PreferencePair]:
    """3-pairs: chosen against rejected, with the first policy's `logps` where the pair builder needs them.

    Raises:
        DataError: no group has a usable difference.

    """
    settings = {
        "pair_builder": key_of(run.parts.pair_builder, run.recipe.pair_builder.kind),
        "seed": context.seed,
        "round": context.round,
    }
    inputs = {"judged": judged.digest} | ({"logps": logps.digest} if logps else {})
    opened = run.open(path, Key("pairs", settings, inputs), PreferencePair)
    if isinstance(opened, Artifact):
        return opened
    if logps is not None:
        context = replace(context, logps={row.completion_id: math.fsum(row.token_logps) for row in logps})
    count = 0
    for index, part in enumerate(batched(run.parts.pair_builder(judged, context), PAIRS_PER_PART)):
        opened.write_part(index, part)
        count += len(part)
    facts = _judging_facts(judged)
    if not count:
        raise DataError(
            f"{path}: no pairs: {facts['groups_with_equal_scores']} of {facts['groups']} groups have equal scores, "
            f"{facts['completions_without_score']} completions have no score. Raise sampler.completions or "
            "sampler.temperature, or choose a judge that tells completions apart; `prefloop show` gives examples"
        )
    return opened.finish({**facts, "pairs": count})


def _judging_facts(judged: Iterable[JudgedGroup]) -> dict[str, int]:
    facts = Counter(groups=0, groups_with_equal_scores=0, completions=0, completions_without_score=0)
    for group in judged:
        known = {score for score in group.scores if score is not None}
        facts["groups"] += 1
        facts["completions"] += len(group.scores)
        facts["groups_with_equal_scores"] += len(known) == 1
        facts["completions_without_score"] += sum(score is None for score in group.scores)
    return dict(facts)


def layout_of(run: Run, model: Any) -> tuple[str, str]:
    """Return the layout that the recipe asks for or that fits the model, and why."""
    if run.recipe.train.layout != "auto":
        return run.recipe.train.layout, "train.layout"
    return choose_layout(model)


def completion_ids(lm: causal_lm.CausalLM, completion: Completion) -> list[int]:
    """Return a completion's token ids: as sampled, never re-tokenized; encoded only where there are none."""
    if completion.token_ids is not None:
        return list(completion.token_ids)
    return causal_lm.encode_completion(lm.tokenizer, completion.text, stop=completion.finish_reason == "stop")
