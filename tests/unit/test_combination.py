"""COFS-DPO's combination: products are summed exactly, coefficients are fitted on a memory."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefloop.errors import ConfigError, DataError
from prefloop.losses.dpo import DPO
from prefloop.models import adapters
from prefloop.models.adapters import combine_products, load_adapters, mixed
from prefloop.protocols import Quiet
from prefloop.rows import TokenizedPair
from prefloop.train.combination import fit_coefficients, minimise
from prefloop.train.fast_slow import FastSlow
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from tiny import tiny_model

TOKENS = torch.arange(4, 24).view(2, 10)
SHAPES = {"a": (4, 8.0), "b": (2, 1.0), "c": (3, 6.0)}
"""Rank and alpha of each module."""


def module(folder: Path, name: str, architecture: str = "llama") -> Path:
    """A saved adapter with random weights in both halves."""
    rank, alpha = SHAPES[name]
    model = adapters.add_lora(tiny_model(architecture), rank, alpha, seed=ord(name))
    generator = torch.Generator().manual_seed(ord(name))
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, "default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapters.save_adapter(model, folder / name)
    return folder / name


def loaded(folder: Path, names: str = "abc", architecture: str = "llama"):
    folders = {name: module(folder, name, architecture) for name in names}
    return load_adapters(tiny_model(architecture), folders)


def merged_alone(folder: Path, name: str, architecture: str = "llama") -> dict[str, torch.Tensor]:
    model = adapters.load_adapter(tiny_model(architecture), module(folder, name, architecture), trainable=False)
    return weights(adapters.merge_lora(model))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("gamma", [(0.2, 0.5, 0.3), (1.0, 1.0, 1.0), (-0.5, 0.0, 2.0)])
def test_the_update_is_the_weighted_sum_of_the_merged_updates(architecture, gamma, tmp_path):
    base = weights(tiny_model(architecture))
    alone = {name: merged_alone(tmp_path, name, architecture) for name in "abc"}
    plain = combine_products(loaded(tmp_path, architecture=architecture), dict(zip("abc", gamma, strict=True)))
    found = weights(plain)
    assert found.keys() == base.keys()
    for name, start in base.items():
        expected = start + sum(g * (alone[d][name] - start) for d, g in zip("abc", gamma, strict=True))
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("chosen", "abc")
def test_one_hot_returns_that_module(chosen, tmp_path):
    gamma = {name: float(name == chosen) for name in "abc"}
    found, expected = weights(combine_products(loaded(tmp_path), gamma)), merged_alone(tmp_path, chosen)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_modules_that_are_not_named_take_no_part(tmp_path):
    found = weights(combine_products(loaded(tmp_path), {"b": 1.0}))
    for name, value in merged_alone(tmp_path, "b").items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_it_is_merged_in_float32_and_rounded_once(tmp_path):
    folders = {name: module(tmp_path, name) for name in "abc"}
    gamma = {"a": 0.3, "b": 0.3, "c": 0.4}
    found = combine_products(load_adapters(tiny_model("llama").to(torch.bfloat16), folders), gamma)
    exact = combine_products(load_adapters(tiny_model("llama").to(torch.bfloat16).float(), folders), gamma)
    for name, value in weights(exact).items():
        assert weights(found)[name].dtype == torch.bfloat16
        assert weights(found)[name].equal(value.bfloat16()), name


def test_mixing_the_factors_apart_would_be_something_else(tmp_path):
    """(Σ γ B)(Σ γ A) has cross terms: the trap that the rank concatenation avoids."""
    model = loaded(tmp_path, "ab")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    a = [layer.lora_A[name].weight.detach() for name in "ab"]
    b = [layer.lora_B[name].weight.detach() * layer.scaling[name] for name in "ab"]
    start = layer.get_base_layer().weight.detach().clone()
    update = weights(combine_products(model, {"a": 0.5, "b": 0.5}))["model.layers.0.self_attn.q_proj.weight"] - start
    torch.testing.assert_close(update, 0.5 * b[0] @ a[0] + 0.5 * b[1] @ a[1], rtol=1e-4, atol=1e-5)
    padded = [torch.nn.functional.pad(b[1], (0, 2)), torch.nn.functional.pad(a[1], (0, 0, 0, 2))]
    naive = (0.5 * b[0] + 0.5 * padded[0]) @ (0.5 * a[0] + 0.5 * padded[1])
    assert (update - naive).abs().max() > 10 * (update - 0.5 * b[0] @ a[0] - 0.5 * b[1] @ a[1]).abs().max()


def test_the_mixed_model_is_the_combined_one_and_is_put_back(tmp_path):
    model, gamma = loaded(tmp_path), {"a": 0.2, "b": 0.5, "c": -0.3}
    before = logits(model)
    scalings = [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    with mixed(model, {name: torch.tensor(value) for name, value in gamma.items()}):
        found = logits(model)
    assert logits(model).equal(before)
    assert [dict(m.scaling) for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")] == scalings
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(combine_products(model, gamma)), found, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_the_coefficients_alone(tmp_path):
    model = loaded(tmp_path).double()

    def loss(*gamma: torch.Tensor) -> torch.Tensor:
        with mixed(model, dict(zip("abc", gamma, strict=True))):
            return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[..., 5].sum()

    gamma = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.5, 0.3)]
    assert torch.autograd.gradcheck(loss, gamma, eps=1e-3, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def pairs(count: int = 12) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(4, 90, (size,), generator=generator).tolist())

    return [TokenizedPair(f"p{i}", ids(2, 9), ids(1, 12), ids(1, 12), None, None, None, 1.0) for i in range(count)]


def job(model: torch.nn.Module, some: list[TokenizedPair], folder: Path, **settings: object) -> Job:
    wanted = {"learning_rate": 1e-2, "pairs_per_step": 3, "epochs": 4, "layout": "padded", "warmup": 0.0, **settings}
    scored = score_reference(tiny_model("llama"), some, "padded", 200)
    return Job(model, scored, DPO(), TrainSettings.model_validate(wanted), "padded", 7, folder, None, True)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fast modules of two domains, trained by OFS-DPO."""
    folders = {}
    for name, some in (("first", pairs()[:6]), ("second", pairs()[6:])):
        folder = tmp_path_factory.mktemp(name)
        one = job(adapters.add_lora(tiny_model("llama"), 4, 8.0, seed=1), some, folder)
        FastSlow()(one, Quiet(), lambda: False)
        adapters.save_adapter(one.model, folder / "adapter")
        folders[name] = folder / "adapter"
    return folders


def memory_loss(model: torch.nn.Module, one: Job) -> float:
    """The mean loss of the memory under a plain model, from log-probs that are scored anew."""
    live = score_reference(model, one.pairs, "padded", 200)
    margins = [
        sum(p.reference_chosen) - sum(q.reference_chosen) - sum(p.reference_rejected) + sum(q.reference_rejected)
        for p, q in zip(live, one.pairs, strict=True)
    ]
    return sum(math.log1p(math.exp(-0.1 * margin)) for margin in margins) / len(margins)


def test_the_simplex_fit_finds_the_best_point_of_a_fine_grid(domains, tmp_path):
    one = job(load_adapters(tiny_model("llama"), domains), pairs(), tmp_path)
    by_grid = fit_coefficients(one, ["first", "second"], "grid", 50)
    fit = fit_coefficients(one, ["first", "second"])
    assert sum(fit.coefficients.values()) == pytest.approx(1)
    assert fit.coefficients["first"] == pytest.approx(by_grid.coefficients["first"], abs=0.02)
    assert fit.loss <= by_grid.loss + 1e-5
    assert fit.loss <= fit.equal_loss == by_grid.equal_loss
    every = [
        memory_loss(combine_products(load_adapters(tiny_model("llama"), domains), {"first": g, "second": 1 - g}), one)
        for g in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert fit.loss <= min(every) + 1e-5
    assert every[2] == pytest.approx(fit.equal_loss, abs=1e-5)


def test_a_memory_of_one_domain_takes_its_module(domains, tmp_path):
    for part, name in ((slice(0, 6), "first"), (slice(6, 12), "second")):
        one = job(load_adapters(tiny_model("llama"), domains), pairs()[part], tmp_path)
        fit = fit_coefficients(one, ["first", "second"])
        assert fit.coefficients[name] > 0.8, fit
        assert fit.loss < fit.equal_loss


def test_free_coefficients_do_at_least_as_well_as_the_simplex(domains, tmp_path):
    one = job(load_adapters(tiny_model("llama"), domains), pairs(), tmp_path)
    free = fit_coefficients(one, ["first", "second"], "free", 8)
    assert free.loss <= fit_coefficients(one, ["first", "second"]).loss + 1e-6
    combined = combine_products(load_adapters(tiny_model("llama"), domains), free.coefficients)
    assert memory_loss(combined, one) == pytest.approx(free.loss, abs=1e-4)


def test_one_domain_is_ofs(domains, tmp_path):
    """Its module gets 1, and the combination is the policy that OFS-DPO has left."""
    folders = {"first": domains["first"]}
    one = job(load_adapters(tiny_model("llama"), folders), pairs(), tmp_path)
    fit = fit_coefficients(one, ["first"])
    assert fit.coefficients == {"first": 1.0}
    ofs = adapters.merge_lora(adapters.load_adapter(tiny_model("llama"), domains["first"], trainable=False))
    assert fit.loss == pytest.approx(memory_loss(ofs, one), abs=1e-5)
    for name, value in weights(combine_products(one.model, fit.coefficients)).items():
        torch.testing.assert_close(value, weights(ofs)[name], msg=name)


def test_the_microbatch_budget_does_not_change_the_fit(domains, tmp_path):
    found = []
    for budget in (1, 10**6):
        one = job(load_adapters(tiny_model("llama"), domains), pairs(), tmp_path, tokens_per_microbatch=budget)
        found.append(fit_coefficients(one, ["first", "second"]).coefficients["first"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def bowl(least: list[float]) -> Callable[[torch.Tensor], tuple[float, torch.Tensor]]:
    """½ |γ − least|²."""
    target = torch.tensor(least, dtype=torch.float64)
    return lambda gamma: (0.5 * float((gamma - target).square().sum()), gamma - target)


@pytest.mark.parametrize(
    ("rule", "least", "expected"),
    [
        ("free", [0.4, -2.0, 5.0], [0.4, -2.0, 5.0]),
        ("simplex", [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        ("simplex", [0.5, 0.8, 0.6], [0.2, 0.5, 0.3]),  # the nearest point of the simplex
        ("simplex", [0.9, 0.5, -1.0], [0.7, 0.3, 0.0]),
        ("grid", [0.32, 0.68], [0.3, 0.7]),
    ],
)
def test_minimisers_find_known_minima(rule, least, expected):
    start = torch.full((len(least),), 1 / len(least), dtype=torch.float64)
    found = minimise(bowl(least), start, rule, 10 if rule == "grid" else 50)
    assert found.tolist() == pytest.approx(expected, abs=2e-3)


def test_what_does_not_fit_is_refused(domains, tmp_path):
    model = load_adapters(tiny_model("llama"), domains)
    one = job(model, pairs(), tmp_path)
    for call in (combine_products, lambda m, g: mixed(m, g).__enter__()):
        with pytest.raises(ConfigError, match="coefficients are for third, but the adapters are first, second"):
            call(model, {"third": 1.0})
        with pytest.raises(ConfigError, match="coefficients are for nothing"):
            call(model, {})
    with pytest.raises(ConfigError, match="grid for two modules"):
        fit_coefficients(one, ["first"], "grid")
    with pytest.raises(ConfigError, match="steps ≥ 1"):
        fit_coefficients(one, ["first", "second"], steps=0)
    with pytest.raises(ConfigError, match="at least one pair of memory"):
        fit_coefficients(job(model, [], tmp_path), ["first", "second"])
    with pytest.raises(ConfigError, match="needs a model with LoRA modules"):
        fit_coefficients(job(tiny_model("llama"), pairs(), tmp_path), ["first"])
    with pytest.raises(DataError, match="no adapters to load"):
        load_adapters(tiny_model("llama"), {})
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        load_adapters(tiny_model("llama"), {**domains, "third": tmp_path})
