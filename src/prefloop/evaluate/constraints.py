"""Accuracy on prompts with checkable instructions, as in IFEval (Zhou et al. 2023, arXiv 2311.07911).

Four numbers: strict or loose, for prompts or for instructions.

- strict: the completion as it is. loose: one of eight readings of it is enough, without first line, last line or
  asterisks; it forgives introductions and bold type, and never falls below strict.
- prompt-level: share of completions that follow every instruction of their prompt. instruction-level: share of all
  instructions, of all completions, that are followed.

The paper has one completion for each prompt. With several, a prompt-level value is the mean over a prompt's
completions, then over prompts; at instruction level all completions are pooled. Intervals resample prompts, so that a
prompt's completions and instructions stay together: the paper gives none.

How a check can differ from the authors' stands at its class in `prefloop.constraints`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefloop.constraints.instructions import Criterion, Instruction, instructions_in_gold
from prefloop.errors import DataError
from prefloop.evaluate.bootstrap import RESAMPLES, paired_bootstrap, ratio_bootstrap
from prefloop.evaluate.text_metrics import PERCENT, Group, as_metric, mean_metric
from prefloop.rows import Metric

CRITERIA: tuple[Criterion, ...] = ("strict", "loose")


@dataclass(frozen=True, slots=True)
class ConstraintAccuracy:
    """The four accuracies by name, and instruction-level ones by type and by family, each 0–100 %.

    Names: `prompt_strict`, `prompt_loose`, `instruction_strict`, `instruction_loose`; `by_type` has entries such as
    `punctuation:no_comma strict`, `by_family` such as `punctuation strict`. `skipped` counts groups whose prompt has
    no instructions.
    """

    metrics: dict[str, Metric]
    by_type: dict[str, Metric]
    by_family: dict[str, Metric]
    skipped: int


def constraint_accuracy(
    groups: Sequence[Group],
    instructions: Mapping[str, Sequence[Instruction]] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> ConstraintAccuracy:
    """Return how well completions follow the instructions of their prompts.

    Args:
        groups: completions of the prompts.
        instructions: by prompt id. Default: those in each prompt's gold answer, see
            `prefloop.constraints.instructions.gold_of`.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: no prompt has instructions, one stands twice or has no completions, or a gold answer holds
            instructions that cannot be read.
        ConfigError: an instruction needs the language detector and it is not installed.

    """
    found = [
        (g, instructions_in_gold(g.prompt) if instructions is None else instructions.get(g.prompt.prompt_id, ()))
        for g in groups
    ]
    checked = {g.prompt.prompt_id: _Checked.of(g, asked) for g, asked in found if asked}
    asking = sum(bool(asked) for _, asked in found)
    if not checked:
        raise DataError(f"constraints: none of {len(groups)} prompts has instructions; put them into the gold answer")
    if len(checked) < asking:
        raise DataError(f"constraints: {asking - len(checked)} prompts stand twice; give each prompt one group")
    prompts = [checked[name] for name in sorted(checked)]
    metrics = {}
    by_type: dict[str, Metric] = {}
    by_family: dict[str, Metric] = {}
    for criterion in CRITERIA:
        whole = [p.whole(criterion) for p in prompts]
        metrics[f"prompt_{criterion}"] = mean_metric(
            f"{criterion}, everything followed", whole, "%", PERCENT, seed=seed, resamples=resamples
        )
        metrics[f"instruction_{criterion}"] = _pooled(
            [p.counts(criterion) for p in prompts], criterion, seed, resamples
        )
        for depth, table in ((2, by_type), (1, by_family)):
            for name, counts in _by_name(prompts, criterion, depth).items():
                table[f"{name} {criterion}"] = _pooled(counts, criterion, seed, resamples)
    return ConstraintAccuracy(metrics, by_type, by_family, len(groups) - asking)


@dataclass(frozen=True, slots=True)
class _Checked:
    """One prompt: its instruction types, and which of them each completion follows, by criterion."""

    types: tuple[str, ...]
    followed: Mapping[Criterion, tuple[tuple[bool, ...], ...]]

    @classmethod
    def of(cls, group: Group, instructions: Sequence[Instruction]) -> "_Checked":
        if not group.completions:
            raise DataError(f"constraints: prompt {group.prompt.prompt_id} ({group.prompt.source}) has no completions")
        followed = {
            criterion: tuple(tuple(i.followed(c.text, criterion) for i in instructions) for c in group.completions)
            for criterion in CRITERIA
        }
        return cls(tuple(i.type for i in instructions), followed)

    def whole(self, criterion: Criterion) -> float:
        """Share of completions that follow everything, in %."""
        rows = self.followed[criterion]
        return 100 * sum(map(all, rows)) / len(rows)

    def counts(self, criterion: Criterion, depth: int = 0, name: str = "") -> tuple[int, int]:
        """Followed and asked, over the instructions whose type begins with `name`, `depth` parts long."""
        wanted = [not depth or _prefix(kind, depth) == name for kind in self.types]
        hits = [hit for row in self.followed[criterion] for hit, want in zip(row, wanted, strict=True) if want]
        return sum(hits), len(hits)


def _prefix(kind: str, depth: int) -> str:
    return ":".join(kind.split(":")[:depth])


def _by_name(prompts: Sequence[_Checked], criterion: Criterion, depth: int) -> dict[str, list[tuple[int, int]]]:
    found = defaultdict(list)
    for prompt in prompts:
        for name in sorted({_prefix(kind, depth) for kind in prompt.types}):
            found[name].append(prompt.counts(criterion, depth, name))
    return dict(sorted(found.items()))


def _pooled(counts: Sequence[tuple[int, int]], criterion: Criterion, seed: int, resamples: int) -> Metric:
    hits, asked = [100.0 * hit for hit, _ in counts], [float(total) for _, total in counts]
    if len(counts) == 1 or sum(hits) in (0.0, 100 * sum(asked)):
        # Without spread, or with one prompt, only the range bounds the interval.
        shares = [hit / total for hit, total in zip(hits, asked, strict=True)]
        interval = paired_bootstrap(shares, seed=seed, resamples=resamples, bounds=PERCENT)
    else:
        interval = ratio_bootstrap(hits, asked, seed=seed, resamples=resamples)
    return as_metric(interval, "%", f"{criterion}, instructions pooled")
