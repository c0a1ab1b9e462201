"""padded = packed = shared, in value and gradient; and the comparison is sharp enough to see every mistake."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from prefloop.errors import ConfigError
from prefloop.losses.dpo import DPO
from prefloop.models import adapters, logps, segments
from prefloop.models.logps import TokenGroup, choose_layout, completion_logps
from prefloop.rows import TokenizedPair
from prefloop.tensors import CompletionLogps
from prefloop.train.batches import pair_logps
from prefloop.train.plan import PairIndex, Plan

VOCABULARY = 96
PACKED = ("packed", "shared")


def groups() -> list[TokenGroup]:
    """K = 1 to 4; a context of one token; completions that share a beginning, are empty, of one token, or equal."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, VOCABULARY) for _ in range(count))

    start = ids(3)
    same = ids(4)
    return [
        TokenGroup(ids(13), (ids(9), ids(4))),
        TokenGroup(ids(1), (start + ids(5), start + ids(2), start)),
        TokenGroup(ids(5), (ids(6), (), ids(1), ids(12))),
        TokenGroup(ids(20), (ids(3),)),
        TokenGroup(ids(2), (same, same)),
        TokenGroup(ids(4), ((), ())),
    ]


def loss_of(scores: CompletionLogps) -> Tensor:
    """A sum in which every token of every row has a weight of its own."""
    rows, width = scores.token_logps.shape
    weight = torch.linspace(0.5, 1.5, rows)[:, None] * torch.linspace(1.0, 2.0, width)
    return (scores.token_logps * weight).sum()


def scored(
    model: nn.Module, layout: str, which: Sequence[TokenGroup] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    scores = completion_logps(model, groups() if which is None else which, layout=layout)
    loss_of(scores).backward()
    return scores.token_logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        gap = (got[1][name] - gradient).norm() / gradient.norm()
        assert gap < 1e-5, (name, float(gap))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_layouts_agree(architecture):
    model = tiny.tiny_model(architecture)
    expected = scored(model, "padded")
    assert model.config._attn_implementation != segments.IMPLEMENTATION
    for layout in PACKED:
        assert_same(scored(model, layout), expected)
    # The model keeps our attention; without segments it is the ordinary one.
    assert model.config._attn_implementation == segments.IMPLEMENTATION
    assert_same(scored(model, "padded"), expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_tested_architecture_is_shared(architecture):
    model = tiny.tiny_model(architecture).train()
    windows = [m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")]
    assert choose_layout(model) == ("shared", "verified against padded")
    assert windows == [m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")]
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(
        completion_logps(model.eval(), groups()).token_logps, scored(model, "padded")[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("layout", ["padded", *PACKED])
def test_generation_is_what_it_was(architecture, layout):
    prompt = torch.tensor([[0, 0, 5, 6, 7], [11, 12, 13, 14, 15]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model = tiny.tiny_model(architecture)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **settings)
    completion_logps(model, groups(), layout=layout)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert segments.IMPLEMENTATION not in model.config.to_json_string()


@pytest.mark.parametrize("layout", ["padded", *PACKED])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(architecture, layout):
    model = tiny.tiny_model(architecture).train()
    expected = scored(model, layout)
    model.activation_checkpointing_enable()
    runs = []
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same(scored(model, layout), expected)
    assert len(runs) == 2, "the layer should run again in the backward pass"


@pytest.mark.parametrize("layout", ["padded", *PACKED])
def test_without_gradients_the_values_are_the_same_and_nothing_is_saved(layout):
    model = tiny.tiny_model("llama")
    expected, _ = scored(model, layout)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                got = completion_logps(model, groups(), layout=layout).token_logps
            assert not got.requires_grad
            assert torch.equal(got, expected)
    assert not saved


@pytest.mark.parametrize("layout", ["padded", *PACKED])
def test_an_adapter_is_active_and_its_gradients_agree(layout):
    base = scored(tiny.tiny_model("llama"), "padded")[0]
    model = adapters.add_lora(tiny.tiny_model("llama"), 4, 8.0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    expected = scored(model, "padded")
    got = scored(model, layout)
    assert_same(got, expected)
    assert got[1]
    assert all("lora_" in name for name in got[1])
    assert (got[0] - base).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(completion_logps(model, groups(), layout=layout).token_logps, base)


def pairs() -> list[TokenizedPair]:
    draw = random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, VOCABULARY) for _ in range(count))

    sizes = [(9, 4, 7), (1, 12, 2), (15, 1, 1), (4, 6, 6), (2, 3, 10)]
    return [
        TokenizedPair(str(i), ids(c), ids(w), ids(r), (-4.0,) * w, (-4.5,) * r, None, 1.0 + i)
        for i, (c, w, r) in enumerate(sizes)
    ]


@pytest.mark.parametrize("layout", ["padded", *PACKED])
def test_the_split_into_microbatches_changes_nothing(layout):
    model = tiny.tiny_model("llama")
    lengths = [(len(p.context), len(p.chosen), len(p.rejected), 0) for p in pairs()]
    results = []
    for budget in (1, 40, 10_000):
        model.zero_grad()
        total = torch.zeros(())
        (step,) = Plan(PairIndex.of_lengths(lengths, None), 8, 1, 0, budget)
        for microbatch in step:
            rows = pair_logps(model, [pairs()[i] for i in microbatch], layout)
            loss = (DPO()(rows).loss * rows.weight).sum()
            loss.backward()
            total += loss.detach()
        results.append((total, {n: p.grad.clone() for n, p in model.named_parameters()}))
        assert len(step) == {1: 5, 40: 3, 10_000: 1}[budget]
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


@pytest.mark.parametrize("layout", ["padded", *PACKED])
def test_autocast_stays_close_and_gives_float32(layout):
    model = tiny.tiny_model("qwen2")
    expected, gradients = scored(model, "padded")
    with torch.autocast("cpu", torch.bfloat16):
        scores = completion_logps(model, groups(), layout=layout)
    model.zero_grad()
    loss_of(scores).backward()
    assert scores.token_logps.dtype == torch.float32
    assert (scores.token_logps - expected).abs().max() < 0.1
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradients[name]).norm() / gradients[name].norm() < 0.05, name


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("mamba", {"state_size": 4}, "does not attend through"),
        ("bloom", {}, "does not attend through"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "does not attend through"),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    ],
)
def test_other_mixers_fall_back_to_padded(architecture, settings, reason):
    config = AutoConfig.for_model(architecture, **{**tiny._COMMON, "vocab_size": VOCABULARY, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    layout, why = choose_layout(model)
    assert layout == "padded"
    assert reason in why
    context, completion = groups()[0].context, groups()[0].completions[0]
    logits = model(input_ids=torch.tensor([context + completion]), use_cache=False).logits
    own = logits.log_softmax(-1)[0, len(context) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
    got = completion_logps(model, groups()).token_logps[0, : len(completion)]
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="use padded"):
        completion_logps(model, groups(), layout="shared")


def test_a_model_that_ignores_positions_fails_the_check_and_keeps_its_attention(monkeypatch):
    model = tiny.tiny_model("gpt2")
    decoder = model.get_decoder()
    plain = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, position_ids=None, **inputs: plain(*args, **inputs))
    layout, why = choose_layout(model)
    assert layout == "padded"
    assert "differ by" in why
    assert model.config._attn_implementation == "sdpa"


class _ModelWithItsOwnLogits(nn.Linear):
    """A head whose output is not h·Wᵀ."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden)


def test_an_unknown_step_on_the_logits_is_refused():
    model = tiny.tiny_model("llama")
    own = _ModelWithItsOwnLogits(32, VOCABULARY, bias=False)
    own.weight = model.lm_head.weight
    model.lm_head = own
    with pytest.raises(ConfigError, match="head_of"):
        choose_layout(model)


# Mutations: each breaks one thing that the layouts rest on, and must be seen by the comparison above.


def _see_everything(self, queries, keys, window, device):
    return torch.ones(queries, keys, dtype=torch.bool, device=device)


def _window_too_wide(self, queries, keys, window, device):
    return _true_mask(self, queries, keys, None if window is None else window + 1, device)


def _window_ignored(self, queries, keys, window, device):
    return _true_mask(self, queries, keys, None, device)


def _sibling_leaks(self, segment):
    return list(range(self.parents[segment] or 0, segment + 1))


def _context_forgotten(self, segment):
    return [segment]


_true_mask = segments.Segments.mask
_true_pack = logps._pack
_true_score = logps._Batch.score


def _positions_by_index(groups, share):
    batch = _true_pack(groups, share)
    batch.positions = list(range(len(batch.positions)))
    return batch


def _positions_from_one(groups, share):
    batch = _true_pack(groups, share)
    batch.positions = [position + 1 for position in batch.positions]
    return batch


def _branches_start_at_zero(groups, share):
    batch = _true_pack(groups, share)
    at = 0
    for length in batch.segments.lengths:
        batch.positions[at : at + length] = range(length)
        at += length
    return batch


def _one_place_early(self, first, targets):
    return _true_score(self, first - 1 if self.positions and first > 0 else first, targets)


@pytest.mark.parametrize(
    ("architecture", "owner", "name", "mutant", "unseen_by"),
    [
        ("llama", segments.Segments, "mask", _see_everything, ()),
        ("llama", segments.Segments, "path", _sibling_leaks, ()),
        ("llama", segments.Segments, "path", _context_forgotten, ("packed",)),
        ("llama", logps, "_pack", _positions_by_index, ("packed",)),
        ("llama", logps, "_pack", _branches_start_at_zero, ("packed",)),
        ("gpt2", logps, "_pack", _positions_from_one, ()),
        ("llama", logps._Batch, "score", _one_place_early, ()),
        ("gemma3_text", segments.Segments, "mask", _window_too_wide, ()),
        ("gemma2", segments.Segments, "mask", _window_ignored, ()),
    ],
)
@pytest.mark.parametrize("layout", PACKED)
def test_mistakes_are_seen(monkeypatch, architecture, owner, name, mutant, unseen_by, layout):
    model = tiny.tiny_model(architecture)
    expected = scored(model, "padded")
    assert_same(scored(model, layout), expected)
    monkeypatch.setattr(owner, name, mutant)
    if layout in unseen_by:
        # Packed sequences have no parents, and rotary attention sees distances only.
        assert_same(scored(model, layout), expected)
        return
    with pytest.raises(AssertionError):
        assert_same(scored(model, layout), expected)
    # The check that every new model gets sees it too, and the layout is refused.
    with pytest.raises(ConfigError, match="differ by"):
        completion_logps(tiny.tiny_model(architecture), groups(), layout=layout)
