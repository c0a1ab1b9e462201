"""Sampling and judging at real servers, `transformers serve`, that are killed in the middle and started again."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefloop import endpoint
from prefloop.artifact import load_artifact
from prefloop.components import build_parts
from prefloop.endpoint import Trouble
from prefloop.errors import SamplerError
from prefloop.inputs import embedded_policy, resolve_policy, resolve_prompts
from prefloop.judge import _llm_endpoint
from prefloop.judge.llm import Llm
from prefloop.launch import read_recipe
from prefloop.protocols import Quiet, RoundContext
from prefloop.rows import Message, Prompt, SampleGroup, prompt_id
from prefloop.sample import _server_asking as asking_module
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
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def launch(self, *only: str) -> None:
        """Start it; with a folder in `only`, it serves that one and no other."""
        self.kill()
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *only, "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self, *only: str) -> "RealServer":
        """Start it, if it does not run, and wait until it is up."""
        if only or self.process is None:
            self.launch(*only)
        began = time.monotonic()
        while time.monotonic() - began < UP_WITHIN:
            assert self.process is not None
            assert self.process.poll() is None, "transformers serve ended by itself"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise AssertionError("transformers serve did not come up")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    both = [RealServer(tmp_path_factory.mktemp("huggingface")) for _ in range(2)]
    for server in both:
        server.launch()  # at once: they take long
    yield both
    for server in both:
        server.kill()


@pytest.fixture
def real_server(servers):
    return servers[0].start()


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


def prepared(root, *settings):
    """What `sample` needs: the run, some stories to continue with two conversations, and where in the run we are."""
    recipe, _ = read_recipe("iterative_dpo", [*settings, "sampler.max_new_tokens=12", "eval_sampler=hf"])
    policy = resolve_policy(recipe)
    prompts = [*resolve_prompts(recipe).train[:10], chat("Tom had a dog. He"), chat("Mia saw a cat. She")]
    context = RoundContext(0, 0, policy, policy, scratch=str(root / "judge-store"))
    return Run(root, recipe, build_parts(recipe), Quiet(), stop=lambda: False, begin=lambda: None), prompts, context


@pytest.mark.slow
def test_two_servers_share_the_work_and_one_takes_over_what_the_other_was_asked(tmp_path, monkeypatch, servers):
    first, second = (server.start() for server in servers)
    urls = f"['{first.url}', '{second.url}']"
    setting = f"sampler={{kind: server, base_url: {urls}, completions: 5, concurrency: 2}}"
    here, prompts, context = prepared(tmp_path, setting, "prompts_per_part=12")
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 0.5)

    asked, answered, lost = [], [], []  # (address, prompt, seed) of each request
    back = threading.Event()
    send = Server._called

    def watched(sampler, wanted, lane, *more):
        url, request = lane.address.base_url, (lane.address.base_url, wanted.messages, wanted.seed)
        if url == second.url and sum(one[0] == url for one in answered) >= 30:
            assert back.wait(60)  # so that something is left for the first one when it is there again
        asked.append(request)
        found = send(sampler, wanted, lane, *more)
        if not isinstance(found, Trouble):
            answered.append(request)
        elif found.status is None:
            lost.append(request)
        return found

    monkeypatch.setattr(Server, "_called", watched)

    def kill_and_start_again():
        while min(sum(one[0] == server.url for one in answered) for server in servers) < 3:
            time.sleep(0.005)
        first.kill()
        before = list(answered)
        first.start()
        while sum(one[0] == first.url for one in answered) == sum(one[0] == first.url for one in before):
            time.sleep(0.005)
        back.set()
        return before

    with ThreadPoolExecutor(2) as pool:
        killed = pool.submit(kill_and_start_again)
        sampling = pool.submit(sample, here, tmp_path / "1-samples", prompts, Draw(here.parts.sampler, {}), context)
        artifact, before = sampling.result(120), killed.result(120)

    groups = list(artifact)
    assert [group.prompt.prompt_id for group in groups] == [prompt.prompt_id for prompt in prompts]
    assert [len(group.completions) for group in groups] == [5] * 12
    assert len({c.completion_id for group in groups for c in group.completions}) == 60
    assert {c.source for group in groups for c in group.completions} == {context.policy.digest}
    # Every request was answered once, by one of the two.
    assert {(g.prompt.messages, c.seed) for g in groups for c in g.completions} == {one[1:] for one in answered}
    assert len(answered) == 60
    # What the first one was asked when it died was asked again, and the other one answered while it was gone.
    taken = {one[1:] for one in lost if one[0] == first.url} - {one[1:] for one in before}
    assert taken
    assert taken <= {one[1:] for one in answered}
    gone = answered[len(before) :]
    gone = gone[: next(i for i, one in enumerate(gone) if one[0] == first.url)]
    assert taken & {one[1:] for one in gone if one[0] == second.url}
    # Neither stood idle: the one with fewer requests under way gets the next.
    shares = [sum(one[0] == server.url for one in answered) for server in servers]
    assert min(shares) > 3
    assert sum(shares) == 60


@pytest.mark.slow
def test_a_server_of_another_model_is_refused(tmp_path, monkeypatch, servers):
    other = shutil.copytree(FOLDER, tmp_path / "other")
    pinned = servers[1].start(str(other))
    setting = f"sampler={{kind: server, base_url: '{pinned.url}', completions: 2, retries: 0}}"
    here, prompts, context = prepared(tmp_path, setting)
    with pytest.raises(SamplerError) as told:
        sample(here, tmp_path / "1-samples", prompts, Draw(here.parts.sampler, {}), context)
    for part in ("sampler.model", pinned.url, str(other), FOLDER, "serve it"):
        assert part in str(told.value)
    assert load_artifact(tmp_path / "1-samples", SampleGroup) is None
    servers[1].kill()


@pytest.mark.slow
def test_a_killed_server_costs_no_call_twice_in_sampling_and_judging(tmp_path, monkeypatch, real_server):
    setting = f"sampler={{kind: server, base_url: '{real_server.url}', completions: 4, concurrency: 2}}"
    here, prompts, context = prepared(tmp_path, setting, "prompts_per_part=6")
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 0.5)

    # What the server says without chance is what the policy says here.
    greedy = {"completions": 1, "temperature": 0.0, "max_new_tokens": 12}
    there = Server(base_url=real_server.url, **greedy)(prompts, context)
    assert [g.completions[0].text for g in there] == [g.completions[0].text for g in Hf(**greedy)(prompts, context)]

    drawn = recorded(monkeypatch, asking_module, "read", lambda found, wanted: (wanted.messages, wanted.seed))
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
    assert {(c.source, c.token_ids) for group in groups for c in group.completions} == {(context.policy.digest, None)}
    assert len(drawn) == len(set(drawn)) == 48
    assert len(graded) == len(set(graded)) == questions
    # A model that tells stories gives no verdict, and none is made of its stories.
    assert {score for verdict in verdicts for score in verdict.scores} == {None}
    assert all("the reply: " in note for verdict in verdicts for note in verdict.notes)

    real_server.kill()
    assert judge(to_judge, context) == verdicts
    assert load_artifact(tmp_path / "1-samples", SampleGroup).rows == 12
    assert (len(drawn), len(graded)) == (48, questions)
