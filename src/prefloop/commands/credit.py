"""`prefloop credit`: token rewards and credit maps of completions, of a run or of a file, under any two models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from prefloop.artifact import read_json
from prefloop.commands.credit_sources import Item, Models, of_file, of_run
from prefloop.correct._splitting import Decoding, cut, reach_of, separator, step_ends
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.bootstrap import paired_bootstrap
from prefloop.evaluate.credit import (
    Credit,
    CreditGroup,
    TokenCredit,
    centred,
    group_json,
    shared_scale,
    step_sums,
    token_rewards,
)
from prefloop.evaluate.summary import metric_json
from prefloop.ledger import SUMMARY
from prefloop.models.causal_lm import CausalLM, decode_completion, encode_prompt, load
from prefloop.rows import Completion, Metric, TokenizedPair
from prefloop.sample._tokens import foreign_token
from prefloop.stages import completion_ids
from prefloop.train.reference import score_reference

NO_STEPS = "none"
PART = "·"
"""Stands for a token that is a part of a character; the character stands at its last part."""
CAVEAT = (
    "A token's number is its reward plus the difference of values after and before it (potential-based shaping): many "
    "rewards give the same policy and the same numbers. What preferences identify are sums over whole completions of "
    "one prompt, up to a common number. Compare tokens as alternatives at one place, and sums of completions. All of "
    "it is exact only where the policy is the optimum of its objective."
)
"""What a reader must know; the page, the terminal and the JSON say it."""


@dataclass(frozen=True)
class Asked:
    """What a person asked for: see `prefloop credit --help`."""

    target: Path
    reference: str | None = None
    data: str | None = None
    of: str = "pairs"
    round: int | None = None
    beta: float | None = None
    limit: int = 8
    steps: str = "lines"
    center: bool = False
    column: str = "prompt"
    tokens_per_batch: int = 8192
    device: str = "auto"


def credit(asked: Asked) -> tuple[dict[str, Any], list[CreditGroup]]:
    """Return what is known, as `credit.json` holds it, and the groups as they are drawn.

    Raises:
        ConfigError: a choice cannot be carried out, or the two models have different tokenizers.
        DataError: the run or the file has nothing to show, or a log-prob is not finite.

    """
    _check(asked)
    in_run = (asked.target / SUMMARY).is_file()
    models, items = _sources(asked, in_run)
    foreign = foreign_token(models.policy.path, models.policy.digest, models.reference.path, models.reference.digest)
    if foreign is not None:
        raise ConfigError(
            f"credit: the reference {models.reference.path} has another tokenizer than the policy ({foreign}); their "
            "log-probs of a token cannot be compared. Name the model that the policy was trained against"
        )
    notes: list[str] = []
    groups, estimates = _scored(asked, models, items, notes)
    if asked.center:
        groups = centred(groups)
    scale = shared_scale(groups)
    if scale == 0:
        notes.append("Policy and reference give every token the same log-prob, so there is nothing to colour.")
    found = {
        "prefloop": version("prefloop"),
        "headline": _headline(groups),
        "policy": {"name": models.policy_name, "digest": models.policy.digest},
        "reference": {"name": models.reference_name, "digest": models.reference.digest},
        "beta": models.beta,
        "beta_from": models.beta_from,
        "source": models.shown,
        "scale": scale,
        "centred": asked.center,
        "caveat": CAVEAT,
        "notes": notes,
        "estimates": estimates,
        "groups": [group_json(group) for group in groups],
    }
    return found, groups


def _check(asked: Asked) -> None:
    if asked.of not in ("pairs", "holdout"):
        raise ConfigError(f"--of: {asked.of!r} cannot be shown; choose pairs or holdout")
    if asked.limit < 1:
        raise ConfigError(f"--limit: must be ≥ 1, got {asked.limit}")
    if asked.beta is not None and not (isfinite(asked.beta) and asked.beta > 0):
        raise ConfigError(f"--beta: must be a number above 0, got {asked.beta!r}")
    if asked.steps != NO_STEPS:
        try:
            separator(asked.steps)
        except ConfigError as error:
            raise ConfigError(str(error).replace("corrector.split", "--steps")) from error


def _sources(asked: Asked, in_run: bool) -> tuple[Models, Iterator[Item]]:
    if asked.data is not None and (asked.of != "pairs" or (asked.round is not None and not in_run)):
        raise ConfigError("credit: --data brings its own completions; leave out --of, and --round without a run")
    if not in_run and (asked.data is None or asked.reference is None):
        raise ConfigError(
            f"credit: {asked.target} is no run folder (no {SUMMARY}); for a policy folder give --reference and --data"
        )
    if in_run:
        summary = read_json(asked.target / SUMMARY)
        models, items = of_run(asked.target, summary, asked.of, asked.round, asked.reference)
    else:
        models, items = of_file(str(asked.target), str(asked.reference), str(asked.data), asked.column)
    if in_run and asked.data is not None:
        models, items = models.showing(asked.data, asked.column)
    if asked.beta is not None:
        models = models.with_beta(asked.beta, "as given")
    return models, islice(items, asked.limit) if asked.data is not None else _spread(list(items), asked.limit)


def _spread(items: Sequence[Item], count: int) -> Iterator[Item]:
    """Yield `count` items evenly spread over all."""
    count = min(count, len(items))
    return (items[i * len(items) // count] for i in range(count))


@dataclass(frozen=True)
class _Row:
    """A completion as ids, and what it belongs to."""

    item: int
    name: str
    completion: Completion
    score: float | None
    context: tuple[int, ...]
    ids: tuple[int, ...]

    def as_pair(self) -> TokenizedPair:
        """Return it as the chosen side of a pair, which the scorer of references reads."""
        return TokenizedPair(self.name, self.context, self.ids, (), None, None, None, 1.0)


def _scored(
    asked: Asked, models: Models, items: Iterator[Item], notes: list[str]
) -> tuple[list[CreditGroup], dict[str, Any]]:
    """Return the completions with their credit, and what the draws among them estimate."""
    kept = list(items)
    policy = load(models.policy.path, device=asked.device)
    reference = load(models.reference.path, device=asked.device)
    rows = [row for index, item in enumerate(kept) for row in _rows(policy, index, item)]
    fitting = [row for row in rows if row.ids and _fits(row, (policy, reference))]
    if len(fitting) < len(rows):
        notes.append(f"{len(rows) - len(fitting)} completions are empty or longer than the models take: left out.")
    if not fitting:
        raise DataError("credit: no completion can be shown; give completions that are not empty and fit the models")
    pairs = [row.as_pair() for row in fitting]
    ours, theirs = (
        [p.reference_chosen or () for p in score_reference(lm.model, pairs, "auto", asked.tokens_per_batch)]
        for lm in (policy, reference)
    )
    made: dict[int, list[Credit]] = {}
    drawn: dict[str, list[float]] = {}
    work = _Work(policy, asked.steps, models.beta)
    for row, mine, other in zip(fitting, ours, theirs, strict=True):
        found = work.credit(row, mine, other)
        made.setdefault(row.item, []).append(found)
        if kept[row.item].draws:
            drawn.setdefault(row.completion.source, []).append(found.reward)
    prefixes = ["" if item.prefix is None else item.prefix.text for item in kept]
    groups = [CreditGroup(kept[i].prompt.text, prefixes[i], tuple(credits)) for i, credits in made.items()]
    return groups, _estimates(models, drawn)


def _estimates(models: Models, drawn: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the mean reward of each model's own draws: divergences in either direction, times beta (eq. 16)."""
    sides = (
        ("reference_draws", models.reference.digest, "estimates −beta · KL(reference ‖ policy)"),
        ("policy_draws", models.policy.digest, "estimates beta · KL(policy ‖ reference)"),
    )
    found = {}
    for name, digest, meaning in sides:
        values = drawn.get(digest, ())
        if len(values) > 1:
            at = paired_bootstrap(values)
            found[name] = metric_json(Metric(at.value, at.low, at.high, at.n, "reward", f"{meaning}, per completion"))
    return found


def _rows(lm: CausalLM, index: int, item: Item) -> Iterator[_Row]:
    shared = completion_ids(lm, item.prefix) if item.prefix is not None else []
    context = (*encode_prompt(lm.tokenizer, item.prompt), *shared)
    for name, completion, score in item.completions:
        yield _Row(index, name, completion, score, context, tuple(completion_ids(lm, completion)))


def _fits(row: _Row, models: Sequence[CausalLM]) -> bool:
    limits = (getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) for lm in models)
    return all(limit is None or len(row.context) + len(row.ids) <= limit for limit in limits)


@dataclass(frozen=True)
class _Work:
    """Turns log-probs into credit. `pieces` remembers the text of single tokens."""

    lm: CausalLM
    split: str
    beta: float
    pieces: dict[int, str] = field(default_factory=dict)

    def credit(self, row: _Row, ours: Sequence[float], theirs: Sequence[float]) -> Credit:
        rewards = token_rewards(ours, theirs, self.beta)
        if not all(map(isfinite, rewards)):
            raise DataError(f"credit: a log-prob of {row.name!r} is not finite; a model's weights are damaged")
        text = row.completion.text
        decoding = Decoding(partial(decode_completion, self.lm.tokenizer, row.context), self.pieces)
        reach = reach_of(row.ids, text, decoding)
        tokens = tuple(
            TokenCredit(
                token, text[reach[i] : reach[i + 1]], self._label(token), ours[i], theirs[i], rewards[i], rewards[i]
            )
            for i, token in enumerate(row.ids)
        )
        return Credit(row.name, text, row.score, tokens, self._steps(row, text, decoding, rewards))

    def _label(self, token: int) -> str:
        """Return what stands for a token without text: a special token's name, or a dot for a part of a character."""
        special = token in self.lm.stop_ids or token in self.lm.tokenizer.all_special_ids
        return str(self.lm.tokenizer.convert_ids_to_tokens(token)) if special else PART

    def _steps(self, row: _Row, text: str, decoding: Decoding, rewards: Sequence[float]) -> Any:
        if self.split == NO_STEPS:
            return ()
        ends = step_ends(text, separator(self.split), finished=True)
        return step_sums([(step.text, step.tokens) for step in cut(row.ids, text, ends, decoding)], rewards)


def _headline(groups: Sequence[CreditGroup]) -> str:
    """Return in words how the pairs that are shown stand."""
    margins = [group.margin for group in groups if group.margin is not None]
    shown = sum(len(group.completions) for group in groups)
    if not margins:
        return f"Token rewards of {shown} completions"
    right = sum(margin > 0 for margin in margins)
    return f"The policy ranks {right} of {len(margins)} pairs as their labels do"
