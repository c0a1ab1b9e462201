"""The commands. Each imports what it needs when it runs, so that `--help` does not wait for torch."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from prefloop.disk import machine_errors
from prefloop.errors import ConfigError, DataError, Interrupted, PrefloopError

app = typer.Typer(
    name="prefloop",
    help="Improve a language model on its own output: sample, judge, pair, train, evaluate, gate, and again.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# Tables need 110 columns; a pipe or a log has no width of its own.
console = Console(width=None if sys.stdout.isatty() else 110)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else 110)

Target = Annotated[str, typer.Argument(help="A method's name (see `prefloop methods`) or a recipe file (.yaml).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, as key=value: train.learning_rate=1e-5")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]
Redo = Annotated[bool, typer.Option("--redo", help="Move results of other settings aside and make them again.")]


def main() -> None:
    """Run the command line and exit with the code that the error knows (see `prefloop.errors`)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with machine_errors():
            app()
    except PrefloopError as error:
        errors.print(
            f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error}",
            style="bold",
            markup=False,
            soft_wrap=True,
        )
        if isinstance(error, Interrupted):
            errors.print(f"Nothing is lost. To go on: {_again()}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print(
            f"stopped at once; finished parts are kept. To go on: {_again()}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(Interrupted.exit_code)


@app.command()
def run(
    target: Target,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME")] = None,
    redo: Redo = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Every stage on four prompts and one step, in OUT/smoke, then remove it.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="With --smoke: keep its folder.")] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, started by torchrun; see docs/scale.md.")
    ] = 1,
    mirror: Annotated[
        str | None,
        typer.Option(help="Address, such as s3://bucket/run, that gets a copy; a lost OUT is fetched from there."),
    ] = None,
) -> None:
    """Run a recipe; the same command goes on after a stop or a kill."""
    from prefloop.launch import read_recipe

    if nproc > 1:
        _launch(nproc)
        return
    recipe, origins = read_recipe(target, overrides or [])
    root = out or Path("runs") / (recipe.name or recipe.recipe)
    if smoke:
        _smoke(recipe, root, keep)
        return
    _run(recipe, origins, root, redo, mirror)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/demo")] = None,
    reckless: Annotated[
        bool, typer.Option("--reckless", help="Far too high a learning rate: see the gate refuse the round.")
    ] = False,
    redo: Redo = False,
) -> None:
    """Three rounds on the embedded story model, offline, on a CPU: it learns to tell happier stories."""
    from prefloop.launch import DEMO, RECKLESS, read_recipe

    recipe, origins = read_recipe("iterative_dpo", RECKLESS if reckless else DEMO)
    _run(recipe, origins, out or Path("runs") / recipe.name, redo)


@app.command()
def check(
    target: Target,
    overrides: Overrides = None,
    data_only: Annotated[bool, typer.Option("--data-only", help="Look at recipe and data only (no torch).")] = False,
    no_forward: Annotated[bool, typer.Option("--no-forward", help="Do not run the model or ask the judge.")] = False,
    against: Annotated[
        list[Path] | None, typer.Option(help="File of another evaluation set that must not be trained on; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run would be, for the disk. Default: runs")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too (exit code 3).")] = False,
) -> None:
    """Say in seconds what would ruin a run: settings, data, tokens, memory, disk, model, judge. See docs/check.md."""
    from prefloop.check.data import data_findings
    from prefloop.check.finding import worst
    from prefloop.launch import read_recipe

    recipe, _ = read_recipe(target, overrides or [])
    found = _printed(data_findings(recipe, against or ()))
    if not data_only and worst(found) != "error":
        from prefloop.commands.check import policy_findings
        from prefloop.loop import check_combination

        found += _printed(policy_findings(recipe, out or Path("runs"), check_combination, forward=not no_forward))
    bad = [f.name for f in found if f.severity == "error" or (strict and f.severity == "warning")]
    if bad:
        raise DataError(f"check: {len(bad)} findings must be settled first: {', '.join(dict.fromkeys(bad))}")
    warned = sum(f.severity == "warning" for f in found)
    console.print(f"ok, {warned} warnings" if warned else "ok", style="yellow" if warned else "green")


def _printed(findings: Any) -> list[Any]:
    """Print findings as they come, and return them."""
    styles = {"error": "bold red", "warning": "yellow", "info": None}
    found = []
    for finding in findings:
        found.append(finding)
        for line in finding.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True, style=styles[finding.severity])
    return found


@app.command()
def plan(
    target: Annotated[
        str | None, typer.Argument(help="A method's name or a recipe file (.yaml). With --gpus it may be left out.")
    ] = None,
    overrides: Overrides = None,
    price_per_call: Annotated[float | None, typer.Option(help="Money for one call of the judge.")] = None,
    price_per_million_tokens: Annotated[
        float | None, typer.Option(help="Money for a million tokens of the judge's questions and replies.")
    ] = None,
    probe: Annotated[int, typer.Option(min=2, help="Prompts that are tried to measure the time.")] = 64,
    ask_judge: Annotated[
        bool, typer.Option("--ask-judge", help="Ask a judge behind an endpoint too; it may cost money.")
    ] = False,
    gpus: Annotated[str | None, typer.Option(help="Work out memory and time by formula instead: 8xH100.")] = None,
    model: Annotated[str, typer.Option(help="With --gpus: size of the policy, 0.5B to 70B.")] = "8B",
    pairs: Annotated[int, typer.Option(min=1, help="With --gpus: pairs of a round.")] = 100_000,
) -> None:
    """Say what a run will take - counts, time, disk, money - from a short probe, before anything is spent."""
    from prefloop.launch import read_recipe

    if gpus is not None:
        from prefloop.commands.plan_capacity import Load, capacity

        if target is not None and "=" in target:  # no method was named, so that a setting stands in its place
            overrides, target = [target, *(overrides or [])], None
        recipe, _ = read_recipe(target or "iterative_dpo", overrides or [])
        lines = capacity(gpus, model, recipe.train, Load(pairs)).lines()
    elif target is None:
        raise ConfigError("plan: name a method or a recipe file, or --gpus 8xH100 --model 8B for formulas alone")
    else:
        from prefloop.commands.plan import Prices
        from prefloop.commands.plan import plan as make_plan

        recipe, _ = read_recipe(target, overrides or [])
        lines = make_plan(recipe, Prices(price_per_call, price_per_million_tokens), probe, ask_judge).lines()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(run_folder: RunFolder) -> None:
    """Say what of a run is whole, damaged or stale, and what a rerun would redo. Changes nothing."""
    from prefloop.doctor import examine, prognosis

    if not run_folder.is_dir():
        raise DataError(f"{run_folder}: no such folder; give the folder that `prefloop run` wrote")
    found = examine(run_folder)
    for line in [*(line for one in found for line in one.lines()), *prognosis(found)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    damaged = [one.path for one in found if one.state == "damaged"]
    if damaged:
        raise DataError(f"{run_folder}: damaged: {', '.join(damaged)}")


@app.command()
def init(
    target: Target,
    overrides: Overrides = None,
    file: Annotated[Path | None, typer.Option("--file", help="Where to write. Default: METHOD.yaml")] = None,
) -> None:
    """Write a commented recipe file for your model and prompts."""
    from prefloop.commands.init import write_template

    path = file or Path(f"{target}.yaml")
    write_template(path, target, overrides or [])
    console.print(f"{path} written. Set policy, prompts and judge, then: prefloop run {path}", markup=False)


@app.command()
def show(
    run_folder: RunFolder,
    examples: Annotated[int, typer.Option(min=0, help="Prompts to print before and after.")] = 3,
) -> None:
    """Print what a run has found so far: the report, for the terminal."""
    from prefloop.evaluate.summary import read_summary
    from prefloop.evaluate.terminal_details import details

    _require_run(run_folder)
    summary = read_summary(run_folder)
    _show(run_folder, summary, judges=True)
    if summary.get("trains") != "reward_model":
        for line in details(run_folder, summary, examples):
            console.print(line, highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run's folder (its best policy), or a policy's folder.")],
    overrides: Overrides = None,
    revisions: Annotated[
        str, typer.Option(help="Numbers of self-revisions to compare, as 0,1,2,3. Default: the run's own sampling.")
    ] = "",
    beams: Annotated[
        str, typer.Option(help="Numbers of beams to compare, as 1,2,4,8: search by the policy's likelihood.")
    ] = "",
    lm_eval: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, as arc_easy,gsm8k; they join the run's report.")
    ] = "",
    lm_eval_include: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, for a try.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go. Default: runs/evaluate-NAME")] = None,
) -> None:
    """Measure a policy on held-out prompts, or on tasks of lm-evaluation-harness."""
    from prefloop.commands.evaluate import evaluate as measure
    from prefloop.commands.evaluate import evaluate_tasks
    from prefloop.evaluate.terminal import evaluation_table, tasks_table
    from prefloop.launch import read_policy, run_of

    recipe = read_policy(target, overrides or [])
    root = out or Path("runs") / f"evaluate-{target.resolve().name}"
    numbers = (_listed(revisions, int, "--revisions"), _listed(beams, int, "--beams"))
    if lm_eval:
        tasks, kept = _listed(lm_eval, str, "--lm-eval"), out or run_of(target) or root
        console.print(tasks_table(evaluate_tasks(recipe, tasks, kept, include=lm_eval_include, limit=lm_eval_limit)))
        console.print(f"results      {kept / 'benchmarks.json'}", markup=False, highlight=False, soft_wrap=True)
        return
    with _bars() as (progress, stop):
        rows = measure(recipe, root, *numbers, progress=progress, stop=stop)
    console.print(evaluation_table([(row.label, row.found.metrics) for row in rows], rows[0].label))
    console.print(f"results      {root / 'evaluation.json'}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def credit(
    target: Annotated[Path, typer.Argument(help="A run's folder, or a policy's folder with --reference and --data.")],
    reference: Annotated[
        str | None, typer.Option(help="Folder or hub id of the reference. Default: the round's own.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File with prompt and completion, or chosen and rejected, in each row.")
    ] = None,
    of: Annotated[
        str, typer.Option(help="What of a run: pairs, or holdout (this policy's and the first's).")
    ] = "pairs",
    round_number: Annotated[
        int | None, typer.Option("--round", help="Default: the best policy's, or the last.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Default: the loss's, or 1.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts to show, spread evenly over a run's.")] = 8,
    steps: Annotated[
        str, typer.Option(help="What ends a step: lines, sentences, labels, a regular expression, or none.")
    ] = "lines",
    center: Annotated[
        bool, typer.Option("--center", help="Colours without the mean of all completions at the same position.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="The page. Default: RUN/credit.html, or credit.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show which tokens a policy likes better than its reference: credit maps of completions. See docs/credit.md."""
    from prefloop.artifact import write_text
    from prefloop.commands.credit import Asked
    from prefloop.commands.credit import credit as find_credit
    from prefloop.evaluate.credit_page import credit_page
    from prefloop.evaluate.credit_terminal import credit_lines

    found, groups = find_credit(
        Asked(target, reference, data, of, round_number, beta, limit=limit, steps=steps, center=center)
    )
    page = html or (target if (target / "summary.json").is_file() else Path()) / "credit.html"
    write_text(page, credit_page(found, groups))
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for line in credit_lines(groups, found["scale"], few_colours=console.color_system == "standard"):
        console.print(line, soft_wrap=True, highlight=False)
    for name, at in found["estimates"].items():
        value = f"{at['value']:+.3g} [{at['low']:.3g}, {at['high']:.3g}]".replace("-", "−")
        console.print(f"{name.replace('_', ' ')}: {value}; {at['estimator']}", markup=False, highlight=False)
    ends = f"{found['scale']:.3g}"
    console.print(f"beta {found['beta']:g} ({found['beta_from']}), colours to ±{ends}", markup=False, highlight=False)
    for note in (*found["notes"], found["caveat"]):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True, style="dim")
    console.print(found["headline"], style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page         {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    targets: Annotated[
        list[str], typer.Argument(help="Methods, recipe files or folders of finished runs; and key=value for all.")
    ],
    seeds: Annotated[int | None, typer.Option(help="Runs of each method. Default: 3")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=value,value: every method with every value; more may follow.")
    ] = None,
    ood: Annotated[
        str | None, typer.Option(help="File of prompts of another distribution, to measure every method on too.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="equal: as many samples and updates for each. own: each recipe's own.")
    ] = "equal",
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/compare"),
    redo: Redo = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare methods, or finished runs, under one budget; the same command goes on after a stop."""
    from prefloop.commands.compare import compare as compare_all
    from prefloop.commands.compare import read_asked
    from prefloop.evaluate.compare_report import PAGE
    from prefloop.evaluate.compare_words import leaderboard, robustness
    from prefloop.evaluate.compare_words import markdown as as_markdown

    asked = read_asked(targets, sweep or [], seeds, budget, ood)
    with _bars(errors if as_json or markdown else console) as (progress, stop):
        found = compare_all(asked, out, redo=redo, progress=progress, stop=stop)
    if as_json or markdown:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else as_markdown(found))
        return
    console.print(leaderboard(found))
    if (table := robustness(found)) is not None:
        console.print(table)
    for warning in found["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True, style="dim")
    console.print(found["verdict"], style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report       {out / PAGE}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write the run's report.html anew, with what people have judged since."""
    from prefloop.evaluate.report import write_report
    from prefloop.trust import refresh

    _require_run(run_folder)
    refresh(run_folder)
    console.print(str(write_report(run_folder)), markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="policy: the best policy's folder; pairs: all pairs as JSONL.")],
    run_folder: RunFolder,
    to: Annotated[
        str, typer.Argument(help="A folder (policy) or .jsonl file (pairs) yet to be, or s3://… and the like.")
    ],
) -> None:
    """Copy the best policy, or all pairs in TRL's format, out of a run."""
    from prefloop.commands.export import export_to

    _require_run(run_folder)
    console.print(export_to(what, run_folder, to), markup=False, highlight=False, soft_wrap=True)


@app.command(name="new-prompts")
def new_prompts(
    target: Target,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(help="New prompts to write.")] = 100,
    to: Annotated[Path, typer.Option("--to", help="A .jsonl file that does not exist yet.")] = Path(
        "new-prompts.jsonl"
    ),
    similarity: Annotated[float, typer.Option(help="ROUGE-L with another prompt from which one is dropped.")] = 0.7,
) -> None:
    """Let the policy write prompts in the manner of the recipe's, as Self-Instruct does; use them by prompts=FILE."""
    from prefloop.commands.new_prompts import Asked, make_prompts
    from prefloop.launch import read_recipe
    from prefloop.prompts.self_instruct import Limits

    recipe, _ = read_recipe(target, overrides or [])
    with _bars() as (progress, stop):
        lines = make_prompts(recipe, Asked(count, to, Limits(similarity)), progress, stop)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def label(
    run_folder: RunFolder,
    round_number: Annotated[int | None, typer.Option("--round", help="Default: the latest with pairs.")] = None,
    annotator: Annotated[
        str | None, typer.Option(help="Your name beside the verdicts. Default: the page asks.")
    ] = None,
    port: Annotated[int, typer.Option(help="0: the run's usual port, or any free one.")] = 0,
    host: Annotated[str, typer.Option(help="Another than this machine's own asks for --password-env.")] = "127.0.0.1",
    password_env: Annotated[str | None, typer.Option(help="Environment variable that holds the password.")] = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Write verdicts as JSONL; no page.")] = None,
    import_from: Annotated[Path | None, typer.Option("--import", help="Take verdicts in from JSONL; no page.")] = None,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Judge a round's pairs on a local page, or move such verdicts as files: see docs/labelling.md."""
    from prefloop.label.serving import address, export_file, import_file, serve

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    _require_run(run_folder)
    if import_from is not None and export_to is not None:
        raise ConfigError("label: --import and --export at once; do one after the other")
    if import_from is not None:
        lines = import_file(run_folder, round_number, import_from, annotator)
    elif export_to is not None:
        lines = export_file(run_folder, round_number, export_to, annotator)
    else:
        where = address(host, port, password_env)
        serve(run_folder, round_number, where, say, annotator=annotator, browse=browse)
        return
    for line in lines:
        say(line)


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List published settings of losses instead.")] = False,
) -> None:
    """List the methods, their state and their source."""
    from dataclasses import asdict

    from rich.table import Table

    from prefloop.losses._presets import PRESETS
    from prefloop.recipes import methods as all_methods

    if presets:
        listed = Table("preset", "settings", "source", box=None, padding=(0, 2, 0, 0))
        for name, published in PRESETS.items():
            values = {**published.loss, **{f"train.{key}": value for key, value in published.train.items()}}
            listed.add_row(name, ", ".join(f"{key}={value}" for key, value in values.items()), published.source)
        console.print(listed)
        return
    found = all_methods()
    if as_json:
        typer.echo(json.dumps([asdict(m) for m in found], indent=1))
        return
    table = Table("method", "state", "source", "what it is", box=None, padding=(0, 2, 0, 0))
    for method in found:
        table.add_row(method.name, method.state, method.source, method.summary)
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe file, for editors."""
    from prefloop.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


def _smoke(recipe: Any, root: Path, keep: bool) -> None:
    from prefloop.commands.smoke import smoke

    with _bars() as (progress, stop):
        done = smoke(recipe, root, keep, progress=progress, stop=stop)
    counts = f"{done.prompts} prompts, {done.pairs} pairs, {done.steps} step"
    console.print(f"ok: every stage went through in {done.seconds:.0f} s ({counts})", style="green", highlight=False)
    end = "kept" if done.kept else "removed"
    console.print(f"{done.folder} {end}", markup=False, highlight=False, soft_wrap=True)


def _launch(nproc: int) -> None:
    """Start this command again as `nproc` processes, and exit as the first of them that failed."""
    from prefloop.ranks import start

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--nproc: torchrun has started several processes already; leave --nproc out")
    sys.exit(start(nproc, sys.argv[1:]))


def _run(recipe: Any, origins: dict[str, str], root: Path, redo: bool, mirror: str | None = None) -> None:
    from prefloop.loop import run as run_loop
    from prefloop.protocols import Quiet
    from prefloop.ranks import joined

    with joined() as team, _bars() as (progress, stop):
        shown = progress if team.main else Quiet()
        summary = run_loop(
            recipe, root, origins=origins, redo=redo, progress=shown, stop=stop, team=team, mirror=mirror
        )
    if team.main:
        _show(root, summary)


@contextmanager
def _bars(on: Console = console) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Show progress bars, and turn a signal into a request to stop."""
    from prefloop.console import ConsoleProgress, telling

    progress = ConsoleProgress(on)
    try:
        with _stop_requested() as stop, telling(progress):
            yield progress, stop
    finally:
        progress.close()


def _listed(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise ConfigError(f"{option}: {text!r} is not a comma-separated list of numbers") from error


def _show(root: Path, summary: dict[str, Any], judges: bool = False) -> None:
    from prefloop.evaluate.displacement import displacement_lines
    from prefloop.evaluate.judging import lines as judging_lines
    from prefloop.evaluate.judging import notes as judging_notes
    from prefloop.evaluate.reward_table import reward_table
    from prefloop.evaluate.terminal import summary_table

    trains_judge = summary.get("trains") == "reward_model"
    console.print()
    console.print(reward_table(summary) if trains_judge else summary_table(summary))
    for entry in summary["rounds"]:
        label = "accepted" if entry["accepted"] else "refused"
        for index, reason in enumerate(entry["why"]):
            head = f"round {entry['round']} {label}: " if index == 0 else "  "
            console.print(head + reason, markup=False, highlight=False, soft_wrap=True)
        for line in displacement_lines(entry):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    judging = summary.get("judging") or {}
    for line in judging_lines(judging) if judges else judging_notes(judging):
        console.print(f"judging: {line}", markup=False, highlight=False, soft_wrap=True)
    for warning in summary["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True, style="dim")
    console.print()
    console.print(summary["verdict"], style="bold", markup=False, highlight=False, soft_wrap=True)
    if summary["policy_best"]["round"] >= 0:
        console.print(
            f"{'reward model' if trains_judge else 'best policy '} {root / summary['policy_best']['path']}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if (root / "report.html").exists():
        console.print(f"report       {root / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _require_run(root: Path) -> None:
    if not (root / "summary.json").is_file():
        raise DataError(f"{root}: not a run folder (no summary.json); give the folder that `prefloop run` wrote")


def _again() -> str:
    return shlex.join(["prefloop", *sys.argv[1:]])


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop at the next safe point; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        errors.print("\nstopping at the next safe point; once more to stop at once", markup=False)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
