"""`prefloop compare` on the story model: two methods, two seeds; going on does nothing twice; finished runs."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from prefloop.artifact import load_artifact
from prefloop.cli import app
from prefloop.compare import compare, read_asked
from prefloop.errors import ConfigError, DataError, Interrupted
from prefloop.rows import Prompt

SMALL = ["rounds=1", "prompts_per_round=4", "sampler.max_new_tokens=6", "evaluate.prompts=20", "gate.kind=always"]
SMALL += ["threads=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The first call is stopped after some parts, the second goes on."""
    root = tmp_path_factory.mktemp("compare")
    asked = read_asked(["spin", "simpo", *SMALL], seeds=2)
    looks = iter(range(1000))
    with pytest.raises(Interrupted):
        compare(asked, root, stop=lambda: next(looks) > 12)
    assert not (root / "comparison.json").exists()
    return asked, root, compare(asked, root)


def parts(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("part-*.parquet")}


def test_every_method_and_seed_is_a_run(finished):
    _, root, found = finished
    for name in ("spin", "simpo"):
        for seed in (0, 1):
            assert json.loads((root / name / f"seed-{seed}" / "summary.json").read_text())["state"] == "done"
    assert {s["name"] for s in found["standings"]} == {"spin", "simpo", "start"}
    assert {s["seeds"] for s in found["standings"]} == {2}
    assert len(found["duels"]) == 3
    assert found["prompts"] == 20
    cost = {s["name"]: s["cost"] for s in found["standings"] if "cost" in s}
    assert cost["spin"]["samples"] == cost["simpo"]["samples"] == 16
    assert json.loads((root / "comparison.json").read_text()) == json.loads(json.dumps(found))


def test_the_same_call_makes_nothing_twice(finished):
    asked, root, found = finished
    before = parts(root)
    assert before
    again = compare(asked, root)
    assert parts(root) == before
    assert again == found


def test_finished_runs_are_grouped_by_their_settings(finished, tmp_path):
    _, root, found = finished
    runs = [str(root / name / f"seed-{seed}") for name in ("spin", "simpo") for seed in (0, 1)]
    again = compare(read_asked(runs), tmp_path)
    assert [(s["name"], s["seeds"], s["score"]) for s in again["standings"]] == [
        (s["name"], s["seeds"], s["score"]) for s in found["standings"]
    ]
    assert again["duels"] == found["duels"]
    with pytest.raises(DataError, match="seeds of one method"):
        compare(read_asked(runs[:2]), tmp_path)
    with pytest.raises(ConfigError, match="is a finished run and simpo is not"):
        compare(read_asked([runs[0], "simpo"]), tmp_path)
    with pytest.raises(ConfigError, match="have their settings and seeds"):
        compare(read_asked([runs[0], runs[2], "rounds=2"]), tmp_path)


def test_an_unfinished_run_is_refused(finished, tmp_path):
    _, root, _ = finished
    copy = shutil.copytree(root / "spin" / "seed-0", tmp_path / "half")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"state": "running"}))
    with pytest.raises(DataError, match="not finished"):
        compare(read_asked([str(copy), str(root / "simpo" / "seed-0")]), tmp_path / "out")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_stands_alone(finished):
    _, root, found = finished
    text = (root / "compare.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    assert not [a for _, attrs in tags.seen for a in attrs if a.startswith("on") or a in ("src", "href")]
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert found["verdict"].replace("'", "&#39;") in text
    assert "url(" not in text


def test_the_command_prints_what_it_is_asked_for(finished):
    _, root, found = finished
    words = ["compare", "spin", "simpo", *SMALL, "--seeds", "2", "--out", str(root)]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert found["verdict"] in table.output.replace("\n", " ")
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(found))
    as_markdown = CliRunner().invoke(app, [*words, "--markdown"])
    assert as_markdown.stdout.strip() == (root / "comparison.md").read_text().strip()


def test_dpo_and_ppo_get_the_same_prompts_judge_samples_and_updates(tmp_path):
    settings = [s for s in SMALL if s != "rounds=1"]
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text("recipe: ppo\nrounds: 2\nsampler: {completions: 2}\npolicy: embedded\nprompts: embedded\n")
    both = ["policy=embedded", "prompts=embedded", "prompts.limit=200", "judge=lexicon", "train.learning_rate=1e-4"]
    words = ["simpo", str(recipe), *settings, *both, "train.pairs_per_step=4"]
    found = compare(read_asked(words, seeds=1), tmp_path / "out")
    cost = {s["name"]: s["cost"] for s in found["standings"] if "cost" in s}
    assert cost["ppo"]["samples"] == cost["simpo"]["samples"] == 20  # one round of 4 × 5, two of 5 × 2
    assert cost["ppo"]["updates"] == 6
    assert cost["simpo"]["updates"] == 6
    prompts = [
        {p.prompt_id for p in load_artifact(tmp_path / "out" / name / "seed-0" / "prompts", Prompt)} for name in cost
    ]
    assert prompts[0] == prompts[1]


def test_a_sweep_is_a_grid_over_all_targets(tmp_path):
    asked = read_asked(["simpo", *SMALL, "loss.beta=1,2"], sweep=["train.learning_rate=1e-4,3e-4"], seeds=1)
    assert asked.grid == {"train.learning_rate": ("1e-4", "3e-4"), "loss.beta": ("1", "2")}
    found = compare(asked, tmp_path)
    assert len(found["standings"]) == 5
    (swept,) = found["sweeps"]
    assert swept["settings"] == 4
    assert set(swept["best"]) == {"train.learning_rate", "loss.beta"}
    assert any("one seed" in w for w in found["warnings"])
    recipe = (tmp_path / "simpo_learning_rate=1e-4_beta=2" / "seed-0" / "recipe.yaml").read_text()
    assert re.search(r"beta: 2\.?0? ", recipe)


@pytest.mark.parametrize(
    ("words", "sweep", "problem"),
    [
        ([], [], "no method"),
        (["spin"], [], "alone has nothing"),
        (["spin", "spin"], [], "named twice"),
        (["spin"], ["loss.beta"], "not key=value"),
        (["spin"], ["loss.beta=1,"], "not key=value"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(words, sweep, problem):
    with pytest.raises(ConfigError, match=problem):
        read_asked(words, sweep)


def test_refusals_come_before_any_work(tmp_path):
    root = tmp_path / "out"
    for words, problem in (
        (["spin", "nosuch"], "nosuch"),
        (["spin", "simpo", "loss.nonsense=1"], "nonsense"),
        (["spin", "simpo", "rounds=0"], "rounds"),
        (["spin", "simpo", "reference=none"], "loss.kind dpo needs one"),
        (["simpo", "spin", "loss.gamma=1"], "gamma"),
    ):
        with pytest.raises(ConfigError, match=problem):
            compare(read_asked(words), root)
    with pytest.raises(ConfigError, match="--seeds"):
        compare(read_asked(["spin", "simpo"], seeds=0), root)
    assert not [p for p in root.rglob("*") if p.name != ".lock" and p.is_file()]


def test_methods_without_common_prompts_are_refused_before_any_work(tmp_path):
    prompts = tmp_path / "others.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Once there was a cat {i}"}) + "\n" for i in range(200)))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"recipe: simpo\npolicy: embedded\nprompts: {prompts}\njudge: lexicon\nprompts_per_round: 4\n")
    with pytest.raises(DataError, match="share 0 held-out prompts"):
        compare(read_asked(["spin", str(recipe)]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
