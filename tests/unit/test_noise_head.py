"""The noise head against the same formula on materialised logits."""

import math

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.models import noise_head
from prefloop.models.head import HeadFacts
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.models.noise_head import NoiseHead, PredictingStates, predicting_states
from tiny import tiny_model

SCORES, WIDTH, VOCABULARY = 7, 5, 23
SEEDS = [11, 3, 2**32 - 1, 5, 8, 0, 77]


def states(dtype=torch.float64, scale=1.0, softcap=None, bias=True) -> PredictingStates:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(normal(VOCABULARY, WIDTH))
        if bias:
            head.bias.copy_(normal(VOCABULARY))
    targets = torch.randint(VOCABULARY, (SCORES,), generator=generator)
    return PredictingStates(normal(SCORES, WIDTH), targets, head.requires_grad_(False), HeadFacts(scale, softcap))


def filled(rank=None, bound: float | None = 1.0, dtype=torch.float64) -> NoiseHead:
    head = NoiseHead(WIDTH, VOCABULARY, rank=rank, bound=bound, initial=0.3, seed=1).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(head.weight.shape, generator=generator))
        head.bias.add_(0.2 * torch.randn(head.bias.shape, generator=generator))
    return head


def epsilon() -> torch.Tensor:
    rows = [torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    return torch.stack(rows).double()


def materialised(head: NoiseHead, where: PredictingStates, bound: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The card's formula, line by line."""
    z = torch.nn.functional.linear(where.hidden, where.head.weight, where.head.bias) * where.facts.scale
    if where.facts.softcap is not None:
        z = where.facts.softcap * torch.tanh(z / where.facts.softcap)
    matrix = head.weight if head.down is None else head.weight @ head.down
    sigma = where.hidden @ matrix.T + head.bias
    if bound is not None:
        sigma = math.sqrt(bound) * torch.tanh(sigma / math.sqrt(bound))
    noisy = (z + sigma * epsilon()).log_softmax(-1)
    pick = where.targets[:, None]
    return (noisy.gather(1, pick) - z.log_softmax(-1).gather(1, pick)).squeeze(1), sigma.square().mean(-1)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bound", [None, 0.25])
@pytest.mark.parametrize("facts", [{}, {"scale": 0.25}, {"scale": 2.0, "softcap": 3.0}, {"bias": False}])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, None])
def test_values_and_gradients_equal_materialised_logits(rank, bound, facts, chunk):
    where, head = states(**facts), filled(rank, bound)
    upstream = torch.linspace(-1, 2, SCORES, dtype=torch.float64)
    found = head(where, SEEDS, chunk)
    ours = torch.autograd.grad(found.shift @ upstream + found.variance @ upstream.flip(0), list(head.parameters()))
    shift, variance = materialised(head, where, bound)
    theirs = torch.autograd.grad(shift @ upstream + variance @ upstream.flip(0), list(head.parameters()))
    torch.testing.assert_close(found.shift, shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance, variance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_gradients_by_finite_differences_in_float64(rank, bound):
    where, head = states(), filled(rank, bound)
    names, values = zip(*head.named_parameters(), strict=True)

    def call(*parameters):
        found = torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (where, SEEDS, 50))
        return found.shift, found.variance

    torch.autograd.gradcheck(call, values)


def test_no_noise_shifts_nothing_to_the_bit():
    head = NoiseHead(WIDTH, VOCABULARY)
    found = head(states(torch.float32), SEEDS)
    assert found.shift.tolist() == [0.0] * SCORES
    assert found.variance.tolist() == [0.0] * SCORES


@pytest.mark.parametrize("bound", [0.01, 1.0])
def test_the_variance_never_exceeds_its_bound(bound):
    head = filled(bound=bound, dtype=torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e4)
    found = head(states(torch.float32), SEEDS)
    assert float(found.variance.detach().max()) <= bound * (1 + 1e-6)
    assert found.shift.isfinite().all()
    found.shift.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_low_rank_equals_full_at_full_rank():
    where, low = states(), filled(rank=WIDTH)
    full = NoiseHead(WIDTH, VOCABULARY).double()
    with torch.no_grad():
        full.weight.copy_(low.weight @ low.down)
        full.bias.copy_(low.bias)
    one, other = low(where, SEEDS), full(where, SEEDS)
    torch.testing.assert_close(one.shift, other.shift)
    torch.testing.assert_close(one.variance, other.variance)
    # dL/dB = dL/dW · Aᵀ, dL/dA = Bᵀ · dL/dW
    one.shift.sum().backward()
    other.shift.sum().backward()
    torch.testing.assert_close(low.weight.grad, full.weight.grad @ low.down.T)
    torch.testing.assert_close(low.down.grad, low.weight.T @ full.weight.grad)


def test_sizes_of_full_and_low_rank_heads():
    with torch.device("meta"):
        full = NoiseHead(4096, 32000)
    assert sum(p.numel() for p in full.parameters()) == 131_104_000  # the count given for the paper's 7B model
    low = NoiseHead(64, 500, rank=4)
    assert sum(p.numel() for p in low.parameters()) == 4 * (64 + 500) + 500


def test_the_gradient_of_the_variance_is_two_sigma():
    where, head = states(), filled(bound=None)
    head(where, SEEDS).variance.mean().backward()
    sigma = where.hidden @ head.weight.T + head.bias
    expected = 2 * sigma / sigma.numel()
    torch.testing.assert_close(head.bias.grad, expected.sum(0))
    torch.testing.assert_close(head.weight.grad, expected.T @ where.hidden)


def test_mean_shift_is_minus_half_the_sum_of_p_times_one_minus_p_times_the_variance():
    where, draws = states(), 4000
    head = NoiseHead(WIDTH, VOCABULARY, bound=None, initial=0.5).double()
    one = slice(0, 1)
    repeated = PredictingStates(
        where.hidden[one].expand(draws, -1), where.targets[one].expand(draws), where.head, where.facts
    )
    mean = float(head(repeated, range(draws)).shift.mean().detach())
    p = torch.nn.functional.linear(where.hidden[0], where.head.weight, where.head.bias).softmax(-1)
    assert mean == pytest.approx(-0.5 * float((p * (1 - p)).sum()) * 0.25, abs=0.03)
    assert mean < 0


@pytest.mark.parametrize(("size", "error"), [(0.1, 0.03), (0.3, 0.03), (1.0, 0.06)])
def test_the_mean_over_draws_is_the_second_order_formula_of_the_card(size, error):
    """E[log p^noise − log p] ≈ −½ Σ p(1 − p) σ², vocabulary of 50, a σ of its own for each logit.

    The part that is linear in ε has mean 0 and is taken off, so that few draws suffice.
    """
    draws, vocabulary = 3000, 50
    generator = torch.Generator().manual_seed(8)
    head = NoiseHead(WIDTH, vocabulary, bound=None, initial=0.0).double()
    sigma = size * torch.rand(vocabulary, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(sigma)
    lm_head = torch.nn.Linear(WIDTH, vocabulary, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(vocabulary, WIDTH, generator=generator))
        lm_head.bias.copy_(torch.randn(vocabulary, generator=generator))
    hidden = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.tensor([7])
    where = PredictingStates(hidden.expand(draws, -1), target.expand(draws), lm_head, HeadFacts(1.0, None))
    shift = head(where, range(draws)).shift.detach()
    p = lm_head(hidden)[0].softmax(-1)
    noise = torch.stack([torch.randn(vocabulary, generator=torch.Generator().manual_seed(i)) for i in range(draws)])
    linear = sigma * noise.double()
    mean = float((shift - linear[:, 7] + linear @ p).mean())
    assert mean == pytest.approx(-0.5 * float((p * (1 - p) * sigma.square()).sum()), rel=error)


def test_a_score_draws_the_same_noise_in_any_company():
    where, head = states(torch.float32), filled(dtype=torch.float32)
    whole = head(where, SEEDS).shift
    for index, seed in enumerate(SEEDS):
        own = slice(index, index + 1)
        alone = head(PredictingStates(where.hidden[own], where.targets[own], where.head, where.facts), [seed]).shift
        torch.testing.assert_close(alone, whole[own], rtol=1e-5, atol=1e-5)


def test_no_tensor_of_all_scores_and_the_vocabulary_exists():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                wide = isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == VOCABULARY
                if wide and len(value) != WIDTH:  # not a transposed weight
                    largest = max(largest, len(value))
            return result

    where, head = states(torch.float32), filled(dtype=torch.float32)
    with Watch():
        found = head(where, SEEDS, 2 * VOCABULARY)
        (found.shift.sum() + found.variance.sum()).backward()
    assert largest == 2


def test_a_16_bit_reference_is_noised_in_32_bits():
    where, head = states(torch.bfloat16), filled(dtype=torch.float32)
    found = head(where, SEEDS)
    assert (found.shift.dtype, found.variance.dtype) == (torch.float32, torch.float32)
    wide = PredictingStates(where.hidden.float(), where.targets, states(torch.float32).head, where.facts)
    torch.testing.assert_close(found.shift, head(wide, SEEDS).shift, rtol=0.05, atol=0.05)
    (found.shift.sum() + found.variance.sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
    assert NoiseHead(WIDTH, VOCABULARY)(where, SEEDS).shift.tolist() == [0.0] * SCORES


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "gpt_neox"])
def test_predicting_states_give_the_log_probs_of_the_engine(architecture):
    model = tiny_model(architecture)
    groups = [TokenGroup((5, 6, 7), ((8, 9, 2), (10,))), TokenGroup((1,), ((20, 21, 22, 23, 2),))]
    found = predicting_states(model, groups)
    tiles = noise_head._Tiles(found, [0] * len(found.targets), 1.0, 100)
    logps = tiles._logits(slice(0, 9)).log_softmax(-1).gather(1, found.targets[:, None]).squeeze(1)
    expected = completion_logps(model, groups, layout="padded")
    torch.testing.assert_close(logps, expected.token_logps[expected.mask], rtol=1e-4, atol=1e-4)
    assert not found.hidden.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank .*must be ≥ 1, got 0"), ({"bound": 0.0}, "bound .*must be > 0"), ({"bound": -1.0}, "bound")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        NoiseHead(WIDTH, VOCABULARY, **settings)


def test_bad_calls_are_refused():
    where, head = states(), filled()
    with pytest.raises(ValueError, match="7 scores but 2 seeds"):
        head(where, [1, 2])
    with pytest.raises(ValueError, match="chunk must be ≥ 1"):
        head(where, SEEDS, 0)
    with pytest.raises(ValueError, match="context is empty"):
        predicting_states(tiny_model("llama"), [TokenGroup((), ((5,),))])
