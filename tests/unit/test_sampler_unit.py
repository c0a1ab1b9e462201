"""The in-process sampler: fields, ends, limits, errors."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from prefloop.errors import ConfigError, SamplerError
from prefloop.models import causal_lm
from prefloop.protocols import RoundContext, Sampler
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, digest_of, prompt_id
from prefloop.sample.hf import Hf, row_uniforms, stream_seed


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def _nothing_kept():
    causal_lm.forget()
    yield
    causal_lm.forget()


def prompt_of(text: str, role: str = VERBATIM) -> Prompt:
    messages = (Message(role, text),)
    return Prompt(prompt_id(messages), messages, None, "train", "prompts.jsonl:3")


def context_of(folder: Path, seed: int = 0, round_: int = 0) -> RoundContext:
    ref = PolicyRef(str(folder), "0123456789abcdef", round_)
    return RoundContext(seed, round_, ref, ref)


def always(folder: Path, script: str, then: int = 2) -> Path:
    """Make the policy say `script` byte by byte, then the token `then`, whatever the prompt: position decides."""
    tokenizer = tiny.byte_tokenizer()
    ids = [*causal_lm.encode_completion(tokenizer, script, stop=False), then]
    model = tiny.tiny_model("gpt2", tiny.BYTE_VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        # Position p is the direction d_p; token t answers to d_p when t is what follows at p.
        directions = torch.nn.functional.one_hot(torch.arange(32), 32).float()
        directions = directions - directions.mean(-1, keepdim=True)
        for position in range(128):
            model.transformer.wpe.weight[position] = directions[position % 32] * 1e4
        for position, token in enumerate(ids):
            model.transformer.wte.weight[token] += directions[position]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def only(folder: Path, prompt: Prompt, sampler: Hf) -> Completion:
    (group,) = sampler([prompt], context_of(folder))
    return group.completions[0]


# Fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completions", 0),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
        ("batch", 0),
        ("precision", "fp8"),
    ],
)
def test_a_field_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^sampler.{field} \(sample/hf.py\): must be .*got .*; set sampler.{field}"):
        Hf(**{field: value})


def test_it_is_a_sampler_and_says_so() -> None:
    sampler: Sampler = Hf()
    assert (sampler.completions, sampler.max_new_tokens, sampler.temperature, sampler.top_p) == (4, 256, 1.0, 1.0)


# Records


def test_groups_are_complete_records(policy: Path) -> None:
    prompts = [prompt_of("one"), prompt_of("hi", "user"), prompt_of("one more")]
    context = context_of(policy, seed=5, round_=2)
    groups = Hf(completions=3, max_new_tokens=6, temperature=0.9, top_p=0.8)(prompts, context)
    assert [group.prompt for group in groups] == prompts
    ids = set()
    for group in groups:
        assert (group.policy, group.round, group.temperature, group.top_p) == ("0123456789abcdef", 2, 0.9, 0.8)
        assert len(group.completions) == 3
        for index, completion in enumerate(group.completions):
            where = (2, group.prompt.prompt_id, index)
            assert completion.completion_id == digest_of("0123456789abcdef", *where)
            assert completion.seed == stream_seed(5, *where)
            assert completion.source == "0123456789abcdef"
            assert completion.token_ids is not None
            assert completion.sampler_logps is not None
            assert 1 <= len(completion.token_ids) == len(completion.sampler_logps) <= 6
            assert all(logp <= 0 for logp in completion.sampler_logps)
            ids.add(completion.completion_id)
    assert len(ids) == 9


def test_no_prompts_no_groups(policy: Path) -> None:
    assert Hf()([], context_of(policy)) == []


def test_seed_and_round_change_the_draw(policy: Path) -> None:
    sampler = Hf(completions=1, max_new_tokens=12)
    drawn = {
        sampler([prompt_of("x")], context_of(policy, seed, round_))[0].completions[0].token_ids
        for seed, round_ in itertools.product((0, 1), (0, 1))
    }
    assert len(drawn) == 4
    assert sampler([prompt_of("x")], context_of(policy)) == sampler([prompt_of("x")], context_of(policy))


def test_the_shared_model_is_left_as_it_was(policy: Path) -> None:
    model = causal_lm.load(str(policy)).model
    Hf(completions=1, max_new_tokens=2)([prompt_of("x")], context_of(policy))
    assert model.config._attn_implementation == "sdpa"
    assert causal_lm.load(str(policy)).model is model


def test_streams() -> None:
    seeds = {stream_seed(*place) for place in itertools.product((0, 1), (0, 1), ("a", "b"), (0, 1))}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert (row_uniforms(7, 5) == row_uniforms(7, 50)[:5]).all()


# Ends


def test_a_completion_ends_with_the_end_token(tmp_path: Path) -> None:
    completion = only(always(tmp_path, "yes"), prompt_of(""), Hf(completions=1, temperature=0))
    assert (completion.text, completion.finish_reason) == ("yes", "stop")
    assert completion.token_ids is not None
    assert completion.token_ids[-1] == 2
    assert len(completion.token_ids) == 4


def test_a_beginning_of_sequence_token_ends_it_too(tmp_path: Path) -> None:
    completion = only(always(tmp_path, "yes", then=1), prompt_of(""), Hf(completions=1, temperature=0))
    assert (completion.text, completion.finish_reason) == ("yes", "stop")
    assert completion.token_ids is not None
    assert completion.token_ids[-1] == 1


def test_an_end_token_that_is_not_special_is_no_text(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    (full_stop,) = causal_lm.encode_completion(tokenizer, ".", stop=False)
    folder = always(tmp_path, "yes.no")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [2, {full_stop}]}}')
    completion = only(folder, prompt_of(""), Hf(completions=1, temperature=0))
    assert (completion.text, completion.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("two",), "one two"),
        (("wo th", "e"), "one"),
        ((" three four five",), "one two three four five"),
        (("x", "six"), "one two three four five six"),
        (("never",), "one two three four five six"),
        (("é!",), "one two three four five six"),
    ],
)
def test_a_stop_string_ends_it_after_the_token_that_completes_it(
    stop: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    folder = always(tmp_path, "one two three four five six")
    completion = only(folder, prompt_of(""), Hf(completions=1, temperature=0, stop=stop))
    assert completion.text == text
    assert completion.finish_reason == "stop"
    assert completion.token_ids is not None
    assert len(completion.token_ids) == len(text) + (text.endswith("six") and "six" not in stop and "x" not in stop)


def test_a_stop_string_of_the_prompt_does_not_count(tmp_path: Path) -> None:
    completion = only(always(tmp_path, "yes"), prompt_of(""), Hf(completions=1, temperature=0, stop=("[", "y")))
    assert completion.text == "y"


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 17])
def test_a_completion_ends_at_its_limit(limit: int, tmp_path: Path) -> None:
    folder = always(tmp_path, "one two three four five six")
    completion = only(folder, prompt_of(""), Hf(completions=1, temperature=0, max_new_tokens=limit))
    assert (completion.text, completion.finish_reason) == ("one two three four five six"[:limit], "length")
    assert completion.token_ids is not None
    assert len(completion.token_ids) == limit


# Lengths


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_model_s_own_length_is_kept(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save_tiny_policy(tmp_path, architecture)
    prompts = [prompt_of("x" * n) for n in (3, 90, 120, 126)]
    groups = Hf(completions=2, max_new_tokens=60, temperature=1.5)(prompts, context_of(folder))
    for group, room in zip(groups, (60, 37, 7, 1), strict=True):
        for completion in group.completions:
            assert completion.token_ids is not None
            assert len(completion.token_ids) <= room
            assert (len(completion.token_ids) == room) or completion.finish_reason == "stop"


def test_a_prompt_without_room(policy: Path) -> None:
    prompt = prompt_of("x" * 127)
    with pytest.raises(
        SamplerError, match=rf"{prompt.prompt_id} \(prompts.jsonl:3\): 128 tokens.* takes 128 .*shorten"
    ):
        Hf()([prompt], context_of(policy))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    tiny.tiny_model("llama", vocabulary=64).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        SamplerError, match=r"token id \d+, but the policy knows 64 tokens; .*another model's tokenizer"
    ):
        Hf()([prompt_of("zz")], context_of(tmp_path))


def test_a_model_without_a_key_value_cache(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=tiny.BYTE_VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"mamba models keep no key-value cache.*; choose another policy"):
        Hf()([prompt_of("x")], context_of(tmp_path))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_policy(temperature: float, bad: float, tmp_path: Path) -> None:
    folder = tiny.save_tiny_policy(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SamplerError, match=r"logits are not finite .*prompts.jsonl:3.*use another policy"):
        Hf(completions=2, max_new_tokens=12, temperature=temperature)([prompt_of("x")], context_of(folder))


# Prompts


def test_a_chat_prompt_has_one_beginning(policy: Path) -> None:
    """The completion follows the template's own text: the same as after that text given verbatim."""
    sampler = Hf(completions=1, max_new_tokens=10, temperature=0)
    chat = only(policy, prompt_of("hi", "user"), sampler)
    assert chat.token_ids == only(policy, prompt_of("[user]hi[assistant]"), sampler).token_ids


def test_bfloat16_runs(policy: Path) -> None:
    sampler = Hf(completions=2, max_new_tokens=10, precision="bf16")
    prompts = [prompt_of("x"), prompt_of("longer")]
    assert sampler(prompts, context_of(policy)) == sampler(prompts, context_of(policy))


def test_a_batch_smaller_than_a_group(policy: Path) -> None:
    small = Hf(completions=5, max_new_tokens=10, batch=2)([prompt_of("x")], context_of(policy))
    large = Hf(completions=5, max_new_tokens=10)([prompt_of("x")], context_of(policy))
    assert [c.token_ids for c in small[0].completions] == [c.token_ids for c in large[0].completions]
