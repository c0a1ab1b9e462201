"""Sampling at an endpoint: whatever it returns and however it fails, a completion is the policy's or there is none."""

import json
import threading
import time
from dataclasses import replace
from functools import partial

import pytest

import prefloop.endpoint as endpoint_module
from prefloop.errors import ConfigError, SamplerError
from prefloop.inputs import embedded_policy
from prefloop.models.causal_lm import folder_digest, load
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.hf import Hf
from prefloop.sample.server import Server
from scripted_endpoint import Misbehave, ScriptedEndpoint

FOLDER = str(embedded_policy())
POLICY = PolicyRef(FOLDER, folder_digest(embedded_policy()), -1)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)
TOKENIZER = load(FOLDER).tokenizer
KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_DELAY", 0.01)


def prompt_of(*messages):
    return Prompt(prompt_id(messages), messages, None, "train", "here:1")


def story(text):
    return prompt_of(Message(VERBATIM, text))


STORIES = [story(f"Tom had {n} dogs. He") for n in range(6)]
CHAT = prompt_of(Message("system", "Be brief."), Message("user", "Tom had a dog."))


def answer(choices, **more):
    return Misbehave(body=json.dumps({"choices": choices, **more}))


def said(request, seed=None):
    """The text of a server whose completions depend on prompt and seed only."""
    asked = request.get("prompt") or request["messages"][-1]["content"]
    return f" ran {asked.split()[2] if 'prompt' in request else 'home'} times, {seed or request['seed']} miles."


def ids_of(text):
    return [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]


def like_vllm(request, number):
    """Answers as vLLM does, log-probs of -0.5 a token."""
    chat = "messages" in request
    made = []
    for index in range(request.get("n", 1)):
        text = said(request, request["seed"] + index)
        ids = ids_of(text)
        names = [f"token_id:{i}" for i in ids]
        found = {"finish_reason": "stop", "index": index}
        if request.get("return_token_ids"):
            found["token_ids"] = ids
        if chat:
            found["logprobs"] = {"content": [{"token": name, "logprob": -0.5} for name in names]}
            found["message"] = {"role": "assistant", "content": text}
        else:
            found |= {"text": text, "logprobs": {"tokens": names, "token_logprobs": [-0.5] * len(ids)}}
        made.append(found)
    if chat:
        ours = TOKENIZER.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False)
        return answer(made, prompt_token_ids=list(ours))
    made[0]["prompt_token_ids"] = TOKENIZER(request["prompt"])["input_ids"]
    return answer(made)


def bare(request, number):
    """Answers with text only."""
    if "messages" in request:
        return answer([{"finish_reason": "stop", "message": {"content": said(request)}}])
    return answer([{"finish_reason": "stop", "text": said(request)}])


def server(*endpoints, **fields):
    urls = tuple(endpoint.url for endpoint in endpoints)
    return Server(**{"base_url": urls, "completions": 3, "timeout": 5.0, "patience": 5.0, **fields})


SERVED = (FOLDER,)


def test_completions_come_with_the_servers_ids_and_log_probs():
    with ScriptedEndpoint(like_vllm, models=SERVED) as endpoint:
        groups = server(endpoint, stop=("THE END",), temperature=0.7, top_p=0.9)([*STORIES, CHAT], CONTEXT)
    assert [group.prompt for group in groups] == [*STORIES, CHAT]
    assert [(g.policy, g.round, g.temperature, g.top_p) for g in groups] == [(POLICY.digest, 0, 0.7, 0.9)] * 7
    for group in groups:
        assert len({c.completion_id for c in group.completions}) == len({c.seed for c in group.completions}) == 3
        for c in group.completions:
            assert str(c.seed) in c.text
            assert c.token_ids == tuple(ids_of(c.text))
            assert c.sampler_logps == (-0.5,) * len(c.token_ids)
            assert (c.finish_reason, c.source) == ("stop", POLICY.digest)
    assert {(r["model"], r["temperature"], r["top_p"], r["max_tokens"]) for r in endpoint.requests} == {
        (FOLDER, 0.7, 0.9, 256)
    }
    assert all(r["stop"] == ["THE END"] for r in endpoint.requests)
    assert sum("messages" in r for r in endpoint.requests) == 3
    assert len(endpoint.requests) == 21


def test_neither_concurrency_nor_the_number_of_endpoints_changes_a_completion():
    with ScriptedEndpoint(like_vllm, models=SERVED) as one, ScriptedEndpoint(like_vllm, models=SERVED) as two:
        first = server(one)(STORIES, CONTEXT)
        assert server(one, two, concurrency=2)(STORIES, CONTEXT) == first
        assert min(len(one.requests) - 18, len(two.requests)) > 3
        assert server(one)(STORIES[::-1], CONTEXT) == first[::-1]
        other = server(one)(STORIES, replace(CONTEXT, round=1))
    assert {c.seed for g in other for c in g.completions}.isdisjoint(c.seed for g in first for c in g.completions)


def test_n_is_asked_for_at_once_and_what_is_missing_again():
    with ScriptedEndpoint(like_vllm, models=SERVED) as endpoint:
        groups = server(endpoint, completions=5, per_request=3)(STORIES[:1], CONTEXT)
        assert sorted(r.get("n", 1) for r in endpoint.requests) == [2, 3]
    assert len({c.text for c in groups[0].completions}) == 5
    with ScriptedEndpoint(lambda r, n: like_vllm({**r, "n": 1}, n), models=SERVED) as endpoint:
        groups = server(endpoint, completions=3, per_request=3)(STORIES[:1], CONTEXT)
        assert [r.get("n", 1) for r in endpoint.requests] == [3, 2, 1]
    assert len({c.text for c in groups[0].completions}) == 3


@pytest.mark.parametrize("known", [("return_tokens_as_token_ids", "logprobs"), ("logprobs",), ()])
def test_a_server_that_knows_less_is_asked_for_less(known):
    beyond = {"return_token_ids", "return_tokens_as_token_ids", "logprobs"} - set(known)

    def script(request, number):
        if beyond & set(request):
            return Misbehave(422, body='{"detail": "Unexpected fields in the request"}')
        return bare(request, number)

    with ScriptedEndpoint(script, models=SERVED) as endpoint:
        groups = server(endpoint, concurrency=1)([*STORIES, CHAT], CONTEXT)
        # The first request finds out, the others know.
        assert len(endpoint.requests) == 21 + (2 if not known else 1)
    assert {(c.token_ids, c.sampler_logps) for g in groups for c in g.completions} == {(None, None)}


def test_two_requests_may_find_out_at_once_what_a_server_knows():
    both = threading.Barrier(2)

    def script(request, number):
        if "return_token_ids" not in request:
            return bare(request, number)
        late = both.wait(timeout=30)  # neither is answered before both have asked
        return Misbehave(422, delay=0.3 if late else 0.0)  # when it comes, the other one has got its text

    with ScriptedEndpoint(script, models=SERVED) as endpoint:
        (group,) = server(endpoint, completions=2, concurrency=2)(STORIES[:1], CONTEXT)
        assert sum("return_token_ids" in request for request in endpoint.requests) == 2
    assert len({c.text for c in group.completions}) == 2


def test_ids_are_read_from_tokens_named_by_them_and_never_guessed_from_text():
    def named(request, number):
        return like_vllm({name: value for name, value in request.items() if name != "return_token_ids"}, number)

    def spelt(request, number):
        text = said(request)
        pieces = TOKENIZER.convert_ids_to_tokens(ids_of(text))
        logprobs = {"tokens": pieces, "token_logprobs": [-0.5] * len(pieces)}
        return answer([{"text": text, "finish_reason": "stop", "logprobs": logprobs}])

    with ScriptedEndpoint(named, models=SERVED) as endpoint:
        (group,) = server(endpoint)(STORIES[:1], CONTEXT)
        assert all(c.token_ids == tuple(ids_of(c.text)) for c in group.completions)
    with ScriptedEndpoint(spelt, models=SERVED) as endpoint:
        (group,) = server(endpoint)(STORIES[:1], CONTEXT)
        assert {(c.token_ids, c.sampler_logps) for c in group.completions} == {(None, None)}


def changed(request, number, **fields):
    body = json.loads(like_vllm(request, number).body)
    body["choices"][0] |= fields
    return Misbehave(body=json.dumps(body))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": [1, 5, 9]}, "another chat template or tokenizer"),
        ({"token_ids": ids_of(" was quite another.")}, "it serves another model"),
    ],
)
def test_ids_that_are_not_the_policys_stop_the_run(fields, message):
    with (
        ScriptedEndpoint(partial(changed, **fields), models=SERVED) as endpoint,
        pytest.raises(SamplerError, match=message),
    ):
        server(endpoint)(STORIES[:1], CONTEXT)


@pytest.mark.parametrize("logprobs", [None, {"tokens": [], "token_logprobs": [-1.0]}, {"token_logprobs": [None, -1.0]}])
def test_ids_stay_where_log_probs_are_missing(logprobs):
    with ScriptedEndpoint(partial(changed, logprobs=logprobs), models=SERVED) as endpoint:
        (group,) = server(endpoint)(STORIES[:1], CONTEXT)
    assert all(c.token_ids and c.sampler_logps is None for c in group.completions)


def test_a_prompt_leaves_room_for_fewer_tokens_or_for_none():
    long = story("dog " * 500)
    used = len(TOKENIZER(long.text)["input_ids"])
    assert used < 512
    with ScriptedEndpoint(bare, models=SERVED) as endpoint:
        server(endpoint)([long], CONTEXT)
        assert {r["max_tokens"] for r in endpoint.requests} == {512 - used}
        with pytest.raises(SamplerError, match="no room is left"):
            server(endpoint)([story("dog " * 600)], CONTEXT)


def test_a_fixed_model_is_another_one_than_the_policy():
    with ScriptedEndpoint(like_vllm, models=("big",)) as endpoint:
        (group,) = server(endpoint, model="big")(STORIES[:1], CONTEXT)
        assert {(c.token_ids, c.sampler_logps, c.source) for c in group.completions} == {(None, None, "big")}
        assert group.policy == "big"
        with pytest.raises(ConfigError, match="held-out prompts would measure it"):
            server(endpoint, model="big")(STORIES, replace(CONTEXT, round=-1))
        with pytest.raises(ConfigError, match=r"sampler\.model: .* has no 'bigger'; it offers big"):
            server(endpoint, model="bigger")(STORIES, CONTEXT)
        assert len(endpoint.requests) == 3


def answered_once(requests):
    """Whether each completion was answered once; `requests` are those that got an answer."""
    asked = [(r["prompt"], r["seed"]) for r in requests]
    return len(set(asked)) == len(asked)


@pytest.mark.parametrize("failure", [Misbehave(cut=7, body='{"choices": []}'), Misbehave(503), Misbehave(429)])
def test_a_failing_endpoint_is_covered_by_the_other_and_nothing_is_asked_twice(failure):
    given = []

    def script(request, number, fails):
        if fails and number >= 3:
            return failure
        given.append(request)
        return like_vllm(request, number)

    with ScriptedEndpoint(like_vllm, models=SERVED) as whole:
        right = server(whole)(STORIES, CONTEXT)
    with (
        ScriptedEndpoint(partial(script, fails=True), models=SERVED, delay=0.01) as one,
        ScriptedEndpoint(partial(script, fails=False), models=SERVED, delay=0.01) as two,
    ):
        assert server(one, two, concurrency=2)(STORIES, CONTEXT) == right
    assert len(given) == 18
    assert answered_once(given)


def test_a_server_that_is_restarted_goes_on_where_it_was():
    given, dead = [], threading.Event()

    def script(request, number):
        given.append(request)
        return like_vllm(request, number)

    def mortal(request, number):
        return Misbehave(cut=1) if dead.is_set() else script(request, number)

    endpoint = ScriptedEndpoint(mortal, models=SERVED, delay=0.02).start()
    again = []

    def restart():
        while len(given) < 5:
            time.sleep(0.005)
        dead.set()  # connections that are open, and below the door for new ones
        endpoint.stop()
        time.sleep(0.3)
        again.append(ScriptedEndpoint(script, models=SERVED, port=endpoint.server.server_port).start())

    thread = threading.Thread(target=restart)
    thread.start()
    groups = server(endpoint, concurrency=2)(STORIES, CONTEXT)
    thread.join()
    again[0].stop()
    assert 0 < len(again[0].requests) < 18
    assert len({c.text for g in groups for c in g.completions}) == 18
    assert len(given) == 18
    assert answered_once(given)


def test_a_busy_server_is_waited_for_beyond_the_retries():
    def script(request, number):
        return Misbehave(429) if number < 8 else like_vllm(request, number)

    with ScriptedEndpoint(script, models=SERVED) as endpoint:
        (group,) = server(endpoint, retries=0, completions=1)(STORIES[:1], CONTEXT)
        assert len(endpoint.requests) == 9
    with (
        ScriptedEndpoint(lambda request, number: Misbehave(429, {"Retry-After": "3600"}), models=SERVED) as endpoint,
        pytest.raises(SamplerError, match=r"no endpoint has answered for 0\.1 s .*HTTP 429"),
    ):
        server(endpoint, patience=0.1)(STORIES[:1], CONTEXT)
    assert group.completions[0].token_ids


def test_patience_ends():
    with ScriptedEndpoint(like_vllm) as endpoint:
        pass
    began = time.monotonic()
    with pytest.raises(SamplerError, match=r"no endpoint has answered for 0\.2 s \(http://127.*same command"):
        server(endpoint, patience=0.2)(STORIES, CONTEXT)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("failure", [Misbehave(500), Misbehave(body="nonsense"), Misbehave(body='{"choices": []}')])
def test_a_request_that_always_fails_does_not_run_forever(failure):
    def script(request, number):
        return failure if "3 dogs" in request["prompt"] else like_vllm(request, number)

    with (
        ScriptedEndpoint(script, models=SERVED) as endpoint,
        pytest.raises(SamplerError, match=r"fails after 3 attempts for the prompt that ends in 'Tom had 3 dogs\. He'"),
    ):
        server(endpoint, retries=2)(STORIES, CONTEXT)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "refuses the prompt that begins"),
        (404, r"sampler\.model: .* does not answer for .*; it offers .*serve it, for example with vllm serve"),
        (401, r"sampler\.api_key_env: .* refuses the key in MY_KEY"),
    ],
)
def test_a_refusal_is_told_at_once_and_without_the_key(monkeypatch, status, message):
    monkeypatch.setenv("MY_KEY", KEY)
    refusal = Misbehave(status, body=f'{{"error": {{"message": "no {KEY}"}}}}')
    with ScriptedEndpoint(lambda request, number: refusal, models=("other",)) as endpoint:
        with pytest.raises(SamplerError, match=message) as told:
            server(endpoint, api_key_env="MY_KEY", concurrency=1)(STORIES, CONTEXT)
        assert len(endpoint.requests) <= 3  # one; 400 may also mean that too much was asked for
    assert KEY not in str(told.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": ()}, r"sampler\.base_url"),
        ({"base_url": "127.0.0.1:8000"}, r"sampler\.base_url: must be like"),
        ({"base_url": "http://me:secret@here/v1"}, r"holds a key or password; .*sampler\.api_key_env"),
        ({"model": " "}, r"sampler\.model"),
        ({"completions": 0}, r"sampler\.completions"),
        ({"per_request": 0}, r"sampler\.per_request"),
        ({"temperature": -1.0}, r"sampler\.temperature"),
        ({"top_p": 0.0}, r"sampler\.top_p"),
        ({"stop": ("",)}, r"sampler\.stop"),
        ({"timeout": 0.0}, r"sampler\.timeout"),
        ({"patience": -1.0}, r"sampler\.patience"),
        ({"retries": -1}, r"sampler\.retries"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, r"sampler\.api_key_env: the environment variable NOT_SET"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Server(**{"base_url": "http://127.0.0.1:1/v1", **fields})


def test_a_greedy_server_is_told(caplog):
    with ScriptedEndpoint(lambda r, n: answer([{"text": " so.", "finish_reason": "stop"}]), models=SERVED) as endpoint:
        server(endpoint)(STORIES, CONTEXT)
        assert "do_sample" in caplog.text
        caplog.clear()
        server(endpoint, temperature=0.0)(STORIES, CONTEXT)
        assert not caplog.text


def sampled_here(request, number, temperature):
    """Answers with the policy itself, and with log-probs tilted by a temperature; `None`: with text only."""
    prompt = story(request["prompt"])
    (group,) = Hf(completions=1, max_new_tokens=8)([prompt], replace(CONTEXT, seed=request["seed"]))
    (c,) = group.completions
    if temperature is None:
        return answer([{"text": c.text, "finish_reason": c.finish_reason}])
    logps = [logp / temperature for logp in c.sampler_logps]
    logprobs = {"tokens": ["?"] * len(logps), "token_logprobs": logps}
    return answer(
        [{"text": c.text, "finish_reason": c.finish_reason, "token_ids": list(c.token_ids), "logprobs": logprobs}]
    )


@pytest.mark.parametrize(("temperature", "source"), [(1.0, "sampler"), (0.5, "computed"), (None, "computed")])
def test_the_trainer_measures_the_servers_log_probs_before_it_uses_them(tmp_path, temperature, source):
    """The reference's log-probs are the server's where these agree with ours, and ours where they do not."""
    from prefloop.artifact import load_artifact  # noqa: PLC0415 - only this test runs a loop
    from prefloop.launch import read_recipe  # noqa: PLC0415
    from prefloop.loop import run  # noqa: PLC0415
    from prefloop.rows import TokenizedPair  # noqa: PLC0415

    script = partial(sampled_here, temperature=temperature)
    settings = ["rounds=1", "prompts_per_round=12", "evaluate.prompts=4", "gate.kind=always", "prompts.limit=120"]
    sampling = ["sampler={kind: server, completions: 4, concurrency: 2}", "eval_sampler={kind: hf, max_new_tokens: 8}"]
    with ScriptedEndpoint(script, models=SERVED) as endpoint:
        recipe, _ = read_recipe("iterative_dpo", [*settings, *sampling, f"sampler.base_url={endpoint.url}"])
        run(recipe, tmp_path)
    facts = load_artifact(tmp_path / "round-000" / "4-batches", TokenizedPair).facts
    assert facts["reference_logps"] == source
    if temperature is not None:
        assert (facts["sampler_gap"] < 1e-3) == (source == "sampler")
