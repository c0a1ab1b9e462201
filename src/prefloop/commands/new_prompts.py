"""`prefloop new-prompts`: the policy writes prompts in the manner of those that a recipe names."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefloop.artifact import write_text
from prefloop.components import build
from prefloop.errors import ConfigError, DataError
from prefloop.inputs import resolve_policy, resolve_prompts
from prefloop.prompts.self_instruct import EXAMPLES, MADE_EXAMPLES, Limits, Pool, read_tasks, request
from prefloop.protocols import Progress, RoundContext
from prefloop.recipe import Recipe
from prefloop.rows import TRAIN, VERBATIM, Message, Prompt, SampleGroup, prompt_id
from prefloop.sample.hf import Hf
from prefloop.sample.server import Server

AT_ONCE = 16
"""Requests in one batch."""
USELESS = 20
"""Batches in a row without a new prompt after which there is no hope left."""


@dataclass(frozen=True)
class Asked:
    """How many new prompts, where to, and what they must keep to."""

    count: int
    to: Path
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--count: must be ≥ 1, got {self.count}")
        if self.to.suffix != ".jsonl":
            raise ConfigError(f"--to: name a .jsonl file, got {self.to}")
        if self.to.exists():
            raise ConfigError(f"--to: {self.to} is there already; name another file")


def make_prompts(recipe: Recipe, asked: Asked, progress: Progress, stop: Callable[[], bool]) -> list[str]:
    """Write new prompts to `asked.to` as JSONL, one `prompt` a line, and return lines on what was dropped.

    The recipe's policy continues lists of its training prompts; its sampler draws, one completion for each list.
    Held-out prompts are not shown, and nothing like them is kept. The same recipe and count give the same file, where
    the sampler gives the same completions.

    Raises:
        ConfigError: a setting is wrong.
        DataError: fewer than 8 training prompts, or the policy writes nothing new any more; nothing is written then.

    """
    policy, prompts = resolve_policy(recipe), resolve_prompts(recipe)
    given = [prompt.text for prompt in prompts.train]
    if len(given) < EXAMPLES:
        raise DataError(f"prompts: {EXAMPLES} training prompts are shown at a time, and there are {len(given)}")
    sampler = build("sampler", recipe.sampler)
    if not isinstance(sampler, Hf | Server):
        raise ConfigError(f"sampler.kind: {recipe.sampler.kind} cannot continue a list of prompts; use hf or server")
    pool = Pool(asked.limits)
    for prompt in prompts.prompts:
        pool.know(prompt.text)
    progress.start("new prompts", asked.count, "prompts")
    number, useless = 0, 0
    while len(pool.made) < asked.count and not stop():
        before = len(pool.made)
        shown = list(_requests(given, pool.made, recipe.seed, number))
        _offer_all(pool, sampler(shown, RoundContext(recipe.seed, number, policy, policy)), asked.count)
        progress.advance(len(pool.made) - before)
        number += 1
        useless = useless + 1 if len(pool.made) == before else 0
        if useless == USELESS:
            raise DataError(_hopeless(pool, asked.count, number))
    progress.finish()
    rows = ({"prompt": text, "source": f"self-instruct {policy.digest}"} for text in pool.made)
    write_text(asked.to, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return [f"{asked.to}: {len(pool.made)} prompts", *(f"dropped {n}: {why}" for why, n in pool.dropped.most_common())]


def _offer_all(pool: Pool, groups: Iterable[SampleGroup], count: int) -> None:
    for group in groups:
        for completion in group.completions:
            for task in read_tasks(completion.text, completion.finish_reason == "stop"):
                if len(pool.made) < count:
                    pool.offer(task)


def _hopeless(pool: Pool, count: int, batches: int) -> str:
    dropped = ", ".join(f"{number} {why}" for why, number in pool.dropped.most_common()) or "none was read"
    return (
        f"new prompts: {len(pool.made)} of {count} after {batches} batches, and the last {USELESS} brought none "
        f"({dropped}); raise sampler.max_new_tokens or --similarity, or ask for fewer"
    )


def _requests(given: Sequence[str], made: Sequence[str], seed: int, number: int) -> Iterator[Prompt]:
    draw = random.Random(f"{seed} {number}")
    for _ in range(AT_ONCE):
        own = draw.sample(list(made), min(MADE_EXAMPLES, len(made)))
        examples = [*draw.sample(list(given), EXAMPLES - len(own)), *own]
        draw.shuffle(examples)
        messages = (Message(VERBATIM, request(examples)),)
        yield Prompt(prompt_id(messages), messages, None, TRAIN, "self-instruct")
