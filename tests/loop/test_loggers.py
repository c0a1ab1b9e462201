"""Loggers that the user names: real event files and databases read back, a missing package, one that fails."""

import json
import sqlite3

import pytest

from prefloop.artifact import load_artifact
from prefloop.commands.small import shrunk
from prefloop.components import build
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.loggers import _package
from prefloop.loop import run
from prefloop.recipe import Spec
from prefloop.rows import StepLog
from prefloop.watch import Watch, named

SMALL = [
    "prompts_per_round=16",
    "prompts_per_part=8",
    "sampler.completions=3",
    "sampler.max_new_tokens=8",
    "train.pairs_per_step=6",
    "evaluate.prompts=20",
    "gate.kind=always",
    "threads=1",
    "rounds=2",
]


def call(root, *more, **options):
    recipe, origins = read_recipe("iterative_dpo", [*SMALL, *more])
    return run(recipe, root, origins=origins, **options)


def curve(root, number):
    """The training curve as the run stored it."""
    return list(load_artifact(root / f"round-00{number}" / "5-policy", StepLog))


def test_nothing_is_sent_anywhere_by_default():
    assert read_recipe("iterative_dpo", [])[0].loggers == ()


def test_event_files_hold_the_curve_of_every_step_and_the_metrics_of_every_round(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    summary = call(tmp_path, "loggers=[tensorboard]")
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]

    first, second = curve(tmp_path, 0), curve(tmp_path, 1)
    written = found.Scalars("train/loss")
    assert [e.step for e in written] == [*(r.step for r in first), *(len(first) + r.step for r in second)]
    assert [e.value for e in written] == pytest.approx([r.loss for r in (*first, *second)], rel=1e-6)
    assert {"train/margin", "train/grad_norm", "train/learning_rate", "train/chosen_logp"} <= set(tags)

    written = found.Scalars("round/win_rate_vs_start")
    assert [(e.step, e.value) for e in written] == [
        (e["round"], pytest.approx(e["metrics"]["win_rate_vs_start"]["value"])) for e in summary["rounds"]
    ]
    low = found.Scalars("round/win_rate_vs_start/low")[0].value
    assert low == pytest.approx(summary["rounds"][0]["metrics"]["win_rate_vs_start"]["low"])
    assert [e.value for e in found.Scalars("round/accepted")] == [1.0, 1.0]
    assert found.Scalars("start/judge_score")[0].value == pytest.approx(
        summary["start"]["metrics"]["judge_score"]["value"]
    )
    assert not any("prompt" in tag or "text" in tag for tag in tags)

    # The finished run is found done: nothing is told twice, no file is added.
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert call(tmp_path, "loggers=[tensorboard]") == summary
    assert sorted((tmp_path / "tensorboard").iterdir()) == files
    # Another round is told of, the earlier ones are not told again.
    call(tmp_path, "loggers=[tensorboard]", "rounds=3")
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("round/judge_score")] == [0, 1, 2]
    assert len(found.Scalars("train/loss")) == len(first) + len(second) + len(curve(tmp_path, 2))


def test_loggers_change_no_result_and_are_no_part_of_a_stage_s_key(tmp_path):
    pytest.importorskip("tensorboard")
    plain = call(tmp_path, "rounds=1")
    again = call(tmp_path, "rounds=1", "loggers=[tensorboard]")
    assert again == plain
    assert "loggers: [{flush_seconds: 30, kind: tensorboard}]" in (tmp_path / "recipe.yaml").read_text()


def test_weights_and_biases_stays_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    call(tmp_path, "rounds=1", "loggers=[wandb]")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = folder.glob("*.wandb")
    content = stored.read_bytes()
    for name in (b"train/loss", b"round/win_rate_vs_start", b"start/judge_score", b"learning_rate"):
        assert name in content
    assert b"Once upon a time" not in content


def test_trackio_keeps_its_database_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    pytest.importorskip("trackio")
    call(tmp_path / "run", "rounds=1", "loggers=[{kind: trackio, project: tried}]")
    with sqlite3.connect(tmp_path / "database" / "tried.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    database.close()
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx([r.loss for r in curve(tmp_path / "run", 0)])
    assert any("round/win_rate_vs_start" in row for row in rows)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_refused_before_any_work(kind, tmp_path, monkeypatch):
    find = _package.importlib.util.find_spec
    monkeypatch.setattr(_package.importlib.util, "find_spec", lambda name: None if name == kind else find(name))
    with pytest.raises(ConfigError, match=rf"package {kind} is not installed: pip install 'prefloop\[{kind}\]'"):
        call(tmp_path / "out", f"loggers=[{kind}]")
    assert not (tmp_path / "out").exists()


def test_an_unknown_logger_and_setting_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tensorbord"):
        call(tmp_path, "loggers=[tensorbord]")
    with pytest.raises(ConfigError, match=r"wandb\.mode must be offline or online, got 'shared'"):
        build("loggers", Spec.model_validate({"kind": "wandb", "mode": "shared"}))


BREAKS = """
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Breaks:
    after: int = 3

    def __call__(self, run):
        return Session(self.after, [])

@dataclass(frozen=True)
class Session:
    after: int
    told: list

    def log(self, values, axis, at):
        if len(self.told) == self.after:
            raise OSError("the server is gone")
        self.told.append(at)

    def flush(self): ...
    def close(self): ...
"""


def test_a_logger_that_fails_is_a_warning_and_the_run_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(BREAKS, encoding="utf-8")
    named_logger = f"{tmp_path}/mine.py:Breaks"
    summary = call(tmp_path / "out", f"loggers=[{{kind: '{named_logger}'}}]")
    assert summary["state"] == "done"
    assert len(summary["rounds"]) == 2
    (warning,) = [w for w in summary["warnings"] if w.startswith("loggers:")]
    assert warning.endswith("failed (OSError: the server is gone) and is switched off; the run goes on")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"] == summary["warnings"]


def test_two_of_one_kind_are_both_told_and_a_watch_without_loggers_writes_nothing(tmp_path):
    assert list(named([("wandb", 1), ("wandb", 2), ("trackio", 3)])) == ["wandb", "wandb 2", "trackio"]
    Watch(tmp_path).start({"metrics": {}})
    assert not list(tmp_path.iterdir())


def test_a_smoke_test_tells_no_logger():
    recipe, _ = read_recipe("iterative_dpo", ["loggers=[tensorboard]"])
    assert recipe.loggers[0].kind == "tensorboard"
    assert shrunk(recipe, 4, 2, False).loggers == ()
