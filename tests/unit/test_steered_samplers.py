"""Proxy tuning and guided decoding: against logits that are added by hand, hf's own draws, and every text there is."""

import itertools

import pytest
import torch

import tiny
from prefloop.components import build, key_of
from prefloop.errors import ConfigError, SamplerError
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.pair.rollouts import Rollouts
from prefloop.protocols import RoundContext, Sampler
from prefloop.recipe import Spec
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, prompt_id
from prefloop.sample.beam import Beam
from prefloop.sample.best_of_n import BestOfN
from prefloop.sample.guided import Guided
from prefloop.sample.hf import Hf
from prefloop.sample.proxy_tuning import ProxyTuning

NAMES = {"large": "llama", "tuned": "gpt2", "untuned": "qwen2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, (name, kind) in enumerate(NAMES.items()):
        made[name] = root / name
        tiny.tiny_model(kind, tiny.BYTE_VOCABULARY, seed, scale=2.0).save_pretrained(made[name])
        tiny.byte_tokenizer().save_pretrained(made[name])
    return made


@pytest.fixture(autouse=True)
def _nothing_kept():
    causal_lm.forget()
    yield
    causal_lm.forget()


def ref(folder):
    return PolicyRef(str(folder), causal_lm.folder_digest(folder), 0)


def context_of(policy, start=None, seed=0, round_=0):
    return RoundContext(seed, round_, ref(policy), ref(start or policy))


def prompts(*texts):
    messages = [(Message(VERBATIM, text),) for text in texts or ("one", "a longer prompt", "x")]
    return [Prompt(prompt_id(m), m, None, "train", "prompts.jsonl:3") for m in messages]


def proxy(folders, **settings):
    return ProxyTuning(tuned=str(folders["tuned"]), untuned=str(folders["untuned"]), **settings)


def summed(folders, ids, beta):
    """log-softmax of the three models' own logits after every position, added by hand in float64."""
    logits = []
    for name in NAMES:
        lm = causal_lm.load(str(folders[name]))
        with torch.inference_mode():
            logits.append(lm.model(torch.tensor([ids])).logits[0].double())
    return (logits[0] + beta * (logits[1] - logits[2])).log_softmax(-1)


# Proxy tuning


@pytest.mark.parametrize("beta", [1.0, 0.4, -0.5])
def test_the_most_probable_token_of_the_summed_logits_is_taken(folders, beta):
    groups = proxy(folders, beta=beta, completions=1, max_new_tokens=8, temperature=0.0)(
        prompts(), context_of(folders["large"])
    )
    for group in groups:
        (completion,) = group.completions
        before = causal_lm.encode_prompt(causal_lm.load(str(folders["large"])).tokenizer, group.prompt)
        logps = summed(folders, [*before, *completion.token_ids], beta)[len(before) - 1 : -1]
        assert logps.argmax(-1).tolist() == list(completion.token_ids)
        of_tokens = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
        assert list(completion.sampler_logps) == pytest.approx(of_tokens, abs=1e-4)


def test_drawn_tokens_have_the_log_probs_of_the_product(folders):
    groups = proxy(folders, completions=3, max_new_tokens=6, temperature=0.8, top_p=0.9)(
        prompts(), context_of(folders["large"])
    )
    tokenizer = causal_lm.load(str(folders["large"])).tokenizer
    for group in groups:
        before = causal_lm.encode_prompt(tokenizer, group.prompt)
        for completion in group.completions:
            logps = summed(folders, [*before, *completion.token_ids], 1.0)[len(before) - 1 : -1]
            of_tokens = logps.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
            assert list(completion.sampler_logps) == pytest.approx(of_tokens, abs=1e-4)
        assert len({c.token_ids for c in group.completions}) > 1


def test_without_steering_it_is_the_policy_and_from_the_untuned_model_it_is_the_tuned_one(folders):
    plain = Hf(completions=2, max_new_tokens=8)
    alone = proxy(folders, beta=0.0, completions=2, max_new_tokens=8)(prompts(), context_of(folders["large"]))
    for steered, drawn in zip(alone, plain(prompts(), context_of(folders["large"])), strict=True):
        assert [c.token_ids for c in steered.completions] == [c.token_ids for c in drawn.completions]
    back = proxy(folders, completions=2, max_new_tokens=8)(prompts(), context_of(folders["untuned"]))
    for steered, drawn in zip(back, plain(prompts(), context_of(folders["tuned"])), strict=True):
        assert [c.token_ids for c in steered.completions] == [c.token_ids for c in drawn.completions]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(folders):
    def drawn(seed, **settings):
        groups = proxy(folders, completions=2, max_new_tokens=6, **settings)(
            prompts(), context_of(folders["large"], seed=seed)
        )
        return [[c.token_ids for c in group.completions] for group in groups]

    assert drawn(0) == drawn(0, batch=1) == drawn(0)
    assert drawn(0) != drawn(1)


def test_no_stage_takes_the_product_for_one_of_its_models(folders):
    (group,) = proxy(folders, completions=1, max_new_tokens=3)(prompts("x"), context_of(folders["large"]))
    (other,) = proxy(folders, beta=0.5, completions=1, max_new_tokens=3)(prompts("x"), context_of(folders["large"]))
    sources = {group.completions[0].source, other.completions[0].source}
    assert len(sources) == 2
    assert not sources & {ref(folder).digest for folder in folders.values()}


def test_the_key_notices_changed_models(folders):
    spec = {"kind": "proxy_tuning", "tuned": str(folders["tuned"]), "untuned": str(folders["untuned"])}
    sampler: Sampler = build("sampler", Spec.model_validate(spec))
    key = key_of(sampler, "proxy_tuning")
    assert key["digests"] == (ref(folders["tuned"]).digest, ref(folders["untuned"]).digest)


def test_models_that_cannot_be_added_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"sampler.untuned .*is the same model as sampler.tuned"):
        ProxyTuning(tuned=str(folders["tuned"]), untuned=str(folders["tuned"]))
    with pytest.raises(ConfigError, match=r"sampler.tuned .*no folder"):
        ProxyTuning(tuned=str(tmp_path / "nothing"), untuned=str(folders["untuned"]))
    with pytest.raises(ConfigError, match=r"sampler.beta"):
        proxy(folders, beta=float("nan"))
    with pytest.raises(ConfigError, match=r"sampler.top_p"):
        proxy(folders, top_p=2.0)
    other = tiny.save_tiny_policy(tmp_path / "other")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    sampler = ProxyTuning(tuned=str(other), untuned=str(folders["untuned"]))
    with pytest.raises(ConfigError, match=r"sampler.tuned .*another tokenizer .*token 'new'"):
        sampler.check_policy(ref(folders["large"]))


def test_the_small_models_room_counts_too(folders, tmp_path):
    model = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=9)
    model.config.max_position_embeddings = 10
    model.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    sampler = ProxyTuning(str(tmp_path), str(folders["untuned"]), completions=1, max_new_tokens=20, temperature=0.0)
    (group,) = sampler(prompts("12345"), context_of(folders["large"]))
    assert len(group.completions[0].token_ids) <= 4
    with pytest.raises(SamplerError, match="takes 10 in all"):
        sampler(prompts("123456789"), context_of(folders["large"]))


# Guided decoding


def total(folder, prompt, texts):
    lm = causal_lm.load(str(folder))
    context = tuple(causal_lm.encode_prompt(lm.tokenizer, prompt))
    with torch.inference_mode():
        return completion_logps(lm.model, [TokenGroup(context, tuple(texts))], layout="padded").total.tolist()


@pytest.mark.parametrize("score", ["value", "likelihood"])
@pytest.mark.parametrize("propose", ["policy", "reference"])
def test_one_block_is_the_best_of_the_proposers_draws(folders, score, propose):
    policy, reference = folders["large"], folders["untuned"]
    guided = Guided(
        reference=str(reference), score=score, propose=propose, block=8, beams=1, branches=6, max_new_tokens=8
    )
    drawn = Hf(completions=6, max_new_tokens=8)(
        prompts(), context_of(policy if propose == "policy" else reference, seed=4)
    )
    kept = guided(prompts(), context_of(policy, seed=4))
    for all_of, best in zip(drawn, kept, strict=True):
        texts = [c.token_ids for c in all_of.completions]
        scores = total(policy, all_of.prompt, texts)
        if score == "value":
            scores = [a - b for a, b in zip(scores, total(reference, all_of.prompt, texts), strict=True)]
        assert best.completions[0].token_ids == texts[scores.index(max(scores))]


def test_with_enough_branches_it_finds_the_text_of_the_largest_value(tmp_path, monkeypatch):
    folders = {}
    for seed, name in enumerate(("policy", "reference")):
        folders[name] = tmp_path / name
        tiny.tiny_model("llama", vocabulary=5, seed=seed + 20, scale=1.0).save_pretrained(folders[name])
        tiny.byte_tokenizer().save_pretrained(folders[name])
    for place in ("hf", "guided"):
        monkeypatch.setattr(f"prefloop.sample.{place}.encode_prompt", lambda *_: [1, 3])
    texts = [
        ids
        for length in (1, 2, 3)
        for ids in itertools.product(range(5), repeat=length)
        if not set(ids[:-1]) & {1, 2} and (ids[-1] in (1, 2) or length == 3)
    ]
    rows = [TokenGroup((1, 3), tuple(texts))]
    with torch.inference_mode():
        ours, theirs = (
            completion_logps(causal_lm.load(str(folders[name])).model, rows, layout="padded").total
            for name in ("policy", "reference")
        )
    best = texts[int((ours - theirs).argmax())]
    assert best != texts[int(ours.argmax())]
    guided = Guided(block=1, beams=40, branches=60, max_new_tokens=3, batch=512)
    (group,) = guided(prompts("x"), context_of(folders["policy"], folders["reference"]))
    assert group.completions[0].token_ids == best


def test_blocks_go_on_from_each_other_and_end(folders):
    guided = Guided(completions=2, reference=str(folders["untuned"]), block=3, beams=2, branches=3, max_new_tokens=10)
    context = context_of(folders["large"])
    groups = guided(prompts(), context)
    again = guided(prompts(), context)
    assert groups == again
    for group in groups:
        assert len({c.token_ids for c in group.completions}) == 2
        for completion in group.completions:
            assert completion.sampler_logps is None
            assert completion.source == context.policy.digest
            assert len(completion.token_ids) == 10 or completion.token_ids[-1] in (1, 2)
            before = causal_lm.encode_prompt(tiny.byte_tokenizer(), group.prompt)
            shown = [t for t in completion.token_ids if t > 2]
            assert completion.text == causal_lm.decode_completion(tiny.byte_tokenizer(), before, shown)
        texts = [c.token_ids for c in group.completions]
        sides = (total(folders[name], group.prompt, texts) for name in ("large", "untuned"))
        values = [ours - theirs for ours, theirs in zip(*sides, strict=True)]
        assert values[0] >= values[1]
    assert guided(prompts(), context_of(folders["large"], seed=1)) != groups


def test_the_runs_first_policy_is_the_reference_by_default(folders):
    settings = {"block": 4, "branches": 4, "max_new_tokens": 8}
    named = Guided(reference=str(folders["untuned"]), **settings)(prompts(), context_of(folders["large"]))
    default = Guided(**settings)(prompts(), context_of(folders["large"], folders["untuned"]))
    assert [g.completions for g in named] == [g.completions for g in default]


def test_the_models_room_ends_a_guided_completion(folders, tmp_path):
    model = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=9)
    model.config.max_position_embeddings = 10
    model.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    guided = Guided(reference=str(folders["untuned"]), block=2, beams=1, branches=2, max_new_tokens=30)
    (group,) = guided(prompts("12345"), context_of(tmp_path))
    assert len(group.completions[0].token_ids) <= 4


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"block": 0}, "block"),
        ({"beams": 0}, "beams"),
        ({"branches": 0}, "branches"),
        ({"completions": 3}, "completions"),
    ],
)
def test_a_field_of_guided_out_of_range(settings, field):
    with pytest.raises(ConfigError, match=rf"sampler.{field} \(sample/guided.py\)"):
        Guided(**settings)


def test_policy_gradients_refuse_what_is_no_draw(folders):
    for sampler in (Beam(), BestOfN(), Guided(), proxy(folders)):
        with pytest.raises(ConfigError, match="draws from the policy itself"):
            Rollouts().check_sampler(sampler)
