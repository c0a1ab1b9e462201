"""New prompts: ROUGE-L against all subsequences, what is read and dropped, and a policy that writes them."""

import json
import random
from itertools import combinations

import pytest
from typer.testing import CliRunner

from prefloop.cli import app
from prefloop.commands import new_prompts
from prefloop.commands.new_prompts import Asked, make_prompts
from prefloop.errors import ConfigError, DataError
from prefloop.launch import read_recipe
from prefloop.prompts.self_instruct import Limits, Pool, read_tasks, request, rouge_l
from prefloop.protocols import Quiet
from prefloop.rows import Completion, SampleGroup
from prefloop.sample.hf import Hf
from tiny import write_jsonl


def subsequences(words):
    return {part for size in range(len(words) + 1) for part in combinations(words, size)}


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    draw = random.Random(1)
    for _ in range(200):
        one, two = ([draw.choice("abc") for _ in range(draw.randint(0, 6))] for _ in range(2))
        longest = max(map(len, subsequences(one) & subsequences(two)))
        expected = 2 * longest / (len(one) + len(two)) if longest else 0.0
        assert rouge_l(one, two) == pytest.approx(expected)
        assert rouge_l(one, two) == rouge_l(two, one)
    # Lin 2004, section 3.1: "police killed the gunman" against "the gunman kill police" and "police kill the gunman".
    reference = ["police", "killed", "the", "gunman"]
    assert rouge_l(["police", "kill", "the", "gunman"], reference) == 0.75
    assert rouge_l(["the", "gunman", "kill", "police"], reference) == 0.5


def test_tasks_are_read_to_the_next_number_and_a_cut_one_is_left_out():
    said = " Write a poem about the sea.\nTask 10: Name three rivers\nof Asia.\n\nOutput: Indus\nTask 11: Say wh"
    tasks = ["Write a poem about the sea.", "Name three rivers\nof Asia."]
    assert read_tasks(said, ended=False) == tasks
    assert read_tasks(said, ended=True) == [*tasks, "Say wh"]
    assert read_tasks("", ended=True) == []
    shown = request(["One\ntask.", "Two."])
    assert shown.endswith("Task 1: One task.\nTask 2: Two.\nTask 3:")


def test_what_is_kept_is_unlike_all_that_is_there():
    pool = Pool(Limits())
    pool.know("Write a short poem about the open sea.")
    assert not pool.offer("Write a short poem about the open sky.")
    assert not pool.offer("Too short.")
    assert not pool.offer("Describe what this image shows us.")
    assert not pool.offer("- Name three rivers of Asia.")
    assert pool.offer("Name three rivers of Asia.")
    assert not pool.offer("Name three rivers of Africa.")
    assert pool.made == ["Name three rivers of Asia."]
    assert dict(pool.dropped) == {
        "like another": 2,
        "too short or too long": 1,
        "about what a text does not show": 1,
        "begins with a sign": 1,
    }


def test_no_two_kept_prompts_are_alike_whatever_is_offered():
    draw = random.Random(2)
    words = ["make", "list", "name", "tell", "why", "how", "the", "a", "of", "in", "rivers", "poems", "cats", "sums"]
    pool = Pool(Limits(similarity=0.6))
    for _ in range(400):
        pool.offer(" ".join(draw.choices(words, k=draw.randint(3, 9))))
    assert len(pool.made) > 10
    assert all(rouge_l(one.split(), two.split()) < 0.6 for one, two in combinations(pool.made, 2))


@pytest.fixture
def writer(monkeypatch):
    """The policy writes tasks out of a list of words, and now and then repeats one that it was shown."""
    words = [
        "make",
        "list",
        "name",
        "tell",
        "explain",
        "compare",
        "rivers",
        "poems",
        "cats",
        "sums",
        "trains",
        "colours",
        "winters",
        "songs",
        "bread",
    ]

    def draw(self, prompts, context):
        groups = []
        for prompt in prompts:
            chance = random.Random(prompt.prompt_id)
            new = " ".join(chance.choices(words, k=7))
            seen = prompt.text.split("Task 3: ")[1].split("\n")[0]
            text = f" {new}\nTask 10: {seen}\nTask 11: and a cut"
            made = Completion("c", text, None, None, "length", 0, "p")
            groups.append(SampleGroup(prompt, (made,), "p", 0, 1.0, 1.0))
        return groups

    monkeypatch.setattr(Hf, "__call__", draw)


def settings(tmp_path, count=140):
    rows = [{"prompt": f"Question number {i} about the {chr(97 + i % 26)} word?"} for i in range(count)]
    return [f"prompts={write_jsonl(tmp_path / 'seeds.jsonl', rows)}", "policy=embedded", "judge=lexicon"]


def test_the_command_writes_prompts_that_a_run_can_read(tmp_path, writer):
    target = tmp_path / "new.jsonl"
    call = ["new-prompts", "iterative_dpo", *settings(tmp_path), "--count", "30", "--to", str(target)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == 30
    assert all(row["source"].startswith("self-instruct ") for row in rows)
    assert f"{target.name}: 30 prompts" in result.output.replace("\n", "")
    assert "like another" in result.output
    texts = [row["prompt"].split() for row in rows]
    assert all(rouge_l(one, two) < 0.7 for one, two in combinations(texts, 2))
    again = tmp_path / "again.jsonl"
    CliRunner().invoke(app, [*call[:-1], str(again)])
    assert again.read_bytes() == target.read_bytes()


def test_a_policy_that_writes_nothing_new_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(new_prompts, "USELESS", 2)
    monkeypatch.setattr(Hf, "__call__", lambda self, prompts, context: [])
    recipe, _ = read_recipe("iterative_dpo", settings(tmp_path))
    with pytest.raises(DataError, match=r"0 of 5 after 2 batches.*none was read"):
        make_prompts(recipe, Asked(5, tmp_path / "new.jsonl"), Quiet(), lambda: False)
    assert not (tmp_path / "new.jsonl").exists()


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--count"):
        Asked(0, tmp_path / "new.jsonl")
    with pytest.raises(ConfigError, match=r"--to: name a \.jsonl file"):
        Asked(1, tmp_path / "new.txt")
    (tmp_path / "there.jsonl").touch()
    with pytest.raises(ConfigError, match="is there already"):
        Asked(1, tmp_path / "there.jsonl")
    with pytest.raises(ConfigError, match="similarity"):
        Limits(0.0)
    with pytest.raises(ConfigError, match="words"):
        Limits(fewest=9, most=3)
    monkeypatch.setattr(new_prompts, "EXAMPLES", 1000)
    recipe, _ = read_recipe("iterative_dpo", settings(tmp_path))
    with pytest.raises(DataError, match="1000 training prompts are shown at a time, and there are"):
        make_prompts(recipe, Asked(1, tmp_path / "new.jsonl"), Quiet(), lambda: False)
