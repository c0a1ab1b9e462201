"""A server is told of each round's policy, and a completion of other weights is never taken for the policy's.

The endpoints answer as vLLM 0.32 does, which was run, and as SGLang's sources say that it does, which was not.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import prefloop.endpoint as endpoint_module
from prefloop.errors import ConfigError, SamplerError
from prefloop.inputs import embedded_policy
from prefloop.models.causal_lm import folder_digest
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample import _server_vllm
from prefloop.sample.server import Server
from scripted_endpoint import Misbehave, ScriptedEndpoint

START = PolicyRef(str(embedded_policy()), folder_digest(embedded_policy()), -1)
PROMPTS = [
    Prompt(prompt_id((message,)), (message,), None, "train", "here:1")
    for message in (Message(VERBATIM, f"Tom had {n} dogs. He") for n in range(6))
]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(_server_vllm, "EMPTY_WITHIN", 0.2)


@pytest.fixture
def policies(tmp_path):
    """Policies of two rounds, with adapters to the start; each has bytes of its own."""
    made = []
    for number in range(2):
        folder = Path(shutil.copytree(START.path, tmp_path / "run" / f"round-{number:03d}" / "5-policy"))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": number}))
        (folder / "adapter").mkdir()
        made.append(PolicyRef(str(folder), folder_digest(folder), number, base=START.path))
    return made


def context(policy):
    return RoundContext(seed=0, round=0, policy=policy, start=START)


def merged(policy):
    return replace(policy, base=None)


class Weights:
    """What a server has in memory. A text says of which folders it is."""

    def __init__(self, started=START.path, dev=True, lora=True, sees=lambda folder: True, device="cuda"):
        self.started, self.dev, self.lora, self.sees, self.device = started, dev, lora, sees, device
        self.told, self.restart_at, self.paused = [], None, False
        self.restart()

    def restart(self):
        self.folder, self.version, self.adapters, self.cached = self.started, "default", {}, set()

    def text(self, request, adapter=None):
        # A prefix that was seen before is continued from the weights that saw it.
        self.cached.add(self.folder)
        return f" {'+'.join(sorted(self.cached))}{f' with {adapter}' if adapter else ''} {request['seed']}."

    def answered(self, request, number, adapter, **more):
        text = self.text(request, adapter)
        return Misbehave(body=json.dumps({"choices": [{"text": text, "finish_reason": "stop"}], **more}))

    def script(self, request, number):
        if number == self.restart_at:
            self.restart()
        assert not self.paused
        return self.reply(request, number)

    def load_adapter(self, body, unseen):
        self.told.append(("adapter", body["lora_path"]))
        if not self.lora:
            return Misbehave(404, body='{"detail": "Not Found"}')
        if not self.sees(body["lora_path"]):
            return unseen
        assert body["lora_name"] not in self.adapters
        self.adapters[body["lora_name"]] = body["lora_path"]
        return {"success": True}


class Vllm(Weights):
    def route(self, path, body):
        if body is None:
            models = [{"id": self.started, "root": self.started, "parent": None, "owned_by": "vllm"}]
            models += [{"id": n, "root": p, "parent": self.started} for n, p in self.adapters.items()]
            found = {"/v1/models": {"data": models}, "/version": {"version": "0.32.0"}}
            config = {"vllm_config": {"device_config": {"device": self.device}}}
            opened = {"/weight_info": {"weight_version": self.version}, "/server_info?config_format=json": config}
            return (found | (opened if self.dev else {})).get(path)
        if path == "/v1/load_lora_adapter":
            return self.load_adapter(body, Misbehave(404, body='{"error": {"message": "No adapter found for <path>"}}'))
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return {}
        return self.control(path, body) if self.dev else None

    def control(self, path, body):
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path in ("/pause?mode=abort", "/resume"):
            self.paused = "pause" in path
        elif path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.told.append(("folder", body["kwargs"]["weights_path"]))
            if not self.sees(body["kwargs"]["weights_path"]):
                return Misbehave(500, body='{"error": {"message": "Worker failed with error \'Repo id must be\'"}}')
            self.folder = body["kwargs"]["weights_path"]
        elif path == "/reset_prefix_cache":
            self.cached.clear()
            return {"success": self.paused}
        return {"success": True}

    def reply(self, request, number):
        adapter = self.adapters.get(request["model"])
        if adapter is None and request["model"] != self.started:
            return Misbehave(404, body='{"error": {"message": "The model does not exist."}}')
        return self.answered(request, number, adapter)


class Sglang(Weights):
    def route(self, path, body):
        if path == "/v1/models":
            models = [{"id": self.started, "root": self.started, "owned_by": "sglang"}]
            return {"data": models + [{"id": n, "root": p, "parent": self.started} for n, p in self.adapters.items()]}
        if path == "/model_info":
            return {"model_path": self.folder, "weight_version": self.version}
        if path == "/load_lora_adapter":
            return self.load_adapter(body, Misbehave(400, body='{"success": false, "error_message": "No such file"}'))
        if path == "/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return {}
        if path == "/update_weights_from_disk":
            self.told.append(("folder", body["model_path"]))
            if not self.sees(body["model_path"]):
                return Misbehave(400, body='{"success": false, "message": "Failed to get weights iterator"}')
            assert body["abort_all_requests"]
            assert body["flush_cache"]
            self.cached.clear()
            self.folder, self.version = body["model_path"], body["weight_version"]
            return {"success": True, "message": "Succeeded to update model weights."}
        return None

    def reply(self, request, number):
        _, _, name = request["model"].partition(":")
        assert request.get("lora_path", "") == name
        if name and name not in self.adapters:
            return Misbehave(400, body=json.dumps({"message": f"adapters are not loaded: {{{name!r}}}"}))
        return self.answered(
            request, number, self.adapters.get(name), metadata={"weight_version": self.version}, model=request["model"]
        )


def serving(weights):
    return ScriptedEndpoint(weights.script, route=weights.route)


def drawn(policy, *endpoints, **fields):
    """Return the weights that each completion says it is of, all of them, and how many completions there are."""
    urls = tuple(endpoint.url for endpoint in endpoints)
    given = {"base_url": urls, "completions": 3, "timeout": 5.0, "patience": 5.0, "concurrency": 2, **fields}
    groups = Server(**given)(PROMPTS, context(policy))
    made = [completion for group in groups for completion in group.completions]
    assert len({c.completion_id for c in made}) == len({c.text for c in made}) == 18
    assert all(c.text.endswith(f" {c.seed}.") for c in made)
    return {re.sub(r" \d+\.$", "", c.text) for c in made}


def of_folder(policy):
    return {f" {Path(policy.path).resolve()}"}


def of_adapter(policy):
    return {f" {START.path} with {Path(policy.path).resolve() / 'adapter'}"}


@pytest.mark.parametrize("update", ["vllm", "auto"])
def test_vllm_gets_each_policy_once_by_adapter(policies, update):
    weights = Vllm(dev=False)
    with serving(weights) as endpoint:
        assert drawn(START, endpoint, update=update) == of_folder(START)
        assert weights.told == []
        for policy in policies:
            assert drawn(policy, endpoint, update=update) == of_adapter(policy)
            assert drawn(policy, endpoint, update=update) == of_adapter(policy)
        assert weights.told == [("adapter", str(Path(p.path).resolve() / "adapter")) for p in policies]
        assert len(weights.adapters) == 1  # the one of the round before is gone
        assert drawn(START, endpoint, update=update) == of_folder(START)


@pytest.mark.parametrize(("kind", "update"), [(Vllm, "vllm"), (Vllm, "auto"), (Sglang, "sglang"), (Sglang, "auto")])
def test_weights_are_exchanged_once_for_each_policy_and_put_back(policies, kind, update):
    weights = kind(lora=False)
    with serving(weights) as endpoint:
        for policy in (START, merged(policies[0]), policies[1], START):
            assert drawn(policy, endpoint, update=update) == of_folder(policy)
            assert drawn(policy, endpoint, update=update) == of_folder(policy)
        folders = [Path(p.path).resolve() for p in (*policies, START)]
    assert [told for told in weights.told if told[0] == "folder"] == [("folder", str(folder)) for folder in folders]
    assert not weights.paused


def test_sglang_gets_an_adapter(policies):
    weights = Sglang()
    with serving(weights) as endpoint:
        for policy in policies:
            assert drawn(policy, endpoint, update="sglang") == of_adapter(policy)
    assert [kind for kind, _ in weights.told] == ["adapter", "adapter"]


def test_an_adapter_is_not_put_onto_other_weights_than_its_base(policies):
    weights = Vllm()
    with serving(weights) as endpoint:
        assert drawn(merged(policies[0]), endpoint, update="vllm") == of_folder(policies[0])
        assert drawn(policies[1], endpoint, update="vllm") == of_folder(policies[1])
    assert weights.adapters == {}


@pytest.mark.parametrize("kind", [Vllm, Sglang])
@pytest.mark.parametrize("by_adapter", [True, False])
@pytest.mark.parametrize("after", [7, 17])
def test_a_restart_that_no_request_felt_is_noticed(policies, kind, by_adapter, after):
    policy = policies[0] if by_adapter else merged(policies[0])
    weights = kind()
    weights.restart_at = after  # it is back, with what it was started with, before the next request
    with serving(weights) as endpoint, serving(kind()) as other:
        assert drawn(policy, endpoint, other, update="auto") == (of_adapter if by_adapter else of_folder)(policy)
        if weights.restart_at < len(endpoint.requests):
            assert len(weights.told) in (1, 2)
        assert drawn(policy, endpoint, update="auto") == (of_adapter if by_adapter else of_folder)(policy)


@pytest.mark.parametrize("kind", [Vllm, Sglang])
def test_a_server_that_was_down_is_told_when_it_is_up(policies, kind):
    late = serving(kind())
    port = late.server.server_port
    late.server.server_close()
    weights = kind()

    def script(request, number):
        if number == 4:
            up.append(ScriptedEndpoint(weights.script, route=weights.route, port=port).start())
        return other.script(request, number)

    up, other = [], kind()
    with ScriptedEndpoint(script, route=other.route, delay=0.02) as endpoint:
        assert drawn(merged(policies[0]), late, endpoint, update="auto", concurrency=1) == of_folder(policies[0])
    up[0].stop()
    assert len(weights.told) == 1
    assert up[0].requests


@pytest.mark.parametrize("kind", [Vllm, Sglang])
def test_a_server_that_cannot_read_the_folder_stops_the_run(policies, kind):
    with (
        serving(kind(sees=lambda folder: False)) as endpoint,
        pytest.raises(
            SamplerError, match=r"sampler\.update: .* did not load /.*5-policy .*under this very path"
        ) as told,
    ):
        drawn(policies[0], endpoint, update="auto")
    assert str(Path(policies[0].path).resolve()) in str(told.value)
    assert endpoint.requests == []


def test_a_vllm_that_can_be_told_nothing_is_named_with_both_causes(policies):
    with serving(Vllm(dev=False, lora=False)) as endpoint:
        with pytest.raises(
            SamplerError, match=r"By adapter: HTTP 404.*--enable-lora.*By folder: .*VLLM_SERVER_DEV_MODE"
        ):
            drawn(policies[0], endpoint, update="vllm")
        with pytest.raises(SamplerError, match="By adapter: the policy has none"):
            drawn(merged(policies[0]), endpoint, update="vllm")


def test_a_vllm_that_would_keep_its_old_output_layer_is_not_given_weights(policies):
    weights = Vllm(device="cpu")
    with serving(weights) as endpoint:
        with pytest.raises(SamplerError, match=r"vLLM on a CPU, and .*5-policy has tied word embeddings: .*kind=vllm"):
            drawn(merged(policies[0]), endpoint, update="vllm")
        assert weights.told == []
        assert drawn(policies[0], endpoint, update="vllm") == of_adapter(policies[0])
        config = Path(policies[1].path, "config.json")
        config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
        assert drawn(merged(policies[1]), endpoint, update="vllm") == of_folder(policies[1])


def test_a_cache_that_keeps_old_keys_stops_the_run(policies):
    weights = Vllm()
    full = weights.control
    weights.control = lambda path, body: {"success": False} if path == "/reset_prefix_cache" else full(path, body)
    with serving(weights) as endpoint, pytest.raises(SamplerError, match="the prefix cache cannot be emptied"):
        drawn(merged(policies[0]), endpoint, update="vllm")
    assert endpoint.requests == []
    # What was left in the middle is not taken for loaded.
    weights.control, weights.paused = full, False
    with serving(weights) as endpoint:
        assert drawn(merged(policies[0]), endpoint, update="vllm") == of_folder(policies[0])


def test_completions_that_were_aborted_are_asked_for_again():
    first = []

    def script(request, number):
        if number == 0:
            first.append(request)
            return Misbehave(body='{"choices": [{"text": " cut", "finish_reason": "abort"}]}')
        return Vllm.reply(weights, request, number)

    weights = Vllm()
    with ScriptedEndpoint(script, route=weights.route) as endpoint:
        assert drawn(START, endpoint, update="vllm") == of_folder(START)
    assert sum(request["seed"] == first[0]["seed"] for request in endpoint.requests) == 2


def test_a_users_command_is_run_for_a_server_without_the_policy(policies, tmp_path):
    note, script = tmp_path / "folder served", tmp_path / "serve it.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('|'.join(sys.argv[2:]))")

    def route(path, body):
        return {"data": [{"id": note.read_text().split("|")[0] if note.exists() else START.path}]}

    def reply(request, number):
        return weights.answered({**request}, number, request["model"])

    weights = Weights()
    command = [sys.executable, str(script), str(note), "{path}", "{adapter}", "at {url}; $HOME"]
    with ScriptedEndpoint(reply, route=route) as endpoint:
        assert drawn(START, endpoint, update=tuple(command)) == {f" {START.path} with {START.path}"}
        assert not note.exists()
        folder = str(Path(policies[0].path).resolve())
        assert drawn(policies[0], endpoint, update=tuple(command)) == {f" {START.path} with {folder}"}
        assert note.read_text() == f"{folder}|{folder}/adapter|at {endpoint.url}; $HOME"
        with pytest.raises(SamplerError, match=r"sampler\.update: after .* does not list .*round-001/5-policy; it off"):
            drawn(policies[1], endpoint, update=(sys.executable, "-c", "pass"))
        with pytest.raises(SamplerError, match=r"ended with code 3: no room for /.*round-001/5-policy"):
            drawn(
                policies[1],
                endpoint,
                update=(
                    sys.executable,
                    "-c",
                    "import sys; print('no room for', sys.argv[1], file=sys.stderr); sys.exit(3)",
                    "{path}",
                ),
            )
        with pytest.raises(SamplerError, match="could not be run"):
            drawn(policies[1], endpoint, update=(str(tmp_path / "nothing"),))


@pytest.mark.parametrize("owner", ["sglang", "llamacpp"])
def test_a_server_that_answers_to_any_name_must_have_the_folder(policies, owner):
    def route(path, body):
        return {"data": [{"id": START.path, "owned_by": owner}]}

    weights = Weights()
    with ScriptedEndpoint(lambda r, n: weights.answered(r, n, None), route=route) as endpoint:
        assert drawn(START, endpoint) == of_folder(START)
        with pytest.raises(SamplerError, match=r"such a server answers for any name; .*sampler\.update"):
            drawn(policies[0], endpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"update": "vlm"}, r"sampler\.update .*must be none, auto, vllm, sglang, or a command"),
        ({"update": ()}, r"sampler\.update .*must be none"),
        ({"update": ("", "x")}, r"sampler\.update .*must be none"),
        ({"update": "vllm", "model": "big"}, r"sampler\.update .*must be none with model=big"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Server(**{"base_url": "http://127.0.0.1:1/v1", **fields})


def test_a_server_of_another_kind_is_told(policies):
    with serving(Vllm()) as endpoint, pytest.raises(ConfigError, match="is no SGLang server"):
        drawn(policies[0], endpoint, update="sglang")
