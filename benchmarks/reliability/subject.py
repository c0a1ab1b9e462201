"""The run that is hurt: three rounds, tiny, one thread; and what must be the same at its end."""

import hashlib
import json
from pathlib import Path
from typing import Any

METHOD = "iterative_dpo"
SETTINGS = (
    "rounds=3",
    "prompts_per_round=4",
    "prompts_per_part=2",
    "sampler.completions=2",
    "sampler.max_new_tokens=8",
    "train.pairs_per_step=1",
    "train.checkpoint_every=1",
    "evaluate.prompts=4",
    "gate.kind=always",
    "threads=1",
)
TIMES = ("seconds", "check")
"""Fields of the summary that hold times, or depend on them."""


def command(out: Path, settings: tuple[str, ...] = SETTINGS) -> list[str]:
    """Return the words after `prefloop` that run, and rerun, the subject in folder `out`."""
    return ["run", METHOD, *settings, "--out", str(out)]


def without_times(value: Any) -> Any:
    """Return a JSON value without its times."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def outcome(out: Path) -> dict[str, Any]:
    """Return digests of all that the run decided: weights, samples, pairs, curves; and the summary without times."""
    kept = [p for p in (*out.rglob("*.safetensors"), *out.rglob("*.parquet")) if counts(p.relative_to(out))]
    digests = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
    return digests | {"summary": without_times(json.loads((out / "summary.json").read_text(encoding="utf-8")))}


def counts(relative: Path) -> bool:
    """Return whether a file is a result: neither set aside nor a training state that a finished round leaves."""
    return relative.parts[0] != "damaged" and ".state" not in relative.parts


def lost(out: Path, whole: Path) -> tuple[int, list[str]]:
    """Compare a run with an uninterrupted one: bytes of results that are missing or differ, and their names."""
    if not (out / "summary.json").is_file():
        return (whole / "summary.json").stat().st_size, ["summary.json"]
    found, wanted = outcome(out), outcome(whole)
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    files = [(whole if name in wanted else out) / ("summary.json" if name == "summary" else name) for name in names]
    return sum(f.stat().st_size for f in files), names
