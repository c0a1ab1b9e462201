"""The in-process sampler against `transformers.generate`, exact probabilities, and itself in other batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tiny
from prefloop.inputs import embedded_policy
from prefloop.models import causal_lm
from prefloop.models.logps import choose_layout
from prefloop.protocols import RoundContext
from prefloop.rows import VERBATIM, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from prefloop.sample import hf
from prefloop.sample.hf import Hf

TEXTS = ["a", "some words", "b", "a longer prompt, with many bytes in it", "", "mid length!", "other word"]


def verbatim(text: str) -> Prompt:
    messages = (Message(VERBATIM, text),)
    return Prompt(prompt_id(messages), messages, None, "train", f"test:{text!r}")


def context_of(folder: Path | str, seed: int = 0, round_: int = 0) -> RoundContext:
    policy = PolicyRef(str(folder), "0123456789abcdef", round_)
    return RoundContext(seed, round_, policy, policy)


def tokens(groups: list[SampleGroup]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids or () for c in group.completions] for group in groups]


def save_policy(folder: Path, architecture: str) -> Path:
    """A byte-level policy whose next token depends clearly on all that came before, and is far from uniform."""
    model = tiny.tiny_model(architecture, tiny.BYTE_VOCABULARY, scale=16)
    with torch.no_grad():
        if architecture.startswith("gemma"):
            model.model.norm.weight.fill_(7.0)  # its norm multiplies by 1 + weight
        else:
            model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["batches one after another", "batches kept full"])
def _refill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "batches kept full":
        monkeypatch.setattr(hf, "REFILLED_DEVICES", {"cpu"})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("batch", [2, 64])
def test_greedy_tokens_are_those_of_generate(architecture: str, batch: int, tmp_path: Path) -> None:
    folder = save_policy(tmp_path, architecture)
    lm = causal_lm.load(str(folder))
    sampler = Hf(completions=1, max_new_tokens=24, temperature=0, batch=batch)
    groups = sampler([verbatim(text) for text in TEXTS], context_of(folder))
    for text, (ids,) in zip(TEXTS, tokens(groups), strict=True):
        prompt = torch.tensor([causal_lm.encode_prompt(lm.tokenizer, verbatim(text))])
        expected = lm.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=sorted(lm.stop_ids),
            pad_token_id=0,
        )
        assert list(ids) == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_stored_logps_are_those_of_a_teacher_forced_forward(architecture: str, tmp_path: Path) -> None:
    folder = save_policy(tmp_path, architecture)
    lm = causal_lm.load(str(folder))
    sampler = Hf(completions=3, max_new_tokens=20, temperature=0.7, top_p=0.9, batch=8)
    for group in sampler([verbatim(text) for text in TEXTS], context_of(folder)):
        prompt = causal_lm.encode_prompt(lm.tokenizer, group.prompt)
        for completion in group.completions:
            assert completion.token_ids is not None
            assert completion.sampler_logps is not None
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logps = lm.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            live = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(completion.sampler_logps, live.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", [1, 3, 5, 64])
def test_completions_do_not_depend_on_batch_part_or_order(architecture: str, batch: int, tmp_path: Path) -> None:
    folder = save_policy(tmp_path, architecture)
    prompts = [verbatim(text) for text in TEXTS]
    context = context_of(folder, seed=7)
    whole = tokens(Hf(completions=3, max_new_tokens=20, batch=16)(prompts, context))
    sampler = Hf(completions=3, max_new_tokens=20, batch=batch)
    assert tokens(sampler(prompts[::-1], context))[::-1] == whole
    assert tokens(sampler(prompts[:3], context)) + tokens(sampler(prompts[3:], context)) == whole


@pytest.mark.usefixtures("_refill")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("batch", [4, 7])
def test_completions_that_end_early_make_room(architecture: str, batch: int, tmp_path: Path) -> None:
    """Lengths from 1 to the limit; every completion is what it is in a batch of its own."""
    folder = save_policy(tmp_path, architecture)
    prompts, context = [verbatim(text) for text in TEXTS], context_of(folder, seed=1)
    sampler = Hf(completions=3, max_new_tokens=30, batch=batch, stop=tuple("abcdefghijklmnop0123456789"))
    whole = tokens(sampler(prompts, context))
    lengths = [len(ids) for group in whole for ids in group]
    assert len(set(lengths)) > 5
    assert whole == tokens(replace(sampler, batch=1)(prompts, context))


@pytest.mark.usefixtures("_refill")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_lean_and_own_forward_draw_the_same(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_policy(tmp_path, architecture)
    prompts, context = [verbatim(text) for text in TEXTS], context_of(folder, seed=2)
    sampler = Hf(completions=3, max_new_tokens=40, batch=6, temperature=1.2, stop=("e", "7"))
    lean = tokens(sampler(prompts, context))
    monkeypatch.setattr(hf, "lean_step", lambda model, reach: None)
    assert lean == tokens(sampler(prompts, context))


def test_more_completions_and_a_longer_limit_continue_the_same_streams(tmp_path: Path) -> None:
    folder = save_policy(tmp_path, "llama")
    prompts, context = [verbatim(text) for text in TEXTS], context_of(folder)
    short = tokens(Hf(completions=2, max_new_tokens=9)(prompts, context))
    long = tokens(Hf(completions=5, max_new_tokens=30)(prompts, context))
    assert [[ids[:9] for ids in group[:2]] for group in long] == short


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.5, 0.7, 0), (1.0, 1.0, 3), (0.8, 0.8, 6), (1.0, 0.01, 0), (1.0, 1.0, 99)],
)
def test_distribution_is_the_model_s(temperature: float, top_p: float, top_k: int) -> None:
    sampler = Hf(temperature=temperature, top_p=top_p, top_k=top_k)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    exact = warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0].double().numpy()
    draws = 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws))
    drawn, logps = sampler.choose(logits.expand(draws, -1), uniform)
    assert_distribution(drawn.tolist(), exact, draws)
    torch.testing.assert_close(logps, logits[0].log_softmax(-1)[drawn])


def test_streams_of_completions_give_the_model_s_distribution(tmp_path: Path) -> None:
    """End to end: the second tokens of many completions against their exact probabilities after any first token."""
    folder = save_policy(tmp_path, "gpt_neox")
    lm = causal_lm.load(str(folder))
    prompt = verbatim("x")
    ids = causal_lm.encode_prompt(lm.tokenizer, prompt)
    everything = torch.arange(tiny.BYTE_VOCABULARY)[:, None]
    with torch.no_grad():
        first = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        after = torch.cat([torch.tensor([ids]).expand(len(everything), -1), everything], dim=1)
        second = lm.model(after).logits[:, -1].softmax(-1)
    goes_on = torch.tensor([token not in lm.stop_ids for token in range(tiny.BYTE_VOCABULARY)])
    exact = ((first * goes_on) @ second).double().numpy()
    draws = 6000
    (group,) = Hf(completions=draws, max_new_tokens=2, batch=3000)([prompt], context_of(folder))
    chosen = [c.token_ids for c in group.completions if c.token_ids]
    assert_distribution([ids[1] for ids in chosen if len(ids) > 1], np.append(exact, 1 - exact.sum()), draws)


def assert_distribution(drawn: list[int], exact: np.ndarray, draws: int) -> None:
    """Chi-square: cells with less than five expected draws are one cell; what was not drawn is the last one."""
    counts = np.bincount(drawn, minlength=len(exact))
    counts[-1] += draws - len(drawn)
    assert (counts[exact == 0] == 0).all()
    large = exact * draws >= 5
    expected = np.append(exact[large], exact[~large].sum()) * draws
    observed = np.append(counts[large], counts[~large].sum())
    used = expected > 0
    statistic = float(((observed - expected)[used] ** 2 / expected[used]).sum())
    # Mean k - 1, variance 2(k - 1): a right sampler passes with fixed seeds, a wrong one by far not.
    freedom = max(1, int(used.sum()) - 1)
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


@tiny.needs_shared
def test_published_greedy_story_is_reproduced() -> None:
    folder = tiny.SHARED / "tinylm_stories260k"
    expected = (folder / "expected_greedy_200steps.txt").read_text(encoding="utf-8")
    sampler = Hf(completions=1, max_new_tokens=200, temperature=0)
    (group,) = sampler([verbatim("")], context_of(folder / "hf"))
    assert group.completions[0].text.strip() == expected.strip()


def test_a_model_that_has_scored_segments_draws_the_same():
    context, prompts = (
        context_of(embedded_policy()),
        [verbatim(text) for text in ("Once upon a", "Tom had a red ball.")],
    )
    sampler = Hf(completions=2, max_new_tokens=12)
    first = sampler(prompts, context)
    model = causal_lm.load(context.policy.path, precision="auto", device="auto").model
    assert choose_layout(model)[0] == "shared"
    assert sampler(prompts, context) == first
