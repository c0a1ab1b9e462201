"""Sampling and judging at a real server, `transformers serve`, that is killed in the middle and started again."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefloop import endpoint
from prefloop.artifact import load_artifact
from prefloop.components import build_parts
from prefloop.inputs import embedded_policy, resolve_policy, resolve_prompts
from prefloop.judge import _llm_endpoint
from prefloop.judge.llm import Llm
from prefloop.launch import read_recipe
from prefloop.protocols import Quiet, RoundContext
from prefloop.rows import Message, Prompt, SampleGroup, prompt_id
from prefloop.sample import server as server_module
from prefloop.sample.hf import Hf
from prefloop.sample.server import Server
from prefloop.stages import Draw, Run, sample

pytest.importorskip("fastapi", reason="transformers serve needs fastapi")
pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn")

FOLDER = str(embedded_policy())
UP_WITHIN = 60.0


class RealServer:
    """`transformers serve` on a port of its own; it loads a folder when that is first asked for."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (home / "hub").mkdir(parents=True)
        self.environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        began = time.monotonic()
        while time.monotonic() - began < UP_WITHIN:
            assert self.process.poll() is None, "transformers serve ended by itself"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("transformers serve did not come up")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def real_server(tmp_path):
    server = RealServer(tmp_path / "huggingface")
    yield server
    server.kill()


def recorded(monkeypatch, module, name, content):
    """Record what each answered request asked for; `content` picks it from the arguments of `name`."""
    original, answered = getattr(module, name), []

    def recording(*arguments):
        found = original(*arguments)
        answered.append(content(*arguments))
        return found

    monkeypatch.setattr(module, name, recording)
    return answered


def chat(text):
    messages = (Message("user", text),)
    return Prompt(prompt_id(messages), messages, None, "train", "here:1")


@pytest.mark.slow
def test_a_killed_server_costs_no_call_twice_in_sampling_and_judging(tmp_path, monkeypatch, real_server):
    settings = [f"sampler={{kind: server, base_url: '{real_server.url}', completions: 4, concurrency: 2}}"]
    more = ["sampler.max_new_tokens=12", "prompts_per_part=6", "eval_sampler=hf"]
    recipe, _ = read_recipe("iterative_dpo", [*settings, *more])
    policy = resolve_policy(recipe)
    prompts = [*resolve_prompts(recipe).train[:10], chat("Tom had a dog. He"), chat("Mia saw a cat. She")]
    context = RoundContext(0, 0, policy, policy, scratch=str(tmp_path / "judge-store"))
    here = Run(tmp_path, recipe, build_parts(recipe), Quiet(), stop=lambda: False, begin=lambda: None)

    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 0.5)

    # What the server says without chance is what the policy says here.
    greedy = {"completions": 1, "temperature": 0.0, "max_new_tokens": 12}
    there = Server(base_url=real_server.url, **greedy)(prompts, context)
    assert [g.completions[0].text for g in there] == [g.completions[0].text for g in Hf(**greedy)(prompts, context)]

    drawn = recorded(monkeypatch, server_module, "read", lambda found, wanted: (wanted.messages, wanted.seed))
    graded = recorded(monkeypatch, _llm_endpoint, "read_completion", lambda found, wording: wording.text)
    (tmp_path / "rubric.txt").write_text("{{prompt}}{{completion}}\n{{format}}")
    judge = Llm(
        model=FOLDER,
        base_url=real_server.url,
        template=str(tmp_path / "rubric.txt"),
        scale=(0, 5),
        reply="text",
        max_tokens=12,
        concurrency=2,
        retries=100,
    )
    to_judge = Hf(completions=4, max_new_tokens=12)(prompts[:4], context)
    questions = sum(len({c.text for c in group.completions}) for group in to_judge)

    def kill_and_start_again():
        while len(drawn) < 10 or len(graded) < 5:
            time.sleep(0.01)
        real_server.kill()
        before = (len(drawn), len(graded))
        real_server.start()
        return before

    with ThreadPoolExecutor(3) as pool:
        killed = pool.submit(kill_and_start_again)
        sampling = pool.submit(sample, here, tmp_path / "1-samples", prompts, Draw(here.parts.sampler, {}), context)
        judging = pool.submit(judge, to_judge, context)
        artifact, verdicts, before = sampling.result(120), judging.result(120), killed.result(120)

    assert before[0] < 48
    assert before[1] < questions
    groups = list(artifact)
    assert [group.prompt.prompt_id for group in groups] == [prompt.prompt_id for prompt in prompts]
    assert len({c.text for group in groups for c in group.completions}) > 40
    assert {(c.source, c.token_ids) for group in groups for c in group.completions} == {(policy.digest, None)}
    assert len(drawn) == len(set(drawn)) == 48
    assert len(graded) == len(set(graded)) == questions
    # A model that tells stories gives no verdict, and none is made of its stories.
    assert {score for verdict in verdicts for score in verdict.scores} == {None}
    assert all("the reply: " in note for verdict in verdicts for note in verdict.notes)

    real_server.kill()
    assert judge(to_judge, context) == verdicts
    assert load_artifact(tmp_path / "1-samples", SampleGroup).rows == 12
    assert (len(drawn), len(graded)) == (48, questions)
