"""Judging and scoring while completions are still drawn: earlier, and otherwise the same in every byte."""

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest

import prefloop.endpoint as endpoint_module
from prefloop import batching, shelf, stages
from prefloop.artifact import Key, read_parts
from prefloop.batching import Scorer
from prefloop.errors import Interrupted, JudgeError
from prefloop.inputs import embedded_policy
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.rows import Completion, JudgedGroup, Message, Prompt, SampleGroup, Verdict
from scripted_endpoint import Misbehave, ScriptedEndpoint, grader

FOLDER = str(embedded_policy())
PROMPTS = 24
WORDS = ("dog", "cat", "ball", "tree", "happy", "sad", "ran", "sat", "big", "red")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(stages, "PAIRS_PER_PART", 8)
    monkeypatch.setattr(batching, "PAIRS_PER_PART", 8)


def writer(request, number):
    """A server whose completions depend on prompt and seed only."""
    digest = hashlib.sha256(f"{request['prompt']}{request['seed']}".encode()).digest()
    text = " " + " ".join(WORDS[b % len(WORDS)] for b in digest[:6]) + "."
    return Misbehave(body=json.dumps({"choices": [{"finish_reason": "stop", "text": text}]}))


def recipe_of(sampling, judging, **more):
    settings = {
        "sampler": f"{{kind: server, base_url: '{sampling.url}', completions: 3, concurrency: 2}}",
        "eval_sampler": "{kind: hf, max_new_tokens: 8}",
        "judge": f"{{kind: llm, base_url: '{judging.url}', model: judge, scale: [0, 5], concurrency: 2, retries: 2}}",
        "eval_judge": "lexicon",
        "gate": "always",
        "rounds": 2,
        "replay": 1,
        "prompts_per_round": PROMPTS,
        "prompts_per_part": 4,
        "prompts.limit": 120,
        "evaluate.prompts": 4,
        "evaluate.second_opinion": 0,
        "threads": 1,
        **more,
    }
    recipe, _ = read_recipe("iterative_dpo", [f"{name}={value}" for name, value in settings.items()])
    return recipe


class Watched(ScriptedEndpoint):
    """Keeps when each request came."""

    def __init__(self, script, models, delay=0.0):
        self.times = []

        def timed(request, number):
            self.times.append(time.monotonic())
            return script(request, number)

        super().__init__(timed, models, delay)


def made(root):
    """The bytes of what a run has made: parts, weights."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("part-*.parquet", "*.safetensors")
        for path in sorted(Path(root).rglob(pattern))
    }


def hidden(root):
    return [path for path in Path(root).rglob(".*.ahead")]


def test_overlap_comes_earlier_and_changes_no_byte(tmp_path, monkeypatch):
    ahead = []
    scored = Scorer.scored

    def noted(self, part):
        ahead.append(threading.current_thread().name == "ahead")
        return scored(self, part)

    monkeypatch.setattr(Scorer, "scored", noted)
    results = {}
    for overlap in (True, False):
        ahead.clear()
        with Watched(writer, (FOLDER,), 0.02) as sampling, Watched(grader, ("judge",), 0.02) as judging:
            run(recipe_of(sampling, judging, overlap=overlap, rounds=1, replay=0), tmp_path / str(overlap))
            results[overlap] = (sampling.times, judging.times, list(ahead), len(judging.requests))
    assert made(tmp_path / "True") == made(tmp_path / "False")
    assert not hidden(tmp_path)
    drawn, graded, threads, calls = results[True]
    assert graded[0] < drawn[len(drawn) // 2]
    assert any(threads)
    drawn, graded, threads, calls_one_by_one = results[False]
    assert graded[0] > drawn[-1]
    assert not any(threads)
    assert calls == calls_one_by_one


def test_a_stopped_run_goes_on_and_pays_for_nothing_twice(tmp_path):
    with Watched(writer, (FOLDER,), 0.01) as sampling, Watched(grader, ("judge",), 0.01) as judging:
        run(recipe_of(sampling, judging), tmp_path / "whole")
        asked = (len(sampling.requests), len(judging.requests))
    with Watched(writer, (FOLDER,), 0.01) as sampling, Watched(grader, ("judge",), 0.01) as judging:
        recipe = recipe_of(sampling, judging)
        stopped = 0
        for calls in (10, 60, 100):
            try:
                run(recipe, tmp_path / "stopped", stop=lambda most=calls: len(judging.requests) >= most)
            except Interrupted:
                stopped += 1
        run(recipe, tmp_path / "stopped")
        assert stopped == 3
        assert (len(sampling.requests), len(judging.requests)) == asked
    assert made(tmp_path / "whole") == made(tmp_path / "stopped")
    assert not hidden(tmp_path)


def test_a_judge_that_fails_for_good_stops_the_sampling(tmp_path):
    def refuse(request, number):
        return Misbehave(status=401, body='{"error": {"message": "bad key"}}')

    with Watched(writer, (FOLDER,), 0.05) as sampling, Watched(refuse, ("judge",)) as judging:
        with pytest.raises(JudgeError, match="401"):
            run(recipe_of(sampling, judging), tmp_path)
        assert 0 < len(sampling.requests) < 3 * PROMPTS
    kept = read_parts(tmp_path / "round-000" / "1-samples")
    assert len(kept) == len(sampling.requests) / 12


def group(text):
    prompt = Prompt("p", (Message("user", "Why?"),), None, "train", "here:1")
    completion = Completion("c", text, None, None, "stop", 0, "policy")
    return SampleGroup(prompt, (completion,), "policy", 0, 1.0, 1.0)


def test_what_was_judged_ahead_counts_only_for_the_same_completions(tmp_path):
    """Samples that were damaged are drawn anew, and may then be others."""
    named = stages.NamedJudge(lambda groups, context: [Verdict((9.0,), (None,)) for _ in groups], "by_hand")
    early = [stages.judged_group(group("so"), Verdict((1.0,), (None,)), "by_hand")]
    assert stages.judges_these(early, [group("so")], named)
    assert not stages.judges_these(early, [group("no")], named)
    assert not stages.judges_these(early, [group("so")] * 2, named)


def test_a_shelf_gives_back_whole_parts_of_its_own_key_only(tmp_path):
    stage, rows = tmp_path / "2-judged", [stages.judged_group(group("so"), Verdict((1.0,), (None,)), "by_hand")]
    key = Key("judged", {"judge": "a"})
    shelf.Shelf.of(stage, key, JudgedGroup).put(0, rows)
    assert shelf.Shelf.of(stage, key, JudgedGroup).take(0) == rows
    assert shelf.Shelf.of(stage, key, JudgedGroup).take(1) is None
    part = shelf.folder_of(stage) / "part-00000.parquet"
    good = part.read_bytes()
    part.write_bytes(good[:-9] + b"x" * 9)
    assert shelf.Shelf.of(stage, key, JudgedGroup).take(0) is None
    part.write_bytes(good)
    assert shelf.Shelf.of(stage, key, JudgedGroup).take(0) == rows
    assert shelf.Shelf.of(stage, Key("judged", {"judge": "b"}), JudgedGroup).take(0) is None
    assert shelf.Shelf.of(stage, key, JudgedGroup).take(0) is None
