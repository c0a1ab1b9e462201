"""Sampling from several policies: who wrote what, independent of who else takes part."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from prefloop.components import build, key_of
from prefloop.errors import ConfigError, SamplerError
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext, Sampler, uses_versions
from prefloop.recipe import Spec
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.hf import Hf
from prefloop.sample.matrix import Matrix

NAMES = ("first", "second", "third", "small")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: tiny.save_tiny_policy(root / name, seed=seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(autouse=True)
def _nothing_kept():
    causal_lm.forget()
    yield
    causal_lm.forget()


def ref(folder: Path, round_: int = 0) -> PolicyRef:
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), round_)


def prompts(count: int = 2) -> list[Prompt]:
    messages = [(Message(VERBATIM, f"prompt {i}"),) for i in range(count)]
    return [Prompt(prompt_id(m), m, None, "train", "prompts.jsonl:3") for m in messages]


def context_of(folders: dict[str, Path], *names: str, round_: int = 3) -> RoundContext:
    """The last named version is the round's own policy."""
    versions = tuple(ref(folders[name]) for name in names)
    return RoundContext(0, round_, versions[-1], versions[0], versions)


def sources(sampler: Matrix, context: RoundContext) -> list[str]:
    (group,) = sampler(prompts(1), context)
    return [completion.source for completion in group.completions]


def test_it_is_a_sampler_that_says_that_it_uses_versions():
    sampler: Sampler = Matrix()
    assert uses_versions(sampler)
    assert not uses_versions(Hf())


def test_the_policy_alone_draws_what_hf_draws(folders):
    context = context_of(folders, "first", round_=0)
    settings = {"completions": 3, "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 50}
    assert Matrix(**settings)(prompts(), context) == Hf(**settings)(prompts(), context)


def test_cells_come_in_order_and_say_who_they_are(folders):
    sampler = Matrix(completions=2, versions=5, smaller=(str(folders["small"]),), max_new_tokens=4)
    context = context_of(folders, "first", "second", "third")
    groups = sampler(prompts(), context)
    order = [ref(folders[name]).digest for name in ("third", "second", "first", "small") for _ in range(2)]
    assert [[c.source for c in group.completions] for group in groups] == [order, order]
    assert [group.prompt for group in groups] == prompts()
    assert {group.policy for group in groups} == {context.policy.digest}
    ids = [c.completion_id for group in groups for c in group.completions]
    assert len(set(ids)) == len(ids)


def test_the_log_probs_are_those_of_the_policy_that_is_named(folders):
    sampler = Matrix(versions=2, smaller=(str(folders["small"]),), max_new_tokens=6)
    (group,) = sampler(prompts(1), context_of(folders, "first", "second", "third"))
    by_digest = {ref(folder).digest: folder for folder in folders.values()}
    for completion in group.completions:
        lm = causal_lm.load(str(by_digest[completion.source]))
        row = TokenGroup(tuple(causal_lm.encode_prompt(lm.tokenizer, group.prompt)), (completion.token_ids,))
        with torch.inference_mode():
            scored = completion_logps(lm.model, [row], layout="padded")
        assert scored.token_logps[0].tolist() == pytest.approx(completion.sampler_logps, abs=1e-4)


@pytest.mark.parametrize(
    ("limit", "promoted", "drawn"),
    [
        (0, ["first", "second", "third"], ["third"]),
        (1, ["first", "second", "third"], ["third", "second"]),
        (2, ["first", "second", "third"], ["third", "second", "first"]),
        (9, ["first"], ["first"]),
        (1, ["first", "second", "first", "second"], ["second", "first"]),
        (2, ["first", "second", "second", "third"], ["third", "second", "first"]),
    ],
)
def test_the_newest_versions_are_taken_and_each_once(folders, limit, promoted, drawn):
    found = sources(Matrix(versions=limit, max_new_tokens=2), context_of(folders, *promoted))
    assert found == [ref(folders[name]).digest for name in drawn]


def test_a_smaller_model_that_is_there_already_is_drawn_from_once(folders):
    context = context_of(folders, "first", "second")
    twice = tuple(str(folders[name]) for name in ("second", "first", "small", "small"))
    assert sources(Matrix(smaller=twice, max_new_tokens=2), context) == [
        ref(folders[name]).digest for name in ("second", "first", "small")
    ]


def test_a_cell_does_not_depend_on_the_others(folders):
    alone = Matrix(versions=1, max_new_tokens=6)(prompts(), context_of(folders, "first", "third"))
    both = Matrix(versions=2, smaller=(str(folders["small"]),), max_new_tokens=6)(
        prompts(), context_of(folders, "second", "first", "third")
    )
    for few, many in zip(alone, both, strict=True):
        assert set(few.completions) < set(many.completions)


def test_cells_do_not_share_their_random_streams(folders):
    same = str(folders["first"])
    versions = (PolicyRef(same, "one name", 0), PolicyRef(same, "another name", 1))
    context = RoundContext(0, 2, versions[1], versions[0], versions)
    (group,) = Matrix(max_new_tokens=12)(prompts(1), context)
    assert group.completions[0].token_ids != group.completions[1].token_ids


def test_held_out_completions_are_the_measured_policys_alone(folders):
    policy = ref(folders["third"])
    context = RoundContext(0, -1, policy, ref(folders["first"]))
    sampler = Matrix(versions=2, smaller=(str(folders["small"]),), max_new_tokens=4)
    measured = dataclasses.replace(sampler, completions=2)
    assert measured(prompts(), context) == Hf(completions=2, max_new_tokens=4)(prompts(), context)


def test_a_changed_smaller_model_changes_the_key(folders, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(folders["small"], folder)

    def key() -> dict[str, object]:
        return key_of(build("sampler", Spec.model_validate({"kind": "matrix", "smaller": [str(folder)]})), "matrix")

    before = key()
    assert key() == before
    shutil.copy(folders["first"] / "model.safetensors", folder / "model.safetensors")
    assert key() != before


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"versions": -1}, r"sampler\.versions .*≥ 0"),
        ({"completions": 0}, r"sampler\.completions"),
        ({"top_p": 0.0}, r"sampler\.top_p"),
        ({"smaller": ["./nowhere"]}, r"sampler\.smaller\[0\] \(sample/matrix\.py\): no folder \./nowhere"),
    ],
)
def test_bad_settings_are_refused_when_the_run_is_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("sampler", Spec.model_validate({"kind": "matrix", **settings}))


def test_a_folder_without_weights_is_refused_when_the_run_is_built(folders, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"sampler\.smaller\[1\] .*no model\*\.safetensors"):
        Matrix(smaller=(str(folders["small"]), str(tmp_path)))


def with_tokenizer(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a policy whose tokenizer was changed."""
    shutil.copytree(source, folder)
    tokenizer = tiny.byte_tokenizer()
    if "token" in changes:
        tokenizer.add_tokens([changes.pop("token")])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "<extra>"}, "token '<extra>' is 260 there and unknown here"),
        ({"eos_token": "<unk>"}, "the end token is '<unk>' there and '<eos>' here"),
    ],
)
def test_a_smaller_model_with_another_tokenizer_is_refused_before_anything_is_drawn(
    folders, tmp_path, changes, message
):
    foreign = with_tokenizer(folders["small"], tmp_path / "foreign", **changes)
    sampler = Matrix(smaller=(str(folders["small"]), str(foreign)))
    with pytest.raises(ConfigError, match=rf"sampler\.smaller\[1\] .*another tokenizer.*{message}"):
        sampler.check_policy(ref(folders["first"]))
    context = RoundContext(0, -1, ref(folders["first"]), ref(folders["first"]))
    with pytest.raises(ConfigError, match="another tokenizer"):
        sampler(prompts(), context)


def test_tokens_that_only_the_policy_has_do_not_matter(folders, tmp_path):
    larger = with_tokenizer(folders["first"], tmp_path / "larger", token="<extra>")
    Matrix(smaller=(str(folders["small"]),)).check_policy(ref(larger))


def test_an_error_of_a_smaller_model_names_it(folders, tmp_path):
    roomy = tiny.tiny_model("gpt2", tiny.BYTE_VOCABULARY).config
    roomy.n_positions = 256
    AutoModelForCausalLM.from_config(roomy).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    policy = ref(tmp_path)
    (long,) = prompts(1)
    long = dataclasses.replace(long, messages=(Message(VERBATIM, "x" * 130),))
    sampler = Matrix(smaller=(str(folders["small"]),), max_new_tokens=2)
    with pytest.raises(SamplerError, match=r"^sampler\.smaller\[0\] .*small\): prompt .*takes 128 in all"):
        sampler([long], RoundContext(0, 0, policy, policy, (policy,)))
    with pytest.raises(SamplerError, match=r"^prompt .*takes 128 in all"):
        sampler([long], context_of(folders, "first"))
