"""What `prefloop credit` looks at: two models, and completions of a run's round or of a file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError, DataError
from prefloop.inputs import EMBEDDED, EMBEDDED_SUMS, embedded_policy
from prefloop.models.causal_lm import check_folder, folder_digest, locate
from prefloop.prompts.completions import read_completions
from prefloop.rows import (
    ABSENT,
    Completion,
    JudgedGroup,
    PolicyRef,
    PreferencePair,
    Prompt,
    StepLog,
    TokenizedPair,
    digest_of,
)

PLAIN_BETA = 1.0
"""beta where nothing names one: rewards are then in nats."""


@dataclass(frozen=True)
class Item:
    """Completions of one prompt: name, completion and score of each. `prefix` stands before all of them.

    `draws`: they are draws at temperature 1 without top-p from the policies that their `source` names.
    """

    prompt: Prompt
    completions: tuple[tuple[str, Completion, float | None], ...]
    prefix: Completion | None = None
    draws: bool = False


@dataclass(frozen=True)
class Models:
    """The two models and beta, with where they come from in words; `shown` says what is looked at."""

    policy: PolicyRef
    policy_name: str
    reference: PolicyRef
    reference_name: str
    beta: float
    beta_from: str
    shown: str

    def with_beta(self, beta: float, why: str) -> "Models":
        """Return the models with another beta."""
        return replace(self, beta=beta, beta_from=why)

    def showing(self, data: str, column: str) -> tuple["Models", Iterator[Item]]:
        """Return the models and a file's completions."""
        return replace(self, shown=data), items_of_file(data, column)


def of_file(policy: str, reference: str, data: str, column: str) -> tuple[Models, Iterator[Item]]:
    """Return two models by folder, hub id or embedded name, and the completions of a file.

    Raises:
        ConfigError: there is no such model.

    """
    ours, theirs = _model("credit", policy), _model("--reference", reference)
    why = "the default without a run: rewards are in nats"
    return Models(ours, policy, theirs, reference, PLAIN_BETA, why, data), items_of_file(data, column)


def items_of_file(path: str, column: str) -> Iterator[Item]:
    """Yield the completions of each row of a file."""
    for prompt, named in read_completions(path, column=column):
        made = tuple(
            (name, Completion(digest_of(prompt.source, name), c.text, None, None, "stop", 0, "given"), c.score)
            for name, c in named
        )
        yield Item(prompt, made)


def of_run(
    root: Path, summary: Mapping[str, Any], of: str, number: int | None, reference: str | None
) -> tuple[Models, Iterator[Item]]:
    """Return a round's policy, the reference it was trained against, and its pairs or held-out completions.

    Args:
        root: the run's folder.
        summary: its `summary.json`.
        of: pairs or holdout.
        number: of the round; `None`: that of the best policy, else the last.
        reference: another reference than the round's.

    Raises:
        ConfigError: no such round, or a reference that cannot be found.
        DataError: the round lacks what is to be shown.

    """
    entry = _round(root, summary, number)
    folder = root / f"round-{entry['round']:03d}"
    policy = PolicyRef(str(folder / "5-policy"), entry["policy"]["digest"], entry["round"])
    inputs, loss = _lineage(folder)
    known = _known(root, summary)
    if reference is not None:
        theirs, name = _model("--reference", reference), reference
    else:
        theirs, name = _reference(known, inputs)
    beta, why = _beta(loss)
    words = f"{of} of round {entry['round']} of {root}"
    models = Models(policy, f"round {entry['round']} of {root}", theirs, name, beta, why, words)
    if of == "pairs":
        return models, _pairs(folder)
    start = root / "start" / "2-judged"
    return models, _held_out(folder / "6-report" / "2-judged", start)


def _round(root: Path, summary: Mapping[str, Any], number: int | None) -> Mapping[str, Any]:
    rounds = {entry["round"]: entry for entry in summary["rounds"]}
    if summary.get("trains") == "reward_model":
        raise ConfigError(f"credit: {root} trains a reward model, which has no token log-probs; name a policy's run")
    if not rounds:
        raise DataError(f"{root}: no finished round, so there is no trained policy yet")
    if number is None:
        best = summary["policy_best"]["round"]
        number = best if best in rounds else max(rounds)
    if number not in rounds:
        raise ConfigError(f"--round: {root} has no finished round {number}; it has {', '.join(map(str, rounds))}")
    entry: Mapping[str, Any] = rounds[number]
    return entry


def _lineage(folder: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Return the digests of the round's first policy and reference, and the settings of its loss."""
    batches = load_artifact(folder / "4-batches", TokenizedPair)
    trained = load_artifact(folder / "5-policy", StepLog)
    if batches is None or trained is None:
        raise DataError(f"{folder}: 4-batches or 5-policy is not finished; finish the run with `prefloop run`")
    inputs = {"policy": trained.manifest["inputs"]["policy"]}
    inputs |= {k: v for k, v in batches.manifest["inputs"].items() if k == "reference"}
    return inputs, trained.manifest["settings"]["loss"]


def _known(root: Path, summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return by digest the path and the name of every policy of the run, the first one included."""
    start = summary["policy_start"]
    found = {start["digest"]: (start["path"], "the run's first policy")}
    for entry in summary["rounds"]:
        path = str(root / entry["policy"]["path"])
        found.setdefault(entry["policy"]["digest"], (path, f"the policy of round {entry['round']}"))
    return found


def _reference(known: Mapping[str, tuple[str, str]], inputs: Mapping[str, str]) -> tuple[PolicyRef, str]:
    digest = inputs.get("reference", inputs["policy"])
    if digest not in known:
        raise ConfigError("--reference: the round's reference is not a policy of this run; name its folder")
    path, name = known[digest]
    if "reference" not in inputs:
        name += ", from which the round started: its loss has no reference"
    found = _model("--reference", path)
    if found.digest != digest:
        raise ConfigError(
            f"--reference: {path} has changed since the run (digest {found.digest}, then {digest}); name a folder with "
            "the weights of that time"
        )
    return found, name


def _beta(loss: Mapping[str, Any]) -> tuple[float, str]:
    value = loss.get("beta")
    if isinstance(value, (int, float)) and value > 0:
        return float(value), f"loss.beta of {loss['kind']}"
    return PLAIN_BETA, f"since loss {loss['kind']} has no beta: rewards are in nats"


def _model(place: str, named: str) -> PolicyRef:
    try:
        folder = embedded_policy(named) if named in (EMBEDDED, EMBEDDED_SUMS) else locate(named)
        check_folder(folder)
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('policy: ')}") from error
    return PolicyRef(str(folder), folder_digest(folder), round=-1)


def _pairs(folder: Path) -> Iterator[Item]:
    found = load_artifact(folder / "3-pairs", PreferencePair)
    if found is None:
        raise DataError(f"{folder}: has no pairs (3-pairs); try --of holdout")
    for pair in found:
        sides = (("chosen", pair.chosen, pair.chosen_score), ("rejected", pair.rejected, pair.rejected_score))
        yield Item(pair.prompt, tuple(side for side in sides if side[1] != ABSENT), pair.prefix)


def _held_out(after: Path, before: Path) -> Iterator[Item]:
    """Yield each held-out prompt with the first completion of the round's policy and of the run's first one."""
    ours, theirs = load_artifact(after, JudgedGroup), load_artifact(before, JudgedGroup)
    if ours is None or theirs is None:
        raise DataError(f"{after}: no held-out completions; finish the run with `prefloop run`")
    first = {group.prompt.prompt_id: group for group in theirs}
    for group in ours:
        start = first[group.prompt.prompt_id]
        sides = (("this policy's", group), ("the first policy's", start))
        draws = all((g.temperature, g.top_p) == (1, 1) and g.completions[0].sampler_logps for _, g in sides)
        made = tuple((name, g.completions[0], g.scores[0]) for name, g in sides)
        yield Item(group.prompt, made, draws=draws)
