"""`prefloop compare` on the story model: two methods, two seeds; going on does nothing twice; finished runs."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from prefloop.artifact import load_artifact
from prefloop.cli import app
from prefloop.commands.compare import compare, read_asked
from prefloop.errors import ConfigError, DataError, Interrupted
from prefloop.inputs import embedded_prompts
from prefloop.prompts.dataset import read_prompts
from prefloop.rows import JudgedGroup, Prompt

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


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Openings of another kind; two are prompts of the runs themselves."""
    own = embedded_prompts("embedded").read_text(encoding="utf-8").splitlines()[:2]
    rows = [json.dumps({"prompt": f"The number {n} said to the letter {chr(97 + n % 26)}:"}) for n in range(30)]
    path = tmp_path_factory.mktemp("ood") / "other.jsonl"
    path.write_text("\n".join([*own, *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_a_sweep_in_and_out_of_distribution(tmp_path, outside):
    grid = ["train.learning_rate=1e-4,1e-3"]
    asked = read_asked(["simpo", *SMALL], sweep=grid, seeds=1, ood=outside)
    found = compare(asked, tmp_path)
    ood = found["ood"]
    assert ood["source"] == outside
    assert ood["prompts"] == 20  # evaluate.prompts
    assert any("2 prompts are the methods' own too" in note for note in found["notes"])
    (inside,), (beyond,) = found["sweeps"], ood["sweeps"]
    for swept in (inside, beyond):
        assert swept["settings"] == 2
        assert {"best", "best_rate", "quartiles", "beat_start", "kl", "length"} <= swept.keys()
        assert swept["kl"]["most"] > swept["kl"]["least"]
    rates = {s["name"]: s["win_rate_vs_start"]["value"] for s in ood["standings"] if s["win_rate_vs_start"]}
    assert beyond["best_rate"] == max(rates.values())
    named = next(s["name"] for s in found["standings"] if s.get("varied") == inside["best"])
    assert beyond["chosen_rate"] == rates[named]
    # Nothing of the run itself was touched, and the same call makes nothing twice.
    before = parts(tmp_path)
    assert compare(asked, tmp_path)["ood"] == ood
    assert parts(tmp_path) == before
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "Out of distribution" in page
    assert "Out of distribution: 20 prompts" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    judged = load_artifact(next(tmp_path.glob("ood/start-*")) / "2-judged", JudgedGroup)
    assert not {g.prompt.prompt_id for g in judged} & {
        p.prompt_id for p in read_prompts(str(embedded_prompts("embedded"))).prompts
    }


def test_the_ends_own_texts_are_judged_out_of_distribution(tmp_path, outside):
    """The metrics are those of the promoted policy on the other prompts, recomputed from its completions."""
    found = compare(read_asked(["spin", "simpo", *SMALL], seeds=1, ood=outside), tmp_path)
    assert found["sweeps"] == found["ood"]["sweeps"] == []
    for standing in found["ood"]["standings"]:
        if standing["name"] == "start":
            continue
        groups = list(load_artifact(tmp_path / "ood" / standing["name"] / "seed-0" / "2-judged", JudgedGroup))
        summary = json.loads((tmp_path / standing["name"] / "seed-0" / "summary.json").read_text())
        assert {g.policy for g in groups} == {summary["rounds"][0]["policy"]["digest"]}
        scores = [score for g in groups for score in g.scores]
        assert standing["score"]["value"] == pytest.approx(sum(scores) / len(scores))
        lengths = [len(c.token_ids) for g in groups for c in g.completions]
        assert standing["metrics"]["length"]["mean"] == pytest.approx(sum(lengths) / len(lengths))


def test_prompts_that_are_no_other_distribution_are_refused_before_any_work(tmp_path, finished):
    with pytest.raises(DataError, match="--ood: embedded has 0 prompts"):
        compare(read_asked(["spin", "simpo", *SMALL], ood="embedded"), tmp_path / "out")
    runs = [str(finished[1] / name / "seed-0") for name in ("spin", "simpo")]
    with pytest.raises(ConfigError, match="--ood"):
        compare(read_asked(runs, ood="x.jsonl"), tmp_path)
    assert not (tmp_path / "out").exists()
