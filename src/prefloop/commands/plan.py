"""`prefloop plan`: what a run will take, from a short measured probe, before anything is spent."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.artifact import read_json
from prefloop.commands.small import SCRIPT, scripted_judge, shrunk
from prefloop.components import Parts, build_parts
from prefloop.data_needs import check_data
from prefloop.inputs import held_out, resolve_policy, resolve_prompts
from prefloop.judge.llm import Llm
from prefloop.ledger import SUMMARY
from prefloop.loop import run
from prefloop.recipe import Recipe

PROBE_PROMPTS = 64
"""Prompts of the probe, and held-out prompts of its evaluation; one part of a run, so that batches are as large."""
EACH_ONCE = ("easy_first", "domains")
"""Orders that give each prompt to one round."""
TEMPLATE_TOKENS = 350
"""Tokens of a judge's template around prompt and completions; an estimate, where the judge is not asked."""


@dataclass
class Stopwatch:
    """A `Progress` that notes how long each stage took; what is between stages is kept apart."""

    began: float = field(default_factory=time.monotonic)
    stages: list[tuple[str, float]] = field(default_factory=list)
    round_began: float = 0.0
    before: int = 0
    trained: int = 0
    _label: str = ""
    _started: float = 0.0

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage."""
        self._label, self._started = label, time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Note the stage's seconds."""
        self.stages.append((self._label, time.monotonic() - self._started))
        if self._label == "train":
            self.trained = len(self.stages)

    def say(self, text: str) -> None:
        """Note where the round begins."""
        if not self.round_began and text.startswith("round 0"):
            self.round_began = time.monotonic()
            self.before = len(self.stages)


@dataclass(frozen=True)
class Plan:
    """What a run will take: counts over all rounds, seconds, bytes, and money in the unit of the prices.

    `seconds` leaves out the judge's time where `judge_asked` is false.
    """

    rounds: int
    prompts: int
    held_out: int
    completions: int
    pairs: int
    tokens: int
    steps: int
    judge_calls: int
    judge_tokens: int
    seconds: float
    disk: int
    money: float | None
    judge_asked: bool
    probe_seconds: float

    def lines(self) -> Iterator[str]:
        """Yield the plan as text."""
        yield f"rounds        {self.rounds}"
        yield f"prompts       {self.prompts} to train on in all rounds, {self.held_out} held out in each evaluation"
        yield f"completions   {self.completions:,}"
        yield f"tokens        {self.tokens:,} sampled"
        yield f"pairs         {self.pairs:,}"
        yield f"steps         {self.steps:,}"
        yield f"judge calls   {self.judge_calls:,}, about {self.judge_tokens:,} tokens"
        without = "" if self.judge_asked else ", without the judge's own time (it was not asked: --ask-judge)"
        yield f"time          {_duration(self.seconds)}{without}"
        yield f"disk          {self.disk / 2**20:,.0f} MiB"
        yield f"money         {'no price given' if self.money is None else f'{self.money:,.2f}'}"
        yield f"measured on a probe of {self.probe_seconds:.0f} s; a trained policy may write longer or shorter"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Prices:
    """Money for one call of the judge, and for a million tokens of its questions and replies."""

    per_call: float | None = None
    per_million_tokens: float | None = None

    def cost(self, calls: int, tokens: int) -> float | None:
        """Return the money for all calls; `None` where there is no price."""
        if self.per_call is None and self.per_million_tokens is None:
            return None
        return calls * (self.per_call or 0.0) + tokens / 1e6 * (self.per_million_tokens or 0.0)


def plan(recipe: Recipe, prices: Prices, probe: int = PROBE_PROMPTS, ask_judge: bool = False) -> Plan:
    """Run a small round in a temporary folder, and scale what it took to the whole run.

    A judge behind an endpoint is asked only with `ask_judge`; else a stand-in tells completions apart.

    Raises:
        PrefloopError: the recipe cannot run: see `loop.run`.

    """
    parts = build_parts(recipe)
    found = resolve_prompts(recipe)
    check_data(recipe, resolve_policy(recipe), found.train, held_out(recipe, found))
    share = math.ceil(len(found.train) / recipe.rounds) if recipe.order.kind in EACH_ONCE else len(found.train)
    per_round = min(recipe.prompts_per_round or share, share)
    evaluated = len(held_out(recipe, found))
    folder = Path(tempfile.mkdtemp(prefix="prefloop-plan-"))
    try:
        return _measured(recipe, parts, prices, folder, ask_judge, (per_round, evaluated, probe))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(
    recipe: Recipe, parts: Parts, prices: Prices, folder: Path, ask_judge: bool, counts: tuple[int, int, int]
) -> Plan:
    per_round, evaluated, probe = counts
    asked = {name: ask_judge or not _remote(getattr(parts, name)) for name in ("judge", "eval_judge")}
    script = folder / "stand_in.py"
    script.write_text(SCRIPT, encoding="utf-8")
    changes: dict[str, Any] = {}
    if not all(asked.values()):
        changes = {"judge": scripted_judge(str(script)), "eval_judge": None}
    prompts, shown = min(per_round, probe), min(evaluated, probe)
    small = shrunk(recipe, prompts, shown, parts.order.needs_margins, **changes)
    clock = Stopwatch()
    run(small, folder / "run", progress=clock)
    took = time.monotonic() - clock.began
    facts = read_json(folder / "run" / SUMMARY)["rounds"][0]["facts"]
    grow, eval_grow = per_round / prompts, evaluated / shown
    pairs = facts["batches"]["pairs"] * grow
    k, k_eval = facts["samples"]["completions"] / prompts, facts["evaluation_samples"]["completions"] / shown
    drawn = recipe.rounds * per_round * k + (recipe.rounds + 1) * evaluated * k_eval
    tokens = recipe.rounds * facts["samples"]["tokens"] * grow
    tokens += (recipe.rounds + 1) * facts["evaluation_samples"]["tokens"] * eval_grow
    calls, judge_tokens = _judging(recipe, parts, facts, (per_round, evaluated), (k, k_eval))
    replayed = sum(min(number, recipe.replay) for number in range(recipe.rounds)) + recipe.rounds
    in_steps = math.ceil(pairs / recipe.train.pairs_per_step) * recipe.train.epochs
    return Plan(
        rounds=recipe.rounds,
        prompts=recipe.rounds * per_round,
        held_out=evaluated,
        completions=round(drawn),
        pairs=round(recipe.rounds * pairs),
        tokens=round(tokens),
        steps=replayed * in_steps,
        judge_calls=calls,
        judge_tokens=judge_tokens,
        seconds=_seconds(clock, took, recipe.rounds, grow, eval_grow, replayed / recipe.rounds),
        disk=_disk(folder / "run", recipe.rounds, grow, eval_grow),
        money=prices.cost(calls, judge_tokens),
        judge_asked=all(asked.values()),
        probe_seconds=took,
    )


def _seconds(clock: Stopwatch, took: float, rounds: int, grow: float, eval_grow: float, replay: float) -> float:
    """Scale the probe's stages: those of a round with its prompts, those after training with the held-out prompts."""
    start = sum(seconds for _, seconds in clock.stages[: clock.before])
    training = clock.stages[clock.before : clock.trained]
    after = clock.stages[clock.trained :]
    setup = clock.round_began - clock.began - start
    between = took - setup - start - sum(seconds for _, seconds in (*training, *after))
    a_round = between
    a_round += sum(seconds * grow * (replay if label == "train" else 1.0) for label, seconds in training)
    # The diagnosis looks at a fixed number of texts, which the probe's evaluation reaches already.
    a_round += sum(seconds * (1.0 if label == "displacement" else eval_grow) for label, seconds in after)
    return setup + start * eval_grow + rounds * a_round


def _disk(root: Path, rounds: int, grow: float, eval_grow: float) -> int:
    first = root / "round-000"
    policy, report = _size(first / "5-policy"), _size(first / "6-report")
    made = _size(first) - policy - report
    once = _size(root) - _size(first)
    return round(once + rounds * (policy + report * eval_grow + made * grow))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remote(judge: object) -> bool:
    """Return whether asking a judge may cost money: it is behind an endpoint."""
    return getattr(judge, "base_url", None) is not None


def _judging(
    recipe: Recipe, parts: Parts, facts: Mapping[str, Any], prompts: tuple[int, int], drawn: tuple[float, float]
) -> tuple[int, int]:
    """Return the judges' calls over all rounds, and the tokens of a language model's questions and replies."""
    new = [facts[name]["tokens"] / max(1, facts[name]["completions"]) for name in ("samples", "evaluation_samples")]
    gold = parts.pair_builder.needs_gold and parts.pair_builder.needs_scores
    asked: tuple[tuple[Any, int, float, float], ...] = (
        (parts.judge, recipe.rounds * prompts[0] * parts.pair_builder.needs_scores, drawn[0] + gold, new[0]),
        (parts.eval_judge, (recipe.rounds + 1) * prompts[1], drawn[1], new[1]),
    )
    if recipe.eval_judge is not None and asked[0][1]:
        opinions = min(recipe.evaluate.second_opinion, prompts[0])
        asked = (*asked, (parts.eval_judge, recipe.rounds * opinions, 2.0, new[0]))
    calls, tokens = 0.0, 0.0
    for judge, groups, completions, length in asked:
        number, texts = _calls(judge, completions)
        calls += groups * number
        if isinstance(judge, Llm):
            tokens += groups * number * (TEMPLATE_TOKENS + texts * length + judge.max_tokens / 4)
    return round(calls), round(tokens)


def _calls(judge: object, completions: float) -> tuple[float, float]:
    """Return the calls for one group, and how many completions each shows."""
    if not isinstance(judge, Llm):
        return completions, 1
    repeats = judge.repeats
    if judge.mode == "compare":
        return completions * (completions - 1) * repeats, 2
    return (2 * repeats, completions) if judge.mode == "rank" else (completions * repeats, 1)
