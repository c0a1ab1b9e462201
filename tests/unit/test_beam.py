"""Search by likelihood against transformers' own beam search, greedy decoding, and every text there is."""

import itertools

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import tiny
from prefloop.errors import ConfigError, SamplerError
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import RoundContext, Sampler
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.beam import Beam
from prefloop.sample.best_of_n import BestOfN
from prefloop.sample.hf import Hf

TEXTS = ("one", "a longer prompt", "x", "and one more")


def prompt_of(text):
    messages = (Message(VERBATIM, text),)
    return Prompt(prompt_id(messages), messages, None, "train", "prompts.jsonl:3")


def context_of(folder, seed=0):
    ref = PolicyRef(str(folder), causal_lm.folder_digest(folder), 0)
    return RoundContext(seed, 0, ref, ref)


def prompts():
    return [prompt_of(text) for text in TEXTS]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def policy(request, tmp_path_factory):
    """Sharp enough that beams differ, and with an end token that is often near the top."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.tiny_model(request.param, tiny.BYTE_VOCABULARY, seed=3, scale=2.0)
    tiny.byte_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[2] += 0.6 * head[40:60].mean(0) + 0.1
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("beams", "returned"), [(1, 1), (2, 1), (4, 4), (5, 2), (8, 8)])
def test_beams_are_those_of_transformers(policy, beams, returned):
    lm = causal_lm.load(str(policy))
    groups = Beam(completions=returned, beams=beams, max_new_tokens=12)(prompts(), context_of(policy))
    for prompt, group in zip(prompts(), groups, strict=True):
        ids = causal_lm.encode_prompt(lm.tokenizer, prompt)
        found = generated(lm.model, ids, beams, returned, sorted(lm.stop_ids))
        ours = [(c.token_ids, sum(c.sampler_logps)) for c in group.completions]
        assert [ids for ids, _ in ours] == [ids for ids, _ in found]
        if beams > 1:
            assert [total for _, total in ours] == pytest.approx([total for _, total in found], abs=1e-4)


def generated(model: PreTrainedModel, ids, beams, returned, ends):
    settings = GenerationConfig(
        num_beams=beams,
        num_return_sequences=returned,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **({"length_penalty": 0.0, "early_stopping": False} if beams > 1 else {}),
    )
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=settings)
    rows = []
    for row in out.sequences[:, len(ids) :].tolist():
        end = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
        rows.append(tuple(row[:end]))
    return list(zip(rows, out.sequences_scores.tolist() if beams > 1 else [0.0] * len(rows), strict=True))


def test_some_of_these_completions_end_by_themselves(policy):
    groups = Beam(completions=8, beams=8, max_new_tokens=12)(prompts(), context_of(policy))
    reasons = {c.finish_reason for group in groups for c in group.completions}
    assert reasons == {"stop", "length"}


def test_one_beam_is_greedy_decoding(policy):
    greedy = Hf(completions=1, max_new_tokens=20, temperature=0.0)(prompts(), context_of(policy))
    searched = Beam(beams=1, max_new_tokens=20)(prompts(), context_of(policy))
    for one, other in zip(greedy, searched, strict=True):
        assert one.completions[0].token_ids == other.completions[0].token_ids
        assert one.completions[0].text == other.completions[0].text
        assert one.completions[0].sampler_logps == pytest.approx(other.completions[0].sampler_logps, abs=1e-5)
        assert (other.temperature, other.top_p) == (0.0, 1.0)


def small_world(folder):
    """Five tokens: pad, bos, eos, a, b. Texts of up to four tokens can all be listed."""
    model = tiny.tiny_model("llama", vocabulary=5, seed=7, scale=3.0)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return model


def all_texts(ends, limit, vocabulary=5):
    """Every completion: it ends with an end token, or has `limit` tokens."""
    for length in range(1, limit + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            if any(token in ends for token in ids[:-1]):
                continue
            if ids[-1] in ends or length == limit:
                yield ids


def test_as_many_beams_as_texts_find_the_most_probable_ones(tmp_path, monkeypatch):
    small_world(tmp_path)
    lm = causal_lm.load(str(tmp_path))
    monkeypatch.setattr("prefloop.sample.beam.encode_prompt", lambda *_: [1, 3])
    (group,) = Beam(completions=20, beams=5**4, max_new_tokens=4, batch=1)([prompt_of("x")], context_of(tmp_path))
    texts = list(all_texts(lm.stop_ids, 4))
    with torch.inference_mode():
        totals = completion_logps(lm.model, [TokenGroup((1, 3), tuple(texts))], layout="padded").total.tolist()
    assert sum(torch.tensor(totals).double().exp().tolist()) == pytest.approx(1, abs=1e-5)
    ranked = sorted(zip(totals, texts, strict=True), reverse=True)[:20]
    assert [c.token_ids for c in group.completions] == [ids for _, ids in ranked]
    assert [sum(c.sampler_logps) for c in group.completions] == pytest.approx([t for t, _ in ranked], abs=1e-5)


def test_greedy_is_not_always_the_most_probable(policy):
    """A search that returns the greedy completion whatever the beams would pass many tests."""
    few, many = (Beam(beams=beams, max_new_tokens=12)(prompts(), context_of(policy)) for beams in (1, 8))
    totals = [[sum(g.completions[0].sampler_logps) for g in groups] for groups in (few, many)]
    assert sum(totals[1]) > sum(totals[0])


def test_prompts_do_not_depend_on_each_other_nor_on_the_batch_nor_on_the_seed(policy):
    settings = {"completions": 3, "beams": 3, "max_new_tokens": 8}
    together = Beam(**settings, batch=64)(prompts(), context_of(policy))
    apart = [Beam(**settings, batch=1)([prompt], context_of(policy, seed=5))[0] for prompt in prompts()]
    for one, other in zip(together, apart, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]


def test_a_stop_string_ends_a_completion(policy):
    plain = Beam(completions=3, beams=3, max_new_tokens=8)(prompts(), context_of(policy))
    texts = [c.text for group in plain for c in group.completions if len(c.token_ids) > 3]
    letter = next(c for text in texts for c in text[1:-1] if c.isascii())
    stopped = Beam(completions=3, beams=3, max_new_tokens=8, stop=(letter,))(prompts(), context_of(policy))
    having = [c for group in stopped for c in group.completions if letter in c.text]
    assert having
    for completion in having:
        assert completion.text.index(letter) == len(completion.text) - 1
        assert completion.finish_reason == "stop"


def test_groups_are_complete_records(policy):
    sampler: Sampler = Beam(completions=2, beams=4, max_new_tokens=6)
    context = context_of(policy)
    groups = sampler(prompts(), context)
    assert [group.prompt for group in groups] == prompts()
    ids = {c.completion_id for group in groups for c in group.completions}
    assert len(ids) == 2 * len(TEXTS)
    assert {c.source for group in groups for c in group.completions} == {context.policy.digest}
    assert sampler([], context) == []


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"beams": 0}, "beams"),
        ({"beams": 2, "completions": 3}, "completions"),
        ({"completions": 0}, "completions"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch": 0}, "batch"),
        ({"stop": ("",)}, "stop"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_a_field_out_of_range(settings, field):
    with pytest.raises(ConfigError, match=rf"^sampler.{field} \(sample/beam.py\): must be"):
        Beam(**settings)


def test_more_completions_than_there_are_texts_are_refused(tmp_path, monkeypatch):
    small_world(tmp_path)
    monkeypatch.setattr("prefloop.sample.beam.encode_prompt", lambda *_: [1, 3])
    with pytest.raises(SamplerError, match=r"5 completions of at most 1 tokens, fewer than sampler.completions=6"):
        Beam(completions=6, beams=6, max_new_tokens=1)([prompt_of("x")], context_of(tmp_path))


def test_the_best_of_n_are_the_most_probable_draws_of_hf(policy):
    drawn = Hf(completions=6, max_new_tokens=8)(prompts(), context_of(policy, seed=2))
    kept = BestOfN(completions=2, n=6, max_new_tokens=8)(prompts(), context_of(policy, seed=2))
    lm = causal_lm.load(str(policy))
    for all_of, best in zip(drawn, kept, strict=True):
        context = tuple(causal_lm.encode_prompt(lm.tokenizer, all_of.prompt))
        texts = tuple(c.token_ids for c in all_of.completions)
        with torch.inference_mode():
            totals = completion_logps(lm.model, [TokenGroup(context, texts)], layout="padded").total.tolist()
        ranked = [texts[i] for i in sorted(range(6), key=lambda i: -totals[i])]
        assert [c.token_ids for c in best.completions] == ranked[:2]
        assert [c.sampler_logps for c in best.completions] == [None, None]


@pytest.mark.parametrize("settings", [{"n": 0}, {"n": 2, "completions": 3}, {"temperature": -1.0}])
def test_best_of_n_refuses_what_has_no_meaning(settings):
    with pytest.raises(ConfigError, match=f"sampler.{list(settings)[-1]}"):
        BestOfN(**settings)
