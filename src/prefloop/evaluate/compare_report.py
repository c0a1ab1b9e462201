"""The comparison as files: `comparison.json`, the same as Markdown, and one page without scripts, `compare.html`."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prefloop.artifact import write_json, write_text
from prefloop.evaluate.compare_charts import charts, interval_bar
from prefloop.evaluate.compare_data import Elsewhere, Ended, Measured, Method, common_scores
from prefloop.evaluate.compare_words import markdown, verdict
from prefloop.evaluate.comparison import START, Comparison, Duel, compare, sweep, turned
from prefloop.evaluate.summary import metric_json, metrics_from_json

RESULT, PAGE, MARKDOWN = "comparison.json", "compare.html", "comparison.md"

COSTS = ("samples", "pairs", "updates", "tokens_sampled", "tokens_trained", "tokens_evaluated", "seconds")
"""What a run costs: completions drawn for training, pairs, optimizer steps, tokens by use, and seconds of wall time."""
SHOWN = ("judge_score", "kl_policy_start", "length", "repetition", "stopped")
BY_DEFINITION = {"kl_policy_start": 0.0, "win_rate_vs_start": 50.0}
"""What the start has against itself."""


def write_comparison(
    root: Path, methods: Sequence[Method], notes: Sequence[str], *, swept: bool, elsewhere: Elsewhere | None = None
) -> dict[str, Any]:
    """Compare, write the three files into `root`, each whole or not at all, and return what the JSON file holds.

    Raises:
        DataError: the runs cannot be compared, see `compare_data.common_scores` and `comparison.compare`.

    """
    found = result(methods, notes, swept=swept, elsewhere=elsewhere)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / RESULT, found)
    write_text(root / MARKDOWN, markdown(found))
    write_text(root / PAGE, page(found))
    return found


def result(
    methods: Sequence[Method], notes: Sequence[str], *, swept: bool, elsewhere: Elsewhere | None = None
) -> dict[str, Any]:
    """Return the comparison as plain values: see docs/compare.md for the fields."""
    arms, warnings = common_scores(methods)
    compared = compare(arms)
    by_name = {m.name: m for m in methods}
    judge = next(run.judge for m in methods for run in m.finished())
    found: dict[str, Any] = {
        "prefloop": version("prefloop"),
        "judge": judge,
        "prompts": compared.prompts,
        "warnings": warnings,
        "notes": [*notes, *compared.notes],
        "standings": [
            {
                "name": s.name,
                "score": metric_json(s.score),
                "win_rate_vs_start": None if s.versus_start is None else metric_json(s.versus_start),
                "elo": None if s.elo is None else metric_json(s.elo),
                **(_of_method(by_name[s.name]) if s.name in by_name else {"seeds": s.seeds}),
            }
            for s in compared.standings
        ],
        "duels": [_duel(d) for d in compared.duels],
        "diverged": [
            {"name": m.name, "seed": run.seed, "why": run.failed} for m in methods for run in m.runs if run.failed
        ],
        "sweeps": _sweeps(methods, compared) if swept else [],
        "ood": None,
    }
    if elsewhere is not None:
        found["ood"] = _elsewhere(elsewhere, found)
    return found | {"verdict": verdict(found)}


def _elsewhere(elsewhere: Elsewhere, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Return the methods' standing on other prompts; `held_out` is the comparison on the runs' own."""
    arms, warnings = common_scores(elsewhere.methods)
    compared = compare(arms)
    by_name = {m.name: m for m in elsewhere.methods}
    chosen = {s["target"]: s["best"] for s in held_out["sweeps"]}
    return {
        "source": elsewhere.name,
        "prompts": compared.prompts,
        "warnings": [text for text in warnings if text not in held_out["warnings"]],
        "standings": [
            {
                "name": s.name,
                "score": metric_json(s.score),
                "win_rate_vs_start": None if s.versus_start is None else metric_json(s.versus_start),
                "metrics": _of_method(by_name[s.name])["metrics"] if s.name in by_name else {},
                "seeds": s.seeds,
            }
            for s in compared.standings
        ],
        "duels": [_duel(d) for d in compared.duels],
        "sweeps": _sweeps(elsewhere.methods, compared, chosen) if chosen else [],
    }


def _of_method(method: Method) -> dict[str, Any]:
    ended = method.finished()
    ends = [_end_values(run) for run in ended]
    return {
        "target": method.target,
        "varied": dict(method.varied),
        "seeds": len(ended),
        "runs": [_run(run) for run in method.runs],
        "metrics": {
            name: _spread([e[name] for e in ends if name in e]) for name in SHOWN if any(name in e for e in ends)
        },
        "cost": {name: mean(getattr(run, name) for run in ended) for name in COSTS},
        "accepted": [run.accepted for run in ended],
        "rounds": [run.rounds for run in ended],
    }


def _run(run: Measured) -> dict[str, Any]:
    if run.ended is None:
        return {"seed": run.seed, "folder": run.folder, "failed": run.failed}
    curve = [{**BY_DEFINITION, **_values(metrics)} for metrics in run.ended.curve]
    names = ("judge_score", "win_rate_vs_start", "kl_policy_start", "length")
    return {
        "seed": run.seed,
        "folder": run.folder,
        "curve": [{name: point[name] for name in names if name in point} for point in curve],
    }


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics_from_json(metrics).items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "least": min(values), "most": max(values)}


def _duel(duel: Duel) -> dict[str, Any]:
    return {
        "one": duel.one,
        "other": duel.other,
        "win_rate": metric_json(duel.win_rate),
        "p": duel.p,
        "p_holm": duel.p_holm,
        "better": duel.better,
    }


def _sweeps(
    methods: Sequence[Method], compared: Comparison, chosen: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return for each target how its settings did; a setting that diverged in every run counts as losing all.

    `chosen` names for each target the setting that is best on held-out prompts: how it does here is `chosen_rate`.
    """
    found = []
    for target in dict.fromkeys(m.target for m in methods):
        settings = [m for m in methods if m.target == target]
        rates, beaten = {}, {}
        for method in settings:
            duel = compared.duel(method.name, START)
            rate = None if duel is None else duel.win_rate if duel.one == method.name else turned(duel.win_rate)
            rates[method.name] = 0.0 if rate is None else rate.value
            beaten[method.name] = duel is not None and duel.better == method.name
        all_of = sweep(target, rates, beaten)
        best = next(m for m in settings if m.name == all_of.best)
        kl, length = (_of_settings(settings, name) for name in ("kl_policy_start", "length"))
        found.append(
            {
                "target": target,
                "settings": all_of.settings,
                "best": dict(best.varied),
                "best_rate": all_of.best_rate,
                "quartiles": list(all_of.quartiles),
                "beat_start": all_of.beat_start,
                "kl": _spread(kl) if kl else None,
                "length": _spread(length) if length else None,
            }
        )
        if chosen is not None:
            picked = next(m.name for m in settings if dict(m.varied) == dict(chosen[target]))
            found[-1]["chosen_rate"] = rates[picked]
    return found


def _of_settings(settings: Sequence[Method], name: str) -> list[float]:
    """Return a metric of each setting, the mean over its runs that have it; none where no run has it."""
    ends = [[_end_values(run) for run in method.finished()] for method in settings]
    known = ([values[name] for values in of_method if name in values] for of_method in ends)
    return [mean(values) for values in known if values]


def _end_values(run: Ended) -> dict[str, float]:
    """Return a run's metrics; what the start has against itself is known only where the run ended with the start."""
    return {**(BY_DEFINITION if run.accepted == 0 else {}), **_values(run.metrics)}


def page(found: Mapping[str, Any]) -> str:
    """Return the page: one file that loads nothing and runs nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("compare.html.j2").render(
        found=found,
        names=[s["name"] for s in found["standings"]],
        matrix=matrix(found),
        charts=charts(found),
        bar=interval_bar,
        start=START,
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def matrix(found: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Return for each method its win rate over each other one, in the order of the standings.

    A cell is `None` on the diagonal. Empty if not all methods met.
    """
    names = [s["name"] for s in found["standings"]]
    if len(found["duels"]) < len(names) * (len(names) - 1) // 2:
        return []
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for duel in found["duels"]:
        rate, one, other = duel["win_rate"], duel["one"], duel["other"]
        ends = {"value": rate["value"], "low": rate["low"], "high": rate["high"]}
        back = {"value": 100 - rate["value"], "low": 100 - rate["high"], "high": 100 - rate["low"]}
        seen[one, other] = {
            **ends,
            "p_holm": duel["p_holm"],
            "won": duel["better"] == one,
            "lost": duel["better"] == other,
        }
        seen[other, one] = {
            **back,
            "p_holm": duel["p_holm"],
            "won": duel["better"] == other,
            "lost": duel["better"] == one,
        }
    return [(row, [seen.get((row, column)) for column in names]) for row in names]
