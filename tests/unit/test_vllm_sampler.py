"""The vLLM sampler against a stand-in with vLLM 0.32's signatures; what the real one does is in docs/servers.md."""

import importlib.machinery
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefloop.errors import ConfigError, SamplerError
from prefloop.inputs import embedded_policy
from prefloop.models import causal_lm
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample import _vllm_engine
from prefloop.sample.hf import Hf
from prefloop.sample.vllm import Vllm

FOLDER = str(embedded_policy())
POLICY = PolicyRef(FOLDER, causal_lm.folder_digest(embedded_policy()), -1)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)


def prompt_of(text, role=VERBATIM):
    messages = (Message(role, text),)
    return Prompt(prompt_id(messages), messages, None, "train", "here:1")


PROMPTS = [prompt_of("Tom had a dog. He"), prompt_of("Mia saw a big"), prompt_of("Tom had a dog. He", role="user")]


@dataclass
class SamplingParams:
    """The fields of vLLM's that are used, with its defaults; another one is an error, as there."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None


class LLM:
    """Loads a folder and generates, one request after the other. `made` are all of them."""

    made: "list[LLM]" = []  # noqa: RUF012  every test begins with none
    trouble: "list[BaseException]" = []  # noqa: RUF012
    finish: str | None = None

    def __init__(self, model: str, *, dtype="auto", trust_remote_code=False, seed=0, gpu_memory_utilization=0.92,
                 tensor_parallel_size=1, enforce_eager=False, **kwargs: Any) -> None:  # fmt: skip
        if not (Path(model) / "config.json").is_file():
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        self.arguments = {"dtype": dtype, "memory": gpu_memory_utilization, "gpus": tensor_parallel_size, **kwargs}
        self.model, self.running, self.calls = model, True, 0
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self.shutdown))
        LLM.made.append(self)

    def shutdown(self, timeout: float | None = None) -> None:
        self.running = False

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert self.running
        assert not use_tqdm
        self.calls += 1
        if LLM.trouble:
            raise LLM.trouble.pop()
        lm = causal_lm._load_model(Path(self.model), torch.float32).eval()
        tokenizer = causal_lm.load_tokenizer(Path(self.model))
        pairs = zip(prompts, sampling_params, strict=True)
        return [types.SimpleNamespace(outputs=[self.one(lm, tokenizer, p["prompt_token_ids"], s)]) for p, s in pairs]

    @torch.inference_mode()
    def one(self, lm, tokenizer, prompt, params):
        assert params.logprobs == 0
        stream = torch.Generator().manual_seed(params.seed)
        ids, logps, reason = [], [], "length"
        while len(ids) < params.max_tokens and reason == "length":
            row = lm(torch.tensor([[*prompt, *ids]])).logits[0, -1].log_softmax(-1)
            scaled = (row / params.temperature).softmax(-1) if params.temperature else None
            token = int(row.argmax() if scaled is None else scaled.multinomial(1, generator=stream))
            ids.append(token)
            logps.append({token: types.SimpleNamespace(logprob=float(row[token]))})
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if token in params.stop_token_ids or any(string in text for string in params.stop):
                reason = "stop"
        return types.SimpleNamespace(
            token_ids=ids, logprobs=logps, finish_reason=LLM.finish or reason, text="is made of the ids"
        )


class EngineDeadError(Exception):
    """vLLM's is no RuntimeError either."""


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    library = types.ModuleType("vllm")
    library.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    library.LLM, library.SamplingParams, library.__version__ = LLM, SamplingParams, "0.32.0"
    errors = types.ModuleType("vllm.v1.engine.exceptions")
    errors.EngineDeadError = EngineDeadError
    monkeypatch.setitem(sys.modules, "vllm", library)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", errors)
    for name in _vllm_engine.ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    LLM.made, LLM.trouble, LLM.finish = [], [], None
    causal_lm.forget()
    yield library
    _vllm_engine.drop()
    causal_lm.forget()


@pytest.mark.parametrize("fields", [{}, {"stop": ("dog", "r")}, {"max_new_tokens": 60}])
def test_greedy_completions_are_those_of_the_other_sampler(fields):
    fields = {"completions": 2, "max_new_tokens": 8, "temperature": 0.0, **fields}
    ours, theirs = Vllm(**fields)(PROMPTS, CONTEXT), Hf(**fields)(PROMPTS, CONTEXT)
    for a, b in zip(ours, theirs, strict=True):
        assert replace(a, completions=()) == replace(b, completions=())
        for one, other in zip(a.completions, b.completions, strict=True):
            assert replace(one, sampler_logps=None) == replace(other, sampler_logps=None)
            assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-4)
    if "max_new_tokens" in fields and fields["max_new_tokens"] == 60:
        assert {c.finish_reason for g in ours for c in g.completions} <= {"stop", "length"}


def test_each_completion_has_a_stream_of_its_own():
    sampler = Vllm(completions=3, max_new_tokens=8)
    groups = sampler(PROMPTS, CONTEXT)
    assert len({c.seed for g in groups for c in g.completions}) == 9
    assert sampler(PROMPTS[::-1], CONTEXT) == groups[::-1]
    assert sampler(PROMPTS, replace(CONTEXT, round=1)) != groups


def test_an_engine_serves_the_parts_of_a_stage_and_ends_before_another_model_is_loaded(tmp_path):
    other = tmp_path / "other"
    other.symlink_to(FOLDER)
    sampler = Vllm(completions=1, max_new_tokens=2)
    sampler(PROMPTS[:1], CONTEXT)
    sampler(PROMPTS[1:2], CONTEXT)
    replace(sampler, temperature=0.5)(PROMPTS[:1], CONTEXT)
    assert [(llm.calls, llm.running) for llm in LLM.made] == [(3, True)]
    sampler(PROMPTS[:1], replace(CONTEXT, policy=replace(POLICY, digest="another")))
    assert [(llm.calls, llm.running) for llm in LLM.made] == [(3, False), (1, True)]
    replace(sampler, context=64)(PROMPTS[:1], replace(CONTEXT, policy=replace(POLICY, digest="another")))
    assert [llm.running for llm in LLM.made] == [False, False, True]
    causal_lm.load(FOLDER, cache=False)  # to train it
    assert not any(llm.running for llm in LLM.made)
    sampler(PROMPTS[:1], CONTEXT)
    assert len(LLM.made) == 4


def test_vllm_is_asked_for_the_policys_own_weights_and_nothing_unsafe():
    sampler = Vllm(completions=1, max_new_tokens=2, memory=0.4, gpus=2, context=100, precision="bf16")
    sampler(PROMPTS[:1], CONTEXT)
    assert LLM.made[0].model == str(Path(FOLDER).resolve())
    assert LLM.made[0].arguments == {
        "dtype": "bfloat16",
        "memory": 0.4,
        "gpus": 2,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "max_model_len": 100,
    }


def test_a_prompt_leaves_room_for_fewer_tokens_or_for_none():
    used = len(causal_lm.encode_prompt(causal_lm.load_tokenizer(Path(FOLDER)), PROMPTS[0]))
    (group,) = Vllm(completions=1, max_new_tokens=50, context=used + 3)(PROMPTS[:1], CONTEXT)
    assert len(group.completions[0].token_ids) == 3
    with pytest.raises(SamplerError, match=r"prompt .*no room is left"):
        Vllm(context=used)(PROMPTS[:1], CONTEXT)
    with pytest.raises(SamplerError, match="takes text only"):
        Vllm()([replace(PROMPTS[0], media=("a.png",))], CONTEXT)


def test_without_the_package_it_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(_vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vllm.* is not installed: pip install 'prefloop\[vllm\]'"):
        Vllm()


def test_a_package_for_another_machine_is_told(monkeypatch):
    sampler = Vllm()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="the package vllm cannot be imported"):
        sampler(PROMPTS, CONTEXT)


def test_a_policy_that_it_cannot_load_is_named(monkeypatch):
    def refuse(*arguments, **more):
        raise ValueError("Model architectures ['X'] are not supported for now.\nmore")

    monkeypatch.setattr(LLM, "__init__", refuse)
    with pytest.raises(
        SamplerError, match=r"vllm 0\.32\.0 cannot load .*\['X'\] are not supported for now\.;.*kind=hf"
    ):
        Vllm()(PROMPTS, CONTEXT)


@pytest.mark.parametrize("error", [EngineDeadError("died"), ValueError("too long"), RuntimeError("cancelled")])
def test_an_engine_that_fails_stops_the_run_and_is_not_used_again(error):
    sampler = Vllm(completions=1, max_new_tokens=2)
    LLM.trouble.append(error)
    with pytest.raises(SamplerError, match=r"vllm failed .*the same command goes on"):
        sampler(PROMPTS, CONTEXT)
    assert not LLM.made[0].running
    assert len(sampler(PROMPTS, CONTEXT)) == 3


def test_a_completion_that_was_given_up_is_none():
    LLM.finish = "abort"
    with pytest.raises(SamplerError, match=r"ended the completion of prompt .* as 'abort'"):
        Vllm(completions=1, max_new_tokens=2)(PROMPTS, CONTEXT)


@pytest.mark.parametrize(
    "fields",
    [
        *({"completions": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}),
        *({"stop": ("",)}, {"precision": "fp8"}, {"context": 1}, {"memory": 0.0}, {"memory": 1.1}, {"gpus": 0}),
    ],
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError, match=rf"sampler\.{next(iter(fields))} \(sample/vllm\.py\)"):
        Vllm(**fields)
