"""`prefloop compare`: several methods under one budget with several seeds, or several finished runs, in one report.

Every method and seed is an ordinary run in a folder of its own, `OUT/METHOD/seed-N`, so that the same command goes on
after a stop, and a run can be looked at by itself. What is compared is the policy in force at a run's end: the last
that its gate promoted, or the start.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.artifact import load_artifact, locked
from prefloop.commands.compare_budget import Entry, equalise
from prefloop.commands.compare_ood import Bench, read_outside
from prefloop.components import build_parts
from prefloop.errors import ConfigError, DataError, TrainingDiverged
from prefloop.evaluate.compare_data import Elsewhere, Ended, Measured, Method
from prefloop.evaluate.compare_report import write_comparison
from prefloop.evaluate.summary import read_summary
from prefloop.inputs import MIN_HOLDOUT, held_out, resolve_prompts
from prefloop.launch import read_recipe
from prefloop.ledger import SUMMARY
from prefloop.loop import check_combination
from prefloop.loop import run as run_loop
from prefloop.prompts.dataset import PromptSet
from prefloop.protocols import Progress, Quiet
from prefloop.recipe import Recipe, flow_yaml, for_round, read_override, read_yaml
from prefloop.rows import JudgedGroup, digest_of

SEEDS = 3


@dataclass(frozen=True)
class Asked:
    """What a person asked for: targets, settings for all, a sweep's settings with their values, seeds, and budget."""

    targets: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    grid: Mapping[str, tuple[str, ...]] | None = None
    seeds: int | None = None
    """Runs of each method, of seeds s, s+1, …, s the recipe's own. Default 3. Not for finished runs."""
    budget: str = "equal"
    """`equal` or `own`, see `budget`."""
    ood: str | None = None
    """A second set of prompts, of another distribution, on which every run's end is measured too. Not for finished
    runs."""


def read_asked(
    words: Sequence[str],
    sweep: Sequence[str] = (),
    seeds: int | None = None,
    budget: str = "equal",
    ood: str | None = None,
) -> Asked:
    """Sort what follows `prefloop compare` into targets and settings; with a sweep, a=1,2 is a part of its grid.

    Raises:
        ConfigError: no target, one twice, or a sweep without values.

    """
    targets = tuple(word for word in words if "=" not in word)
    settings = [word for word in words if "=" in word]
    swept = [*sweep, *(s for s in settings if sweep and _listed(s))]
    overrides = tuple(s for s in settings if s not in swept)
    grid = {}
    for text in swept:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(v.strip() for v in values.split(",")):
            raise ConfigError(f"--sweep: {text!r} is not key=value,value (as train.learning_rate=1e-4,3e-4)")
        grid[key] = tuple(v.strip() for v in values.split(","))
    if not targets:
        raise ConfigError("compare: no method, recipe file or run is named; as in: prefloop compare spin simpo")
    twice = {t for t in targets if targets.count(t) > 1}
    if twice:
        raise ConfigError(f"compare: {', '.join(sorted(twice))} named twice; name each once, and --seeds repeats it")
    if len(targets) < 2 and not grid:
        raise ConfigError(f"compare: {targets[0]} alone has nothing to be compared with; name two, or give --sweep")
    return Asked(targets, overrides, grid or None, seeds, budget, ood)


def _listed(text: str) -> bool:
    value = text.partition("=")[2]
    return "," in value and value[0] not in "[{\"'"


def is_run(target: str) -> bool:
    """Return whether `target` is a run's folder and not a method or a recipe file."""
    return (Path(target) / SUMMARY).is_file()


def compare(
    asked: Asked,
    root: Path,
    *,
    redo: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run what is not there yet, compare, and return what `comparison.json` holds; see `compare_report` for the files.

    Args:
        asked: methods, or finished runs; not both.
        root: folder of the comparison.
        redo: as in `loop.run`.
        progress: where bars are drawn.
        stop: asked for at safe points.

    Raises:
        ConfigError: as `loop.run`, or the methods cannot be compared; nothing was done.
        DataError: runs that are not finished, or that have too little in common.
        Interrupted: the same call goes on.

    """
    runs = [t for t in asked.targets if is_run(t)]
    if runs and len(runs) < len(asked.targets):
        other = next(t for t in asked.targets if t not in runs)
        raise ConfigError(f"compare: {runs[0]} is a finished run and {other} is not; compare runs, or methods")
    if runs and (asked.overrides or asked.grid or asked.seeds is not None or asked.ood is not None):
        raise ConfigError(
            "compare: finished runs have their settings and seeds; leave out key=value, --sweep, --seeds, --ood"
        )
    if runs:
        with locked(root):
            return write_comparison(root, gathered([Path(t) for t in runs]), [], swept=False)
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError(f"--seeds: must be ≥ 1, got {asked.seeds}")
    entries, dropped = _entries(asked)
    prompts = _prompts(entries)
    available = {entry.name: len(prompts[str(entry.recipe.prompts)].train) for entry in entries}
    entries, notes = equalise(entries, asked.budget, available)
    _check(entries, prompts)
    progress = progress or Quiet()
    outside = None
    if asked.ood is not None:
        known = {prompt.prompt_id for found in prompts.values() for prompt in found.prompts}
        outside = read_outside(asked.ood, known, min(entry.recipe.evaluate.prompts for entry in entries))
        notes += [f"Prompts of another distribution: {len(outside.prompts)} of {asked.ood}.", *outside.notes]
    bench = None if outside is None else Bench(root, outside, progress, stop, redo)
    for note in (*dropped, *notes):
        progress.say(note)
    with locked(root):
        found: dict[str, list[Measured]] = {entry.name: [] for entry in entries}
        beside: dict[str, list[Measured]] = {entry.name: [] for entry in entries}
        for offset, entry in itertools.product(range(SEEDS if asked.seeds is None else asked.seeds), entries):
            seed = entry.recipe.seed + offset
            progress.say(f"{entry.name}, seed {seed}")
            recipe = entry.recipe.model_copy(update={"seed": seed, "name": f"{entry.name}, seed {seed}"})
            run, summary = _one(entry, recipe, root, redo, progress, stop)
            found[entry.name].append(run)
            if bench is not None:
                beside[entry.name].append(bench.measure(recipe, run, root / run.folder, summary))
        elsewhere = None if outside is None else Elsewhere(outside.name, _methods(entries, beside))
        all_notes = [*dropped, *notes]
        return write_comparison(
            root, _methods(entries, found), all_notes, swept=asked.grid is not None, elsewhere=elsewhere
        )


def _methods(entries: Sequence[Entry], found: Mapping[str, Sequence[Measured]]) -> list[Method]:
    return [Method(e.name, e.target, tuple(found[e.name]), dict(e.varied)) for e in entries]


def _prompts(entries: Sequence[Entry]) -> dict[str, PromptSet]:
    """Return the prompts of all methods, by what their recipes say of them."""
    asked = {str(entry.recipe.prompts): entry.recipe for entry in entries}
    return {words: resolve_prompts(recipe) for words, recipe in asked.items()}


def _check(entries: Sequence[Entry], prompts: Mapping[str, PromptSet]) -> None:
    """Refuse now what would stop a later run: choices that contradict each other, and prompts with nothing in common.

    Raises:
        ConfigError: names the fields and what to change.
        DataError: the methods share too few held-out prompts.

    """
    holdouts: dict[str, set[str]] = {}
    for entry in entries:
        for number in range(entry.recipe.rounds):
            its_recipe = for_round(entry.recipe, number)
            check_combination(its_recipe, build_parts(its_recipe))
        asked = f"{entry.recipe.prompts} {entry.recipe.evaluate.prompts}"
        if asked not in holdouts:
            found = held_out(entry.recipe, prompts[str(entry.recipe.prompts)])
            holdouts[asked] = {prompt.prompt_id for prompt in found}
    shared = set.intersection(*holdouts.values())
    if len(shared) < min(MIN_HOLDOUT, *(len(ids) for ids in holdouts.values())):
        raise DataError(
            f"compare: the methods share {len(shared)} held-out prompts, and {MIN_HOLDOUT} are needed; unpaired "
            "prompts cannot be compared. Set prompts=… and evaluate.prompts=… for all of them"
        )


def _one(
    entry: Entry, recipe: Recipe, root: Path, redo: bool, progress: Progress, stop: Callable[[], bool]
) -> tuple[Measured, dict[str, Any]]:
    """Run one method with one seed, or find it done; return what it came to, and its summary."""
    folder = root / _folder_name(entry.name) / f"seed-{recipe.seed}"
    try:
        summary = run_loop(recipe, folder, origins=dict(entry.origins), redo=redo, progress=progress, stop=stop)
    except TrainingDiverged as error:
        progress.say(f"{recipe.name}: {error}")
        return Measured(recipe.seed, str(folder.relative_to(root)), failed=str(error)), {}
    return measured(folder, summary, str(folder.relative_to(root))), summary


def _entries(asked: Asked) -> tuple[list[Entry], list[str]]:
    entries, notes = [], []
    for target in asked.targets:
        base = Path(target).stem if target.endswith((".yaml", ".yml")) else target
        fitting, note = _fitting(target, asked.overrides)
        notes += note
        grid = asked.grid or {}
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            recipe, origins = read_recipe(target, [*fitting, *(f"{k}={v}" for k, v in varied.items())])
            label = " ".join([base, *(f"{k.rpartition('.')[2]}={v}" for k, v in varied.items())])
            entries.append(Entry(label, base, recipe, origins, varied))
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ConfigError(f"compare: two entries would have one name ({', '.join(names)}); rename a recipe file")
    starts = {(e.recipe.policy.path if e.recipe.policy else "", str(e.recipe.policy)) for e in entries}
    if len(starts) > 1:
        raise ConfigError(
            "compare: the methods would start from different policies "
            f"({', '.join(sorted(path for path, _ in starts))}); set policy=… for all of them"
        )
    return entries, notes


def _fitting(target: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides that `target` can take: one whose completions are given has no settings of drawing."""
    keys = {text: _leaf(read_override(text)) for text in overrides}
    others = [text for text in overrides if not keys[text].startswith("sampler.")]
    recipe, _ = read_recipe(target, others)
    given = recipe.sampler.kind == "given" and "sampler.kind" not in keys.values()
    left_out = [text for text in overrides if given and text not in others]
    note = f"{target}: {', '.join(left_out)} has no effect, since its completions come from the data."
    return [text for text in overrides if text not in left_out], [note] if left_out else []


def _leaf(values: Mapping[str, Any], prefix: str = "") -> str:
    key, value = next(iter(values.items()))
    inner = isinstance(value, Mapping) and len(value) == 1
    return _leaf(value, f"{prefix}{key}.") if inner else f"{prefix}{key}"


def _folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in name)


def gathered(folders: Sequence[Path]) -> list[Method]:
    """Return finished runs as methods: runs whose settings are the same but for the seed are seeds of one method.

    Raises:
        DataError: a run is not finished, or its files cannot be read.

    """
    kinds: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        summary = read_summary(folder)
        if summary["state"] != "done":
            raise DataError(
                f"{folder}: not finished ({summary['state']}); an unfinished run would be compared by an earlier "
                "policy than it ends with. Finish it with `prefloop run`"
            )
        if "judge_score" not in summary["start"].get("metrics", {}):
            raise DataError(f"{folder}: has no scores of held-out completions, so there is nothing to compare")
        settings, _ = read_yaml(folder / "recipe.yaml")
        kept = {k: v for k, v in settings.items() if k not in ("seed", "name", "threads", "loggers")}
        kinds.setdefault(digest_of(flow_yaml(kept)), []).append((folder, summary))
    methods = []
    labels = [str(runs[0][1]["recipe"] or runs[0][1]["name"]) for runs in kinds.values()]
    for label, runs in zip(labels, kinds.values(), strict=True):
        name = label if labels.count(label) == 1 else f"{label} ({runs[0][0].resolve().name})"
        methods.append(Method(name, label, tuple(measured(f, s, str(f)) for f, s in runs), {}))
    if len(methods) < 2:
        raise DataError("compare: all runs have the same settings; they are seeds of one method, name another's too")
    return methods


def measured(folder: Path, summary: Mapping[str, Any], shown: str) -> Measured:
    """Return what a finished run says: the end policy's and the start's held-out scores, its curve and its cost.

    Raises:
        DataError: the folder lacks the held-out scores.

    """
    start, judge_settings = _groups(folder / "start"), _judge_settings(folder / "start")
    rounds = summary["rounds"]
    accepted = [e for e in rounds if e["accepted"]]
    last = accepted[-1] if accepted else None
    end = start if last is None else _groups(folder / f"round-{last['round']:03d}" / "6-report")
    curve = [summary["start"]["metrics"]]
    for entry in rounds:
        curve.append(entry["metrics"] if entry["accepted"] else curve[-1])
    facts = [e["facts"] for e in rounds]
    evaluation = summary["start"]["tokens"]["samples"] + sum(e["tokens"].get("evaluation_samples", 0) for e in rounds)
    given = bool(rounds) and all(f["samples"].get("tokens", 0) == 0 for f in facts)
    return Measured(
        seed=summary["seed"],
        folder=shown,
        ended=Ended(
            scores=_scores(end),
            start=_scores(start),
            judge=" and ".join(sorted({g.judge for g in (*end, *start)})),
            sampling=" and ".join(
                sorted({f"temperature {g.temperature:g}, top-p {g.top_p:g}" for g in (*end, *start)})
            ),
            start_digest=summary["policy_start"]["digest"],
            metrics=(last or {}).get("metrics", summary["start"]["metrics"]),
            curve=tuple(curve),
            accepted=len(accepted),
            rounds=len(rounds),
            samples=0 if given else sum(f["samples"].get("completions", 0) for f in facts),
            pairs=sum(f["batches"].get("pairs", 0) for f in facts),
            updates=sum(f["policy"].get("steps", 0) for f in facts),
            tokens_sampled=sum(e["tokens"].get("samples", 0) for e in rounds),
            tokens_trained=sum(e["tokens"].get("policy", 0) for e in rounds),
            tokens_evaluated=evaluation,
            seconds=sum(sum(e["seconds"].values()) for e in rounds),
            judge_settings=judge_settings,
        ),
    )


def _groups(folder: Path) -> list[JudgedGroup]:
    artifact = load_artifact(folder / "2-judged", JudgedGroup)
    if artifact is None:
        raise DataError(f"{folder}: no judged held-out completions; finish the run with `prefloop run`")
    return list(artifact)


def _judge_settings(folder: Path) -> dict[str, Any]:
    """Return the settings on which the verdicts depend, as the stage's key holds them: contents of files too."""
    artifact = load_artifact(folder / "2-judged", JudgedGroup)
    found = artifact.manifest["settings"].get("judge") if artifact is not None else None
    return dict(found) if isinstance(found, Mapping) else {}


def _scores(groups: Sequence[JudgedGroup]) -> dict[str, tuple[float | None, ...]]:
    return {group.prompt.prompt_id: group.scores for group in groups}
