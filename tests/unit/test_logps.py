"""Log-probs against plain log-softmax of all logits; the head in chunks; what is refused."""

import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from prefloop.errors import ConfigError
from prefloop.models import head
from prefloop.models.head import HeadFacts, head_of, target_logps
from prefloop.models.logps import TokenGroup, completion_logps

VOCABULARY = 96
FACTS = [
    HeadFacts(),
    HeadFacts(scale=0.25),
    HeadFacts(softcap=3.0),
    HeadFacts(temperature=0.7),
    HeadFacts(scale=2.0, softcap=3.0, temperature=1.3),
]


def groups(vocabulary=VOCABULARY):
    draw = random.Random(0)

    def ids(count):
        return tuple(draw.randrange(4, vocabulary) for _ in range(count))

    return [TokenGroup(ids(9), (ids(5), ids(2))), TokenGroup(ids(1), (ids(1), (), ids(7)))]


def naive(model, temperature=1.0):
    """One row at a time, through the model's own logits."""
    rows = []
    for group in groups():
        for completion in group.completions:
            logits = model(input_ids=torch.tensor([group.context + completion]), use_cache=False).logits[0]
            logps = (logits / temperature).log_softmax(-1)[len(group.context) - 1 : -1]
            targets = torch.tensor(completion, dtype=torch.long)
            rows.append(logps[: len(completion)].gather(1, targets[:, None])[:, 0])
    return rows


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_equals_log_softmax_of_the_models_own_logits(architecture, layout):
    model = tiny.tiny_model(architecture)
    for temperature in (1.0, 0.6):
        expected = naive(model, temperature)
        got = completion_logps(model, groups(), layout=layout, temperature=temperature)
        assert got.mask.sum(-1).tolist() == [5, 2, 1, 0, 7]
        assert got.token_logps.dtype == torch.float32
        for row, mask, values in zip(got.token_logps, got.mask, expected, strict=True):
            torch.testing.assert_close(row[mask], values, rtol=1e-4, atol=1e-5)
            assert torch.equal(row[~mask], torch.zeros_like(row[~mask]))
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_an_empty_completion_has_total_zero_and_no_gradient():
    model = tiny.tiny_model("llama")
    got = completion_logps(model, [TokenGroup((5, 6), ((), ()))])
    assert got.token_logps.shape == (2, 0)
    got.total.sum().backward()
    assert got.total.tolist() == [0.0, 0.0]
    assert got.mean.tolist() == [0.0, 0.0]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("chunk", [1, 7, 40, 10_000])
@pytest.mark.parametrize("bias", [False, True])
def test_head_in_chunks_equals_log_softmax_with_its_gradients(facts, chunk, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 17, bias=bias, dtype=torch.float64)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 16, 3, 3, 8, 7, 6, 15, 1])
    upstream = torch.randn(9, dtype=torch.float64)
    parameters = [hidden, *linear.parameters()]

    logits = linear(hidden) * facts.scale
    if facts.softcap:
        logits = facts.softcap * torch.tanh(logits / facts.softcap)
    expected = (logits / facts.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = target_logps(hidden, linear, targets, facts, chunk)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(expected, parameters, upstream)
    )


class _Scored(nn.Module):
    def __init__(self, linear, targets, facts):
        super().__init__()
        self.linear, self.targets, self.facts = linear, targets, facts

    def forward(self, hidden):
        return target_logps(hidden, self.linear, self.targets, self.facts, chunk=8)


@pytest.mark.parametrize("facts", [FACTS[0], FACTS[-1]])
def test_head_passes_gradcheck(facts):
    torch.manual_seed(0)
    scored = _Scored(nn.Linear(4, 7, dtype=torch.float64), torch.tensor([0, 6, 2, 2, 5]), facts)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def head_logps(hidden, weight, bias):
        return functional_call(scored, {"linear.weight": weight, "linear.bias": bias}, (hidden,))

    weight, bias = (p.detach().clone().requires_grad_(True) for p in scored.parameters())
    assert torch.autograd.gradcheck(head_logps, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient():
    linear = nn.Linear(4, 7).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    target_logps(hidden, linear, torch.tensor([1, 2, 3]), HeadFacts()).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert linear.weight.grad is None


def test_half_precision_sums_in_float32():
    torch.manual_seed(0)
    linear = nn.Linear(16, 300, bias=False)
    hidden = torch.randn(40, 16)
    targets = torch.randint(300, (40,))
    half = nn.Linear(16, 300, bias=False, dtype=torch.bfloat16)
    half.weight.data.copy_(linear.weight.data)
    exact = nn.Linear(16, 300, bias=False)
    exact.weight.data.copy_(half.weight.data.float())
    for module, states in ((half, hidden.bfloat16()), (exact, hidden.bfloat16().float())):
        target_logps(states, module, targets, HeadFacts(), chunk=64).sum().backward()
    got = target_logps(hidden.bfloat16(), half, targets, HeadFacts(), chunk=64)
    assert got.dtype == torch.float32
    assert half.weight.grad.dtype == torch.bfloat16
    gap = (half.weight.grad.float() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert gap < 0.01


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_logits_of_all_positions_never_exist(layout):
    vocabulary = 4_000
    model = tiny.tiny_model("llama", vocabulary)
    pairs = [TokenGroup((1, 2, 3), tuple(tuple(range(4 + k, 60 + k)) for k in range(4))) for _ in range(8)]
    weights = vocabulary * 32
    scores = 8 * 4 * 56
    assert scores * vocabulary > 50 * weights
    with _Largest() as seen:
        completion_logps(model, pairs, layout=layout, head_chunk=10_000).total.sum().backward()
    assert seen.numel == weights
    with _Largest() as seen, torch.no_grad():
        completion_logps(model, pairs, layout=layout, head_chunk=10_000)
    assert seen.numel <= weights


def test_a_wrong_chunk_boundary_is_seen(monkeypatch):
    model = tiny.tiny_model("llama")
    expected = completion_logps(model, groups(), layout="padded", head_chunk=50)
    spans = head._Tiles.spans

    def one_column_missing(self, scores, vocabulary):
        for index, (span, over_rows) in enumerate(spans(self, scores, vocabulary)):
            yield slice(span.start + (index > 0), span.stop), over_rows

    monkeypatch.setattr(head._Tiles, "spans", one_column_missing)
    got = completion_logps(model, groups(), layout="padded", head_chunk=50)
    assert (got.token_logps - expected.token_logps).abs().max() > 1e-3


def test_config_says_what_happens_to_logits():
    assert head_of(tiny.tiny_model("gemma2"))[1] == HeadFacts(softcap=5.0)
    assert head_of(tiny.tiny_model("cohere"))[1] == HeadFacts(scale=0.25)
    assert head_of(tiny.tiny_model("granite"))[1] == HeadFacts(scale=0.25)
    assert head_of(tiny.tiny_model("llama"), 0.5)[1] == HeadFacts(temperature=0.5)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "context of group 1 is empty", {"groups": [TokenGroup((1,), ((2,),)), TokenGroup((), ((2,),))]}),
        (ValueError, "without a completion", {"groups": []}),
        (ValueError, "without a completion", {"groups": [TokenGroup((1,), ())]}),
        (ValueError, "head_chunk", {"head_chunk": 0}),
        (ConfigError, "got 'dense'", {"layout": "dense"}),
        (ConfigError, "temperature", {"temperature": 0.0}),
    ],
)
def test_impossible_requests_are_refused(error, words, arguments):
    with pytest.raises(error, match=words):
        completion_logps(tiny.tiny_model("llama"), **{"groups": groups(), **arguments})


def test_an_adapter_on_the_head_is_refused():
    model = tiny.tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match=r"plain nn\.Linear, got Sequential"):
        completion_logps(model, groups(), layout="padded")
